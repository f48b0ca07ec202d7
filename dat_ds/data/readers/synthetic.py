"""Images made up from random patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.data.images import TensorImages
from dat_ds.data.method import DatasetMethod
from dat_ds.data.readers.source import Source, measure_channels
from dat_ds.data.sampler import seeded_generator
from dat_ds.method import above, option


@dataclass(frozen=True, kw_only=True)
class Synthetic(DatasetMethod):
    """Random images with a pattern of their class: a score on them means nothing."""

    name: ClassVar[str] = "synthetic"

    num_train: int = above(0, 512)
    """Training images."""
    num_test: int = above(0, 128)
    """Test images."""
    image_shape: list[int] = option(
        [3, 32, 32],
        "channels, height, width, each at least 1, such as [3, 32, 32]",
        lambda v: len(v) == 3 and min(v) >= 1,
    )
    """Channels, height, width."""

    def read(self, seed: int) -> Source:
        """Make images that are half a fixed random pattern of their class and half noise."""
        shape = tuple(self.image_shape)
        num_classes = self.num_classes or 10
        generator = seeded_generator("synthetic", seed)

        def draw(count: int) -> Tensor:
            return torch.randint(128, (count, *shape), generator=generator, dtype=torch.uint8)

        patterns = draw(num_classes)
        parts = []
        for count in (self.num_train, self.num_test):
            labels = torch.arange(count) % num_classes
            parts.append(TensorImages(draw(count) + patterns[labels], labels, self.img_size))
        train, test = parts
        return Source(train, test, measure_channels(train.images), num_classes=num_classes)
