"""Images in memory and in files."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.data.decoding import read_image
from dat_ds.data.transforms import (
    RESIZE_RATIO,
    Sample,
    resize_center_crop,
    resize_square,
    to_unit,
)
from dat_ds.errors import DataError

Channels = tuple[float, ...]


ImageShape = tuple[int, int, int]


LARGEST_IMAGE = 2**27
"""Pixels of an image that is resized, 1.6 GB as float32; Pillow opens files of up to 2**26.4."""


class TensorImages(Dataset[Sample]):
    """Images held in memory and converted one at a time.

    Args:
        images: ``(N, C, H, W)``, uint8 in 0..255 or float in [0, 1].
        labels: Integer labels, shape ``(N,)``.
        img_size: Side to resize to (ratio not kept), or None to leave the images as they are.
    """

    def __init__(self, images: Tensor, labels: Tensor, img_size: int | None = None) -> None:
        self.images = images
        self.labels = labels.to(torch.int64)
        self.img_size = img_size
        channels, height, width = images.shape[1:]
        self.image_shape: ImageShape = (channels, img_size or height, img_size or width)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """``(x, y)`` with ``x`` float32 of ``image_shape`` in [0, 1]."""
        x = to_unit(self.images[index])
        if self.img_size is not None:
            x = resize_square(x, self.img_size).clamp(0, 1)
        return x, int(self.labels[index])

    def raw(self, index: int) -> Sample:
        """Stored image before any resizing, and its label."""
        return self.images[index], int(self.labels[index])


class FolderImages(Dataset[Sample]):
    """Image files read on demand, as RGB.

    Args:
        samples: ``(file, label)`` pairs.
        img_size: Side of the evaluation image: shorter edge to ``img_size * 256 / 224``, then the
            central square.
        key: Key of the config that named the files, for error texts.
    """

    def __init__(
        self, samples: list[tuple[str, int]], img_size: int, key: str = "dat.data.path"
    ) -> None:
        self.samples = samples
        self.key = key
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        self.img_size = img_size
        self.image_shape: ImageShape = (3, img_size, img_size)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """``(x, y)`` with ``x`` float32 of ``image_shape`` in [0, 1].

        Raises:
            DataError: The file cannot be read as pixels; see ``read_image``.
        """
        image, y = self.raw(index)
        self._check_ratio(index, *image.shape[1:])
        return to_unit(resize_center_crop(image, self.img_size)).clamp(0, 1), y

    def _check_ratio(self, index: int, height: int, width: int) -> None:
        """Refuse an image so long that resizing its shorter edge makes it huge."""
        scale = self.img_size * RESIZE_RATIO / min(height, width)
        if height * width * scale**2 > LARGEST_IMAGE:
            raise DataError(
                f"{self.key}: the image {self.samples[index][0]} has {height} x {width} pixels: "
                f"with a shorter edge of {round(self.img_size * RESIZE_RATIO)} it would have "
                f"{max(height, width) * scale:.0f} along the other. Crop it, or remove it."
            )

    def raw(self, index: int) -> Sample:
        """Whole image as ``read_image`` gives it, of the file's own size, and its label.

        Raises:
            DataError: The file cannot be read as pixels.
        """
        path, label = self.samples[index]
        return read_image(path, self.key), label
