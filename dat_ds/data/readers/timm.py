"""Datasets by their names in timm."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dat_ds.data.images import FolderImages, Images
from dat_ds.data.readers.classes import listed, read_class_map
from dat_ds.data.readers.huggingface import hub, import_datasets
from dat_ds.data.readers.library import PATH_KEY, LibraryDataset
from dat_ds.data.readers.source import Part
from dat_ds.data.rows import RowImages
from dat_ds.data.tars import Member, Shard, TarImages
from dat_ds.errors import DataError

_STREAMS = {
    "wds": "write dat.data.name='webdataset', which reads such shards in any order",
    "hfids": "write dat.data.name='huggingface', or dat.data.dataset='hfds/...'",
    "tfds": "write the images into an npz file, a folder or webdataset's shards",
}
_ARRAYS = {
    f"torch/{n}" for n in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
}


@dataclass(frozen=True, kw_only=True)
class Timm(LibraryDataset):
    """What ``timm.data.create_dataset`` names: folders, tars, ``torch/...`` and ``hfds/...``.

    Labels are read without decoding images, and images are decoded as other files are.
    """

    name: ClassVar[str] = "timm"
    required: ClassVar[Mapping[str, str]] = {}

    dataset: str = ""
    """timm's name, such as ``torch/fashion_mnist`` or ``hfds/user/data``; empty for folders and tar
    files of images."""
    train_split: str = "train"
    """Name of the training split; for folders and tar files, the subfolder of ``path``."""
    test_split: str = "validation"
    """Name of the test split, likewise; timm takes ``val``, ``valid``, ``eval`` and
    ``evaluation`` for the same."""
    class_map: str | None = None
    """File that fixes the classes and their order, of folders and tar files: one name a line, or
    JSON."""

    @property
    def prefix(self) -> str:
        """Kind of the dataset in timm; empty for folders and tar files."""
        first, slash, _ = self.dataset.partition("/")
        return first.lower() if slash else ""

    @property
    def keeps_ratio(self) -> bool:
        """Whether it holds images of any size; torchvision's arrays are resized whole."""
        return self.dataset.lower() not in _ARRAYS

    def problems(self) -> Iterator[str]:
        """A path that is missing; streams; a class map of what has its own classes."""
        yield from super().problems()
        if self.path is None and self.prefix != "hfds":
            yield ("path is missing: 'timm' needs the folder of the dataset, timm's root.")
        if self.prefix in _STREAMS:
            yield (
                f"dataset={self.dataset!r} can only be read from its beginning on in timm: "
                f"{_STREAMS[self.prefix]}."
            )
        if self.class_map is not None and self.prefix:
            yield (
                f"class_map={self.class_map!r} is for folders and tar files; {self.dataset!r} has "
                "classes of its own: remove it."
            )

    def _part(self, split: str, *, is_train: bool) -> Part:
        names = None if self.class_map is None else read_class_map(self.class_map)
        found = self._create(split, names)
        if getattr(found, "train", is_train) != is_train:
            key = "train_split" if is_train else "test_split"
            raise DataError(
                f"dat.data.{key}={split!r} is the {'test' if is_train else 'training'} part of "
                f"{self.dataset!r} in timm: write {'train' if is_train else 'validation'!r}."
            )
        reader = getattr(found, "reader", None)
        images, own = (
            self._of_torchvision(found) if reader is None else self._of_reader(reader, split)
        )
        if len(images) == 0:
            raise DataError(f"{self._where}: the part {split!r} has no image.")
        names = names or own
        if names is not None and not self.prefix:
            empty = set(range(len(names))) - set(images.labels.tolist())
            if empty:
                raise DataError(
                    f"{self._where}: no image in the part {split!r} of the classes "
                    f"{listed(names[i] for i in empty)}. Add images, or remove the classes."
                )
        return Part(images, names, 0 if names is None else len(names))

    def _create(self, split: str, names: tuple[str, ...] | None) -> Any:
        """The dataset of a part, as timm makes it.

        Raises:
            DataError: timm cannot make it.
        """
        from timm.data import create_dataset

        if self.prefix == "hfds":
            import_datasets(f"dat.data.dataset={self.dataset!r}")
        options: dict[str, Any] = {"download": self.download}
        if not self.prefix:
            self._refuse_whole(split)
            options = {}
            if names is not None:
                options["class_map"] = {name: label for label, name in enumerate(names)}
        elif self.prefix == "hfds":
            options = {}
        try:
            with hub(self.download):
                return create_dataset(self.dataset, root=self.path, split=split, **options)
        # timm asserts, and the libraries under it raise errors of every class.
        except Exception as error:
            raise self._unopened("timm", split, error, can_fetch=bool(self.prefix)) from error

    def _refuse_whole(self, split: str) -> None:
        """Refuse a folder without the part, of which timm would take all images.

        Raises:
            DataError: With the folders that there are.
        """
        from timm.data.dataset_factory import _search_split

        root = str(self.path)
        if os.path.isdir(root) and _search_split(root, split) == root:
            inside = sorted(os.listdir(root))
            raise DataError(
                f"dat.data.path={root!r} has no part {split!r}, but {listed(inside)}: write "
                "dat.data.train_split and dat.data.test_split, folders or .tar files in it."
            )
        if not os.path.isdir(root):
            raise DataError(
                f"dat.data.path={root!r} is not a folder: name the one that holds the parts, and "
                "these, folders or .tar files, with dat.data.train_split and dat.data.test_split."
            )

    def _of_reader(self, reader: Any, split: str) -> tuple[Images, tuple[str, ...] | None]:
        """Images and names of classes of a reader of timm."""
        from timm.data.readers.reader_image_folder import ReaderImageFolder
        from timm.data.readers.reader_image_in_tar import ReaderImageInTar

        is_tar = isinstance(reader, ReaderImageInTar)
        classes = reader.class_name_to_idx if is_tar else reader.class_to_idx
        names = tuple(sorted(classes, key=classes.__getitem__)) or None
        if isinstance(reader, ReaderImageFolder):
            pairs = [(str(file), int(label)) for file, label in reader.samples]
            return FolderImages(pairs, self.side, PATH_KEY, self.crop_share), names
        if is_tar:
            return self._of_tar(reader), names
        labels = torch.tensor(list(reader.iter_targets()))
        rows = RowImages(
            reader.dataset,
            reader.image_key,
            f"{self.dataset}:{split}",
            labels,
            self.side,
            "dat.data.dataset",
            self.crop_share,
        )
        return rows, names

    def _of_tar(self, reader: Any) -> TarImages:
        """Images at their places, since timm keeps files open, which workers would share."""
        files = [
            os.path.join(reader.root, parent) if parent else str(reader.root)
            for _, parent, _ in reader.samples
        ]
        shards = {file: number for number, file in enumerate(dict.fromkeys(files))}
        members = [
            Member(found.name, found.offset_data + (inner.offset_data if inner else 0), found.size)
            for found, _, inner in reader.samples
        ]
        return TarImages(
            [Shard.of(file, PATH_KEY) for file in shards],
            [shards[file] for file in files],
            members,
            torch.as_tensor(reader.targets),
            self.side,
            PATH_KEY,
            self.crop_share,
        )
