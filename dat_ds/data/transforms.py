"""Pixel conversions and augmentation whose randomness is a function of (seed, epoch, index).

Shapes: ``C`` channels, ``H`` height, ``W`` width, ``S`` side of a square image. Images are ``CHW``.

Why the epoch travels with the index: worker processes hold a *copy* of the dataset, so an epoch set
on the parent's dataset would not reach running workers. The sampler therefore hands out
``SampleKey(epoch, index)``, and the dataset keeps no state at all.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import ConcatDataset, Dataset, Subset

from dat_ds.data.policies import IDBH_ERASING, Policy, idbh
from dat_ds.data.sampler import FixedShare, SampleKey, derive_seed, seeded_generator

Sample = tuple[Tensor, int]
T = TypeVar("T")

Augmentation = Literal[
    "none",
    "flip",
    "crop",
    "crop_flip",
    "resized_crop_flip",
    "cropshift_flip",
    "idbh_weak",
    "idbh_strong",
]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)

CROP_SHARE = 224 / 256
"""He et al., CVPR 2016, arXiv 1512.03385: evaluate the central 224 of an image resized to 256."""
# Szegedy et al., CVPR 2015, arXiv 1409.4842, section 6: area and aspect ratio of a training crop.
_CROP_AREA = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
# Li and Spratling, ICLR 2023, arXiv 2301.09879: up to 10 rows and columns of CIFAR-10's 32 pixels.
_MOST_REMOVED = 10 / 32


def to_unit(image: Tensor) -> Tensor:
    """Convert uint8 pixels in 0..255 to float32 in [0, 1]; float pixels are returned as float32."""
    if image.dtype == torch.uint8:
        return image.to(torch.float32) / 255
    return image.to(torch.float32)


def resize_square(image: Tensor, side: int) -> Tensor:
    """Resize ``(C, H, W)`` to ``(C, side, side)``, bilinear with antialiasing, ratio not kept."""
    import torchvision.transforms.functional as vision

    resized: Tensor = vision.resize(image, [side, side], antialias=True)
    return resized


def resize_center_crop(image: Tensor, side: int, share: float = CROP_SHARE) -> Tensor:
    """Resize the shorter edge to ``side / share`` and cut the central ``(C, side, side)``."""
    import torchvision.transforms.functional as vision

    resized = vision.resize(image, [round(side / share)], antialias=True)
    cropped: Tensor = vision.center_crop(resized, [side, side])
    return cropped


def random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift ``(C, H, W)`` by up to an eighth of its size (at least one pixel), black outside.

    Zero padding is what Madry et al. (ICLR 2018, arXiv 1706.06083) and TRADES train CIFAR with.
    """
    height, width = image.shape[-2:]
    pad_h, pad_w = max(1, height // 8), max(1, width // 8)
    down = pad_h - _random_int(2 * pad_h + 1, generator)
    right = pad_w - _random_int(2 * pad_w + 1, generator)
    # Padding by a negative number of pixels cuts them off.
    return functional.pad(image, (right, -right, down, -down))


def random_flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror left and right with probability one half."""
    return image.flip(-1) if _random_int(2, generator) else image


def cropshift(image: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a random part out of ``(C, H, W)`` and put it at a random place, black around it.

    Cropshift (Li and Spratling, ICLR 2023, arXiv 2301.09879): the rows and columns removed are
    together up to 10 of 32, of images of other sizes in proportion to the shorter side.
    """
    height, width = image.shape[-2:]
    removed = _random_int(round(min(height, width) * _MOST_REMOVED) + 1, generator)
    columns = _random_int(removed + 1, generator)
    rows = removed - columns
    top, new_top = (_random_int(rows + 1, generator) for _ in range(2))
    left, new_left = (_random_int(columns + 1, generator) for _ in range(2))
    height, width = height - rows, width - columns
    shifted = torch.zeros_like(image)
    shifted[..., new_top : new_top + height, new_left : new_left + width] = image[
        ..., top : top + height, left : left + width
    ]
    return shifted


def random_resized_crop(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cut a random box of 8 to 100 percent of the area and resize it to ``size`` (H, W).

    Same distribution as torchvision's ``RandomResizedCrop``, which cannot be given a generator.
    """
    top, left, height, width = _random_box(image.shape[-2], image.shape[-1], generator)
    box = image[..., top : top + height, left : left + width]
    import torchvision.transforms.functional as vision

    resized: Tensor = vision.resize(box, list(size), antialias=True)
    return resized


class KeyedDataset(Dataset[T]):
    """A dataset whose items depend on the epoch: it takes a ``SampleKey``.

    Attributes:
        dataset: Whose items, in their order, it changes.
    """

    dataset: Dataset[Any]


class Augmented(KeyedDataset[Sample]):
    """A dataset with random changes that do not depend on workers, ranks or call order.

    Item ``SampleKey(epoch, index)`` draws from generators seeded by ``(seed, epoch, index)``;
    a plain integer means epoch 0. Crops and flips come first, then the policy.

    Args:
        dataset: Yields ``(x, y)`` with ``x`` float32 CHW in [0, 1]. If it (or the dataset under a
            ``Subset``) has a method ``raw(index) -> (image, y)``, ``resized_crop_flip`` cuts from
            that full-size image and not from the evaluation crop.
        augment: One of ``AUGMENTATIONS``: ``"none"``, ``"flip"``, ``"crop"`` (digits: a mirrored
            digit is not a digit), ``"crop_flip"``, ``"resized_crop_flip"``, ``"cropshift_flip"``,
            or IDBH, whose images have 1 or 3 channels.
        seed: Any integer.
        size: ``(H, W)`` of the images out of ``resized_crop_flip``; None takes that of item 0.
        policy: What follows ``augment``; IDBH brings its own.
        side_in: Side of the square images in an epoch, which are resized to it before the policy;
            None leaves them as they are.

    Raises:
        ValueError: ``augment`` is not one of ``AUGMENTATIONS``, or is IDBH with another policy.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        augment: str,
        seed: int,
        size: tuple[int, int] | None = None,
        *,
        policy: Policy | None = None,
        side_in: Callable[[int], int] | None = None,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment={augment!r} must be one of {', '.join(AUGMENTATIONS)}.")
        if augment in IDBH_ERASING:
            if policy is not None:
                raise ValueError(f"augment={augment!r} is a whole policy: leave out the other.")
            policy = idbh(augment)
        if size is None and augment == "resized_crop_flip":
            height, width = dataset[0][0].shape[-2:]
            size = (height, width)
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self.size = size
        self.policy = policy
        self.side_in = side_in

    def __len__(self) -> int:
        """Number of samples."""
        return len(cast(Any, self.dataset))

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """``(x, y)``: float32 CHW in [0, 1] and an int; ``key`` may be a plain index."""
        if not isinstance(key, SampleKey):
            key = SampleKey(0, key)
        x, y = self._cropped(key)
        if self.policy is not None:
            x = self.policy(x, derive_seed("policy", self.seed, key.epoch, key.index))
        return x, y

    def _cropped(self, key: SampleKey) -> Sample:
        side = None if self.side_in is None else self.side_in(key.epoch)
        if self.augment == "none" and side is None:
            return fetch_sample(self.dataset, key)  # without the cost of a generator
        size = self.size if side is None else (side, side)
        generator = seeded_generator("augment", self.seed, key.epoch, key.index)
        if size is not None and self.augment == "resized_crop_flip":
            image, y = fetch_raw(self.dataset, key.index)
            # Resized floats, unlike uint8, may leave the range by a rounding error.
            x = to_unit(random_resized_crop(image, size, generator)).clamp(0, 1)
            return random_flip(x, generator), y
        x, y = fetch_sample(self.dataset, key)
        if self.augment not in ("none", "flip"):
            cut = random_crop if self.augment in ("crop", "crop_flip") else cropshift
            x = cut(x, generator)
        if self.augment not in ("none", "crop"):
            x = random_flip(x, generator)
        if side is not None and x.shape[-1] != side:
            x = resize_square(x, side).clamp(0, 1)
        return x, y


def fetch_sample(dataset: Dataset[Any], key: SampleKey) -> Sample:
    """Item ``key``, carrying its epoch through ``Subset`` to a ``KeyedDataset`` below.

    ``Subset`` cannot look up a ``SampleKey``; dropping the epoch there would silently repeat the
    same crops in every epoch.
    """
    if isinstance(dataset, Subset):
        return fetch_sample(dataset.dataset, SampleKey(key.epoch, dataset.indices[key.index]))
    sample: Sample = dataset[key if isinstance(dataset, KeyedDataset) else key.index]
    return sample


def fetch_raw(dataset: Dataset[Any], index: int) -> Sample:
    """Stored image of item ``index`` before any resizing or augmentation, and its label.

    A dataset without a method ``raw`` gives the item itself.
    """
    dataset, index = _owner(dataset, index)
    if isinstance(dataset, KeyedDataset):
        return fetch_raw(dataset.dataset, index)
    raw = getattr(dataset, "raw", None)
    sample: Sample = dataset[index] if raw is None else raw(index)
    return sample


def further_parts(dataset: Dataset[Any]) -> tuple[FixedShare, ...]:
    """Parts at the end of a dataset with a fixed share of every global batch: its ``further``."""
    while isinstance(dataset, KeyedDataset):
        dataset = dataset.dataset
    parts: tuple[FixedShare, ...] = getattr(dataset, "further", ())
    return parts


def file_of(dataset: Dataset[Any], index: int) -> str | None:
    """File that item ``index`` is read from; None where there is none, or it is not known."""
    dataset, index = _owner(dataset, index)
    named = getattr(dataset, "file_of", None)
    if named is not None:
        found: str | None = named(index)
        return found
    if isinstance(dataset, KeyedDataset):
        return file_of(dataset.dataset, index)
    samples = getattr(dataset, "samples", None)  # of torchvision's folders too
    return str(samples[index][0]) if isinstance(samples, list) else None


def _owner(dataset: Dataset[Any], index: int) -> tuple[Dataset[Any], int]:
    """The dataset below any ``Subset`` and ``ConcatDataset``, and the item's index in it."""
    if isinstance(dataset, Subset):
        return _owner(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        ends = dataset.cumulative_sizes
        part = bisect.bisect_right(ends, index)
        return _owner(dataset.datasets[part], index - (ends[part - 1] if part else 0))
    return dataset, index


def _random_int(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))


def _random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width); after ten boxes that do not fit, take the whole centre."""
    for _ in range(10):
        u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (_CROP_AREA[0] + u * (_CROP_AREA[1] - _CROP_AREA[0]))
        log_low, log_high = math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])
        ratio = math.exp(log_low + v * (log_high - log_low))
        box_h, box_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_h <= height and 0 < box_w <= width:
            top = _random_int(height - box_h + 1, generator)
            return top, _random_int(width - box_w + 1, generator), box_h, box_w
    box_h = min(height, round(width / _CROP_RATIO[0]))
    box_w = min(width, round(height * _CROP_RATIO[1]))
    return (height - box_h) // 2, (width - box_w) // 2, box_h, box_w
