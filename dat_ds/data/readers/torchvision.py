"""Datasets by their names in torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dat_ds.data.readers.library import LibraryDataset
from dat_ds.data.readers.source import Part
from dat_ds.errors import DataError

_ARRAYS = {
    *("cifar10", "cifar100", "mnist", "kmnist", "fashionmnist", "qmnist", "emnist"),
    *("svhn", "stl10", "usps"),
}
_OWN = ("root", "train", "transform", "transforms", "target_transform", "download", "loader")
# These choose another part than dat.data.train_split says, or other labels than are read.
_UNREAD = ("what", "target_types")


@dataclass(frozen=True, kw_only=True)
class Torchvision(LibraryDataset):
    """A dataset of ``torchvision.datasets`` with a class for each image, such as ``SVHN``.

    Labels are read without decoding images, and images are decoded as other files are.
    """

    name: ClassVar[str] = "torchvision"

    dataset: str = ""
    """Name of the class there, such as ``SVHN``, ``Food101`` or ``OxfordIIITPet``."""
    train_split: str = "train"
    """The class's ``split`` of the training part; not read by one that has ``train=True``."""
    test_split: str = "test"
    """The class's ``split`` of the test part, likewise."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class, such as ``{"split": "balanced"}`` of EMNIST."""

    @property
    def keeps_ratio(self) -> bool:
        """Whether it holds images of any size; arrays are resized whole."""
        return self.dataset.lower() not in _ARRAYS

    def problems(self) -> Iterator[str]:
        """No name; arguments that other keys give."""
        yield from super().problems()
        if not self.dataset:
            yield "dataset is missing: 'torchvision' needs the name of a class, such as 'SVHN'."
        for key in sorted(set(_OWN) & set(self.options)):
            yield f"options.{key} is not allowed: it is given by other keys of dat.data."
        for key in sorted(set(_UNREAD) & set(self.options)):
            yield f"options.{key} is not allowed: parts and labels are those of the class itself."

    def _part(self, split: str, *, is_train: bool) -> Part:
        found = self._open(split, is_train=is_train)
        images, names = self._of_torchvision(found)
        if len(images) == 0:
            raise DataError(f"{self._where}: the part {split!r} has no image.")
        return Part(images, names, 0 if names is None else len(names))

    def _open(self, split: str, *, is_train: bool) -> Any:
        """The dataset of a part, as torchvision makes it.

        Raises:
            DataError: torchvision cannot make it.
        """
        from torchvision import datasets

        kind = next(
            (
                getattr(datasets, name)
                for name in datasets.__all__
                if name.lower() == self.dataset.lower()
            ),
            None,
        )
        if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
            raise DataError(
                f"dat.data.dataset={self.dataset!r} is not a dataset of torchvision: write the "
                "name of a class in torchvision.datasets, such as 'SVHN'."
            )
        known = inspect.signature(kind).parameters
        arguments: dict[str, Any] = dict(self.options)
        if "train" in known or issubclass(kind, datasets.MNIST):  # EMNIST hands it on
            arguments["train"] = is_train
        elif "split" in known:
            if "split" in arguments:
                raise DataError(
                    f"dat.data.options.split={arguments['split']!r} of {self.dataset!r} is "
                    "dat.data.train_split and dat.data.test_split: write these, and remove it."
                )
            arguments["split"] = split
        else:
            raise DataError(
                f"dat.data.dataset={self.dataset!r} has no training and test part in torchvision: "
                "divide its images into two folders, and read them by dat.data.name='imagefolder'."
            )
        if self.download and ("download" in known or issubclass(kind, datasets.MNIST)):
            arguments["download"] = True
        try:
            return kind(self.path, **arguments)
        # The datasets raise errors of every class for files that are missing or damaged.
        except Exception as error:
            raise self._unopened("torchvision", split, error) from error
