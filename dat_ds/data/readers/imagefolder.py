"""Folders of image files, one a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dat_ds.data.images import Channels, FolderImages
from dat_ds.data.method import FileDataset
from dat_ds.data.readers.source import EvaluationImages, Source
from dat_ds.errors import DataError

# The constants torchvision's and timm's ImageNet models are trained with.
_IMAGENET_STATISTICS: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _scan(folder: Path) -> Any:
    import torchvision

    try:
        return torchvision.datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"dat.data.path: no dataset in {folder} ({error}). "
            "Every class is a subfolder with at least one image file."
        ) from error


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
            (root / part for part in ("test", "val") if (root / part).is_dir()), root / "test"
        )
        missing = [str(part) for part in (root / "train", test) if not part.is_dir()]
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
        folder = next((root / part for part in ("test", "val") if (root / part).is_dir()), root)
        found = _scan(folder)
        images = FolderImages(found.samples, self.img_size or 224)
        return EvaluationImages(images, tuple(found.classes), len(found.classes))
