"""mixup and CutMix whose randomness is a function of (seed, epoch, index).

The partner of an image is drawn from the whole dataset and not from its batch, so that batches do
not depend on the number of ranks or workers; where parts have a fixed share of every batch, from
each with that share.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.data.mixture import part_ranges
from dat_ds.data.sampler import SampleKey, derive_seed
from dat_ds.data.transforms import KeyedDataset, fetch_sample, further_parts


class Mixed(KeyedDataset[tuple[Tensor, Tensor]]):
    """Images mixed with partners, and the class probabilities that go with them.

    mixup (Zhang et al., ICLR 2018, arXiv 1710.09412): ``lam * x + (1 - lam) * partner``. CutMix
    (Yun et al., ICCV 2019, arXiv 1905.04899): a box of the partner, of share ``1 - lam`` of the
    area, cut at the image's border. ``lam`` is drawn from ``Beta(alpha, alpha)``; the label is
    ``lam`` of the image's class and the rest of the partner's, for CutMix by the area really shown.
    Where both are on, each image gets one of them with probability one half.

    Args:
        dataset: Yields ``(x, y)``: ``x`` float32 ``(C, H, W)`` in [0, 1], ``y`` a class index.
        num_classes: Length ``K`` of the labels.
        mixup: Its alpha; 0 switches it off.
        cutmix: Its alpha; 0 switches it off.
        seed: Any integer.
    """

    def __init__(
        self, dataset: Dataset[Any], num_classes: int, *, mixup: float, cutmix: float, seed: int
    ) -> None:
        self.dataset = dataset
        self.num_classes = num_classes
        self.mixup = mixup
        self.cutmix = cutmix
        self.seed = seed
        further = [part.fraction for part in further_parts(dataset)]
        self._shares = [1 - sum(further), *further]
        self._ranges = list(part_ranges(dataset)) if further else []

    def __len__(self) -> int:
        """Number of samples."""
        return len(cast(Any, self.dataset))

    def __getitem__(self, key: SampleKey | int) -> tuple[Tensor, Tensor]:
        """``(x, y)``: float32 CHW in [0, 1] and float32 probabilities ``(K,)``."""
        if not isinstance(key, SampleKey):
            key = SampleKey(0, key)
        random = np.random.default_rng(derive_seed("mix", self.seed, key.epoch, key.index))
        partner = SampleKey(key.epoch, self._partner(random))
        cuts = random.random() < (0.5 if self.mixup else 1.0) if self.cutmix else False
        alpha = self.cutmix if cuts else self.mixup
        share = float(random.beta(alpha, alpha))
        x, y = fetch_sample(self.dataset, key)
        other, y_other = fetch_sample(self.dataset, partner)
        if cuts:
            x, share = _paste_box(x, other, share, random)
        else:
            x = torch.lerp(other, x, share)
        label = torch.zeros(self.num_classes)
        label[y] += share
        label[y_other] += 1 - share
        return x, label

    def _partner(self, random: np.random.Generator) -> int:
        """Index of a partner: of each part as often as in a batch."""
        if not self._ranges:
            return int(random.integers(len(self)))
        part = self._ranges[int(random.choice(len(self._ranges), p=self._shares))]
        return int(random.integers(part.start, part.stop))


def _paste_box(
    x: Tensor, other: Tensor, share: float, random: np.random.Generator
) -> tuple[Tensor, float]:
    """``x`` with a box of ``other`` around a random pixel, and the share of ``x`` still shown."""
    height, width = x.shape[-2:]
    half_h, half_w = (math.sqrt(1 - share) * side / 2 for side in (height, width))
    row, column = random.integers(height), random.integers(width)
    top, bottom = max(0, round(row - half_h)), min(height, round(row + half_h))
    left, right = max(0, round(column - half_w)), min(width, round(column + half_w))
    pasted = x.clone()
    pasted[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)
