"""Folders of image files, one a class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dat_ds.data.images import Channels, FolderImages
from dat_ds.data.method import FileDataset
from dat_ds.data.readers.source import EvaluationImages, Source
from dat_ds.data.unlabelled import IMAGE_SUFFIXES, image_files
from dat_ds.errors import DataError

# The constants torchvision's and timm's ImageNet models are trained with.
_IMAGENET_STATISTICS: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _Classes:
    """A folder of classes: their names, and ``(file, label)`` pairs."""

    classes: list[str]
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
            f"dat.data.path: cannot read the folder {folder} ({error.strerror}). Mend its "
            "permissions."
        ) from None
    files = {name: image_files(folder / name, "dat.data.path") for name in names}
    empty = {name for name in names if not files[name]}
    if empty or not names:
        found = f"no image file in {_listed(empty)}" if empty else "it has no subfolder"
        raise DataError(
            f"dat.data.path: no dataset in {folder} ({found}). "
            "Every class is a subfolder with at least one image file "
            f"({', '.join(IMAGE_SUFFIXES)})."
        )
    samples = [(file, label) for label, name in enumerate(names) for file in files[name]]
    return _Classes(names, samples)


def _listed(names: set[str]) -> str:
    """Name at most five, so that a wrong ImageNet folder does not print a thousand."""
    shown = ", ".join(sorted(names)[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


@dataclass(frozen=True, kw_only=True)
class ImageFolder(FileDataset):
    """Folders of image files: ``train/<class>/*.jpg``, and ``test`` or else ``val``.

    By default of 224 pixels, aspect ratio kept.
    """

    name: ClassVar[str] = "imagefolder"

    def read(self, seed: int) -> Source:
        """The folders ``train`` and ``test`` or ``val``."""
        root = Path(str(self.path))
        test = next(
            (root / part for part in ("test", "val") if os.path.isdir(root / part)), root / "test"
        )
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
                f"in train: {_listed(names - test_names)}; only in {test.name}: "
                f"{_listed(test_names - names)}. Make the folder names the same."
            )
        data, test_data = (FolderImages(folder.samples, self.img_size or 224) for folder in folders)
        classes = tuple(folders[0].classes)
        return Source(data, test_data, _IMAGENET_STATISTICS, classes, num_classes=len(classes))

    def read_test(self, seed: int) -> EvaluationImages:
        """The folder ``test`` or ``val``, or the folder itself where it holds the classes."""
        root = Path(str(self.path))
        folder = next((root / part for part in ("test", "val") if os.path.isdir(root / part)), root)
        found = _scan(folder)
        images = FolderImages(found.samples, self.img_size or 224)
        return EvaluationImages(images, tuple(found.classes), len(found.classes))
