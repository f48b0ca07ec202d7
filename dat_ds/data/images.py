"""Images in memory and in files."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.data.decoding import read_image
from dat_ds.data.transforms import (
    CROP_SHARE,
    Sample,
    resize_center_crop,
    resize_square,
    to_unit,
)
from dat_ds.errors import DamagedImageError

if TYPE_CHECKING:
    from typing_extensions import Self

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

    def relabelled(self, labels: Tensor) -> TensorImages:
        """The same images with other labels."""
        return TensorImages(self.images, labels, self.img_size)


class StoredImages(Dataset[Sample], ABC):
    """Encoded images, decoded on demand as RGB; a subclass says where they lie.

    Args:
        labels: Integer labels, shape ``(N,)``.
        img_size: Side of the evaluation image: shorter edge to ``img_size / crop_share``, then the
            central square.
        key: Key of the config that named the images, for error texts.
        crop_share: Part of the shorter edge that the central square keeps, in (0, 1].
    """

    def __init__(
        self, labels: Tensor, img_size: int, key: str, crop_share: float = CROP_SHARE
    ) -> None:
        self.key = key
        self.labels = labels.to(torch.int64)
        self.img_size = img_size
        self.crop_share = crop_share
        self.image_shape: ImageShape = (3, img_size, img_size)

    @abstractmethod
    def decode(self, index: int) -> Tensor:
        """Whole image, as :func:`~dat_ds.data.decoding.read_image` gives it.

        Raises:
            DamagedImageError: It cannot be read as pixels.
        """

    @abstractmethod
    def file_of(self, index: int) -> str:
        """Where an image lies, in words."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """``(x, y)`` with ``x`` float32 of ``image_shape`` in [0, 1].

        Raises:
            DamagedImageError: It cannot be read as pixels.
        """
        image, y = self.raw(index)
        return self.fitted(image, index), y

    def fitted(self, image: Tensor, index: int) -> Tensor:
        """A whole image as the evaluation image: float32 of the side ``img_size``, in [0, 1].

        Args:
            image: ``(C, H, W)``, as :meth:`decode` gives it.
            index: Which it is, for messages.

        Raises:
            DamagedImageError: It is too long.
        """
        self._check_ratio(index, *image.shape[1:])
        return to_unit(resize_center_crop(image, self.img_size, self.crop_share)).clamp(0, 1)

    def raw(self, index: int) -> Sample:
        """Whole image, of its own size, and its label.

        Raises:
            DamagedImageError: It cannot be read as pixels.
        """
        return self.decode(index), int(self.labels[index])

    def relabelled(self, labels: Tensor) -> Self:
        """The same images with other labels."""
        other = copy.copy(self)
        other.labels = labels.to(torch.int64)
        return other

    def _check_ratio(self, index: int, height: int, width: int) -> None:
        """Refuse an image so long that resizing its shorter edge makes it huge."""
        shorter = self.img_size / self.crop_share
        scale = shorter / min(height, width)
        if height * width * scale**2 > LARGEST_IMAGE:
            raise DamagedImageError(
                f"{self.key}: the image {self.file_of(index)} has {height} x {width} pixels: "
                f"with a shorter edge of {round(shorter)} it would have "
                f"{max(height, width) * scale:.0f} along the other. Crop it, or remove it."
            )


class FolderImages(StoredImages):
    """Image files.

    Args:
        samples: ``(file, label)`` pairs.
        img_size: As :class:`StoredImages`.
        key: Key of the config that named the files, for error texts.
        crop_share: As :class:`StoredImages`.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        img_size: int,
        key: str = "dat.data.path",
        crop_share: float = CROP_SHARE,
    ) -> None:
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        super().__init__(labels, img_size, key, crop_share)
        self.files = [file for file, _ in samples]

    def decode(self, index: int) -> Tensor:
        """Whole image of a file."""
        return read_image(self.files[index], self.key)

    def file_of(self, index: int) -> str:
        """Path of a file."""
        return self.files[index]


Images = TensorImages | StoredImages
"""The images of a part of a dataset."""
