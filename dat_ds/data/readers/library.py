"""Base of the readers that open a dataset by its name in a library."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dat_ds.data.images import FolderImages, Images, TensorImages
from dat_ds.data.method import StoredDataset
from dat_ds.data.readers.classes import listed
from dat_ds.data.readers.source import IMAGENET_STATISTICS, Part, Source, measure_channels
from dat_ds.errors import DataError

PATH_KEY = "dat.data.path"
_CHANNELS = (1, 3, 4)
# Where torchvision's datasets keep pairs of files and labels, or one list of each.
_PAIRS = ("samples", "imgs", "_samples")
_LISTS = (("_image_files", "_labels"), ("_images", "_labels"), ("data", "targets"))
_ARRAYS = (("data", "targets"), ("data", "labels"))


@dataclass(frozen=True, kw_only=True)
class LibraryDataset(StoredDataset):
    """What a library opens by a name; a subclass opens a part of it."""

    dataset: str = ""
    """Its name in the library."""
    train_split: str = "train"
    """Name of the training split."""
    test_split: str = "test"
    """Name of the test split."""
    download: bool = False
    """Whether files may be fetched; else they have to be on this machine."""

    @abstractmethod
    def _part(self, split: str, *, is_train: bool) -> Part:
        """A part.

        Raises:
            DataError: The library cannot open it, or it holds nothing that can be read.
        """

    def problems(self) -> Iterator[str]:
        """Two parts that are the same."""
        yield from super().problems()
        if self.train_split == self.test_split:
            yield (
                f"test_split={self.test_split!r} is also dat.data.train_split: write another part."
            )

    def read(self, seed: int) -> Source:
        """Both parts."""
        train, test = self.read_train(seed), self.read_test(seed)
        self._refuse_overlap(train.images, test.images)
        if train.class_names != test.class_names:
            names, others = set(train.class_names or ()), set(test.class_names or ())
            raise DataError(
                f"{self._where}: the classes of the parts differ. Only in {self.train_split}: "
                f"{listed(names - others)}; only in {self.test_split}: {listed(others - names)}. "
                "Make them the same."
            )
        statistics = IMAGENET_STATISTICS
        if isinstance(train.images, TensorImages):
            statistics = measure_channels(train.images.images)
        return Source(train.images, test.images, statistics, train.class_names, train.num_classes)

    def read_train(self, seed: int) -> Part:
        """The training part."""
        return self._part(self.train_split, is_train=True)

    def read_test(self, seed: int) -> Part:
        """The test part."""
        return self._part(self.test_split, is_train=False)

    @property
    def _where(self) -> str:
        return f"dat.data.dataset={self.dataset!r}, dat.data.path={self.path!r}"

    def _unopened(
        self, library: str, split: str, error: Exception, *, can_fetch: bool = True
    ) -> DataError:
        """What to raise for a part that a library cannot open."""
        reason = " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
        fetches = can_fetch and not self.download
        remedy = ", or write dat.data.download=true to fetch its files" if fetches else ""
        return DataError(
            f"{self._where}: {library} cannot open the part {split!r} ({reason}). Correct the "
            f"name, the path or the part{remedy}."
        )

    def _of_torchvision(self, found: Any) -> tuple[Images, tuple[str, ...] | None]:
        """Images and names of classes of a dataset of torchvision, without decoding images.

        Raises:
            DataError: It holds neither files nor arrays with a class for each image.
        """
        names = tuple(
            name if isinstance(name, str) else ", ".join(name)
            for name in getattr(found, "classes", ())
        )
        if hasattr(found, "all_categories"):  # INaturalist
            names = tuple(found.all_categories)
            pairs: Any = [
                (os.path.join(found.root, names[label], file), label) for label, file in found.index
            ]
        else:
            pairs = _pairs_of(found)
        if pairs is not None:
            if any(label is None for _, label in pairs):
                raise DataError(
                    f"{self._where}: a part has images without a class. Write another one into "
                    "dat.data.train_split or dat.data.test_split."
                )
            samples = [(str(file), int(label)) for file, label in pairs]
            return FolderImages(samples, self.side, PATH_KEY, self.crop_share), names or None
        arrays = next((pair for pair in _ARRAYS if all(hasattr(found, key) for key in pair)), None)
        if arrays is None:
            raise DataError(
                f"{self._where}: {type(found).__name__} of torchvision tells neither files nor "
                "arrays of its images, each with a class. Write them into an npz file or a folder."
            )
        images, labels = (torch.as_tensor(getattr(found, key)) for key in arrays)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] in _CHANNELS:
            images = images.permute(0, 3, 1, 2)
        labels = labels[:, 0] if labels.ndim == 2 else labels  # of QMNIST with its other facts
        return TensorImages(images.contiguous(), labels, self.img_size), names or None

    def _refuse_overlap(self, train: Images, test: Images) -> None:
        """Refuse parts with an image in common, which libraries give where they find no part.

        Raises:
            DataError: With one of the images.
        """
        if isinstance(train, TensorImages) and isinstance(test, TensorImages):
            if torch.equal(train.images, test.images):
                raise DataError(
                    f"{self._where}: both parts are the same images. Write other parts."
                )
        elif isinstance(train, FolderImages) and isinstance(test, FolderImages):
            both = set(train.files).intersection(test.files)
            if both:
                raise DataError(
                    f"{self._where}: the parts {self.train_split!r} and {self.test_split!r} have "
                    f"{len(both)} images in common, such as {min(both)}. Write other parts."
                )


def _pairs_of(found: Any) -> Sequence[tuple[Any, Any]] | None:
    """Files and labels of a dataset of torchvision; None where it is made otherwise."""
    pairs: Any = next((getattr(found, key) for key in _PAIRS if getattr(found, key, None)), None)
    if pairs is None:
        lists = next((pair for pair in _LISTS if all(hasattr(found, key) for key in pair)), None)
        if lists is None:
            return None
        files, labels = (getattr(found, key) for key in lists)
        if not isinstance(files, Sequence):  # an array
            return None
        pairs = list(zip(files, [None] * len(files) if labels is None else labels, strict=True))
    holds_files = all(len(pair) == 2 and isinstance(pair[0], str | Path) for pair in pairs)
    return pairs if holds_files else None
