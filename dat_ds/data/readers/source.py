"""The dataset that a reader returns, and helpers of the readers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dat_ds.data.images import Channels, Images
from dat_ds.data.transforms import to_unit
from dat_ds.errors import DataError, is_out_of_memory


@dataclass(frozen=True)
class Source:
    """A dataset as read: both parts, (mean, std), names, and its number of classes (0: count)."""

    train: Images
    test: Images
    statistics: tuple[Channels, Channels]
    class_names: tuple[str, ...] | None = None
    num_classes: int = 0


@dataclass(frozen=True)
class Part:
    """The images of a part of a dataset, names of its classes, and their number (0: count)."""

    images: Images
    class_names: tuple[str, ...] | None = None
    num_classes: int = 0


IMAGENET_STATISTICS: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The constants torchvision's and timm's ImageNet models are trained with."""


@contextlib.contextmanager
def enough_memory(key: str) -> Iterator[None]:
    """Turn memory that is not there into a :class:`DataError`.

    Args:
        key: The key and value that asked for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{key}: the images do not fit into the memory of this machine "
            f"({reason[0] if reason else type(error).__name__}). Take fewer or smaller ones."
        ) from error


def raise_all(problems: Iterable[str]) -> None:
    """Raise all problems in one error, if there are any."""
    text = "\n".join(problems)
    if text:
        raise DataError(text)


def measure_channels(images: Tensor) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel, accumulated in float64 over chunks."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    total_squared = torch.zeros_like(total)
    for chunk in torch.split(images, 1024):
        pixels = to_unit(chunk).double().transpose(0, 1).flatten(1)
        total += pixels.sum(1)
        total_squared += pixels.square().sum(1)
    count = images.numel() // images.shape[1]
    mean = total / count
    # A constant channel has no spread, and models divide by it: one grey level is the floor.
    std = (total_squared / count - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
