"""Labelled and unlabelled images in one dataset.

A label says what is known: the class ``c`` from 0 on; ``UNLABELLED``; or a pseudo-label, a class
that a model gave, written ``pseudo_label(c)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dat_ds.contracts import UNLABELLED, pseudo_label
from dat_ds.data.sampler import FixedShare
from dat_ds.data.transforms import Sample, fetch_raw, file_of
from dat_ds.errors import DataError

# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class PartlyLabelled(Dataset[Sample]):
    """The images of a labelled dataset, several times over, and then those of an unlabelled one.

    Args:
        labelled: Yields ``(x, y)``.
        unlabelled: Yields ``(x, y)``; its labels are not read.
        repeats: How often each labelled image occurs in an epoch.
        fraction: Share of the unlabelled images in every global batch, which makes an epoch one
            pass over the labelled ones; None makes it one over all.
    """

    def __init__(
        self,
        labelled: Dataset[Any],
        unlabelled: Dataset[Any],
        repeats: int,
        fraction: float | None = None,
    ) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.num_labelled = len(cast(Any, labelled)) * repeats
        self.num_unlabelled = len(cast(Any, unlabelled))
        self._labels = torch.full((self.num_unlabelled,), UNLABELLED)
        self._fraction = fraction

    @property
    def further(self) -> tuple[FixedShare, ...]:
        """The unlabelled images, where they have a share of every batch."""
        if self._fraction is None:
            return ()
        key = "dat.data.unlabelled_batch_fraction"
        return (FixedShare(self.num_unlabelled, self._fraction, key),)

    def label(self, classes: Tensor, keeps: Tensor | None = None) -> None:
        """Give the unlabelled images pseudo-labels.

        Args:
            classes: Class indices in their order.
            keeps: Which of them stay, bool; the others are left out. None: all.
        """
        if len(classes) != self.num_unlabelled:
            raise ValueError(f"{len(classes)} pseudo-labels for {self.num_unlabelled} images.")
        self._labels = pseudo_label(classes)
        if keeps is not None:
            self.unlabelled = Subset(self.unlabelled, keeps.nonzero().flatten().tolist())
            self._labels = self._labels[keeps]
            self.num_unlabelled = len(self._labels)

    def __len__(self) -> int:
        """Number of samples, repeats counted."""
        return self.num_labelled + self.num_unlabelled

    def __getitem__(self, index: int) -> Sample:
        """``(x, y)``: ``x`` float32 CHW in [0, 1], ``y`` an int as this module says."""
        if index < self.num_labelled:
            sample: Sample = self.labelled[index % len(cast(Any, self.labelled))]
            return sample
        position = index - self.num_labelled
        return self.unlabelled[position][0], int(self._labels[position])

    def raw(self, index: int) -> Sample:
        """Stored image before any resizing, and its label."""
        if index < self.num_labelled:
            return fetch_raw(self.labelled, index % len(cast(Any, self.labelled)))
        position = index - self.num_labelled
        return fetch_raw(self.unlabelled, position)[0], int(self._labels[position])

    def file_of(self, index: int) -> str | None:
        """File of an image."""
        if index < self.num_labelled:
            return file_of(self.labelled, index % len(cast(Any, self.labelled)))
        return file_of(self.unlabelled, index - self.num_labelled)


def image_files(folder: Path, key: str) -> list[str]:
    """Every image file under a folder, also through symbolic links, in the order of torchvision.

    Args:
        folder: Where to look.
        key: Key of the config that named it, for messages.

    Raises:
        DataError: A folder cannot be read, which would leave out its images in silence, or is
            linked to from inside itself, which has no end.
    """
    found = []
    try:
        for place, _, names in sorted(_walk(str(folder), key)):
            found += [
                os.path.join(place, name)
                for name in sorted(names)
                if name.lower().endswith(IMAGE_SUFFIXES)
            ]
    except OSError as error:
        raise DataError(
            f"{key}: cannot read the folder {error.filename} ({error.strerror}). Correct its "
            "permissions, or remove it."
        ) from None
    return found


def _walk(folder: str, key: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` through links, which raises what that passes over."""

    def fail(error: OSError) -> None:
        raise error

    above: dict[str, tuple[tuple[int, int], ...]] = {folder: (_identity(folder),)}
    for place, inside, names in os.walk(folder, followlinks=True, onerror=fail):
        for name in inside:
            below = os.path.join(place, name)
            identity = _identity(below)
            if identity in above[place]:
                raise DataError(
                    f"{key}: the symbolic link {below} leads to a folder that it lies in itself: "
                    "remove it."
                )
            above[below] = (*above[place], identity)
        yield place, inside, names


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
