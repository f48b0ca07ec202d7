"""Labelled and unlabelled images in one dataset.

A label says what is known: the class ``c`` from 0 on; ``UNLABELLED``; or a pseudo-label, a class
that a model gave, written ``pseudo_label(c)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.contracts import UNLABELLED, pseudo_label
from dat_ds.data.transforms import Sample, fetch_raw, file_of

# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class PartlyLabelled(Dataset[Sample]):
    """The images of a labelled dataset, several times over, and then those of an unlabelled one.

    Args:
        labelled: Yields ``(x, y)``.
        unlabelled: Yields ``(x, y)``; its labels are not read.
        repeats: How often each labelled image occurs.
    """

    def __init__(self, labelled: Dataset[Any], unlabelled: Dataset[Any], repeats: int) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.num_labelled = len(cast(Any, labelled)) * repeats
        self.num_unlabelled = len(cast(Any, unlabelled))
        self._labels = torch.full((self.num_unlabelled,), UNLABELLED)

    def label(self, classes: Tensor) -> None:
        """Give the unlabelled images pseudo-labels, class indices in their order."""
        if len(classes) != self.num_unlabelled:
            raise ValueError(f"{len(classes)} pseudo-labels for {self.num_unlabelled} images.")
        self._labels = pseudo_label(classes)

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


def image_files(folder: Path) -> list[str]:
    """Every image file under ``folder``, sorted."""
    return sorted(
        str(f) for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.is_dir()
    )
