"""Folders of image files, one a class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dat_ds.data.images import FolderImages
from dat_ds.data.method import StoredDataset
from dat_ds.data.readers.classes import listed, read_class_map
from dat_ds.data.readers.source import IMAGENET_STATISTICS, Part, Source
from dat_ds.data.unlabelled import IMAGE_SUFFIXES, image_files
from dat_ds.errors import DataError

_TEST_PARTS = ("test", "val")


@dataclass(frozen=True)
class _Classes:
    """A folder of classes: their names, and ``(file, label)`` pairs."""

    classes: tuple[str, ...]
    samples: list[tuple[str, int]]


def _scan(folder: Path) -> _Classes:
    """The classes of a folder in the order of torchvision's ``ImageFolder``.

    Raises:
        DataError: Without a class, for a class without an image, and for folders that cannot be
            read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise DataError(
            f"dat.data.path: cannot read the folder {folder} ({error.strerror}). Correct its "
            "permissions."
        ) from None
    files = {name: image_files(folder / name, "dat.data.path") for name in names}
    empty = {name for name in names if not files[name]}
    if empty or not names:
        found = f"no image file in {listed(empty)}" if empty else "it has no subfolder"
        raise DataError(
            f"dat.data.path: no dataset in {folder} ({found}). "
            "Every class is a subfolder with at least one image file "
            f"({', '.join(IMAGE_SUFFIXES)})."
        )
    samples = [(file, label) for label, name in enumerate(names) for file in files[name]]
    return _Classes(tuple(names), samples)


@dataclass(frozen=True, kw_only=True)
class ImageFolder(StoredDataset):
    """Folders of image files: ``train/<class>/*.jpg``, and ``test`` or else ``val``.

    By default of 224 pixels, aspect ratio kept.
    """

    name: ClassVar[str] = "imagefolder"

    class_map: str | None = None
    """File that fixes the classes and their order: one name a line, or JSON. Default: the names of
    the folders, sorted."""

    def read(self, seed: int) -> Source:
        """The folders ``train`` and ``test`` or ``val``."""
        root = Path(str(self.path))
        test = _one_of(root, _TEST_PARTS) or root / "test"
        missing = [str(part) for part in (root / "train", test) if not os.path.isdir(part)]
        if missing:
            raise DataError(
                f"dat.data.path={str(root)!r} lacks the folders {', '.join(missing)}. "
                "Expected: train/<class>/*.jpg and test/<class>/*.jpg (or val in place of test)."
            )
        folders = [_scan(root / "train"), _scan(test)]
        names, test_names = (set(folder.classes) for folder in folders)
        if names != test_names:
            raise DataError(
                f"dat.data.path={str(root)!r}: the classes of train and {test.name} differ. Only "
                f"in train: {listed(names - test_names)}; only in {test.name}: "
                f"{listed(test_names - names)}. Make the folder names the same."
            )
        train, test_part = (self._part(folder) for folder in folders)
        classes = train.class_names
        assert classes is not None
        if lacking := set(classes) - names:
            raise DataError(
                f"dat.data.class_map={self.class_map!r} names classes without a folder in "
                f"{root / 'train'}: {listed(lacking)}. Add their images, or remove their names."
            )
        return Source(
            train.images, test_part.images, IMAGENET_STATISTICS, classes, num_classes=len(classes)
        )

    def read_train(self, seed: int) -> Part:
        """The folder ``train``, or the folder itself where it holds the classes."""
        root = Path(str(self.path))
        return self._part(_scan(_one_of(root, ("train",)) or root))

    def read_test(self, seed: int) -> Part:
        """The folder ``test`` or ``val``, or the folder itself where it holds the classes."""
        root = Path(str(self.path))
        return self._part(_scan(_one_of(root, _TEST_PARTS) or root))

    def _part(self, found: _Classes) -> Part:
        """The images of a folder, with the labels of the class map where there is one.

        Raises:
            DataError: For a class that the map does not name.
        """
        names, samples = found.classes, found.samples
        if self.class_map is not None:
            names = read_class_map(self.class_map)
            if strange := set(found.classes) - set(names):
                raise DataError(
                    f"dat.data.class_map={self.class_map!r} lacks the classes {listed(strange)} of "
                    f"{self.path}: add their names, or remove their folders."
                )
            place = {name: label for label, name in enumerate(names)}
            samples = [(file, place[found.classes[label]]) for file, label in samples]
        images = FolderImages(samples, self.side, crop_share=self.crop_share)
        return Part(images, names, len(names))


def _one_of(root: Path, parts: tuple[str, ...]) -> Path | None:
    """The first of some folders that is there."""
    return next((root / part for part in parts if os.path.isdir(root / part)), None)
