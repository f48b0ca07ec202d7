"""Datasets of the Hugging Face library: its hub, local folders, parquet, arrow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dat_ds.data.method import StoredDataset
from dat_ds.data.readers.classes import listed, read_class_map
from dat_ds.data.readers.source import IMAGENET_STATISTICS, Part, Source, raise_all
from dat_ds.data.rows import RowImages
from dat_ds.errors import DataError

_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
_TRAIN_SPLITS = ("train", "training")


def import_datasets(needs: str) -> Any:
    """The library ``datasets``.

    Args:
        needs: The key and value that needs it.

    Raises:
        DataError: It is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{needs} needs the package 'datasets': pip install 'dat-ds[data]'."
        ) from None
    return datasets


@contextlib.contextmanager
def hub(is_allowed: bool) -> Iterator[None]:
    """Inside, the hub is asked for nothing unless that is allowed."""
    if is_allowed:
        yield
        return
    import huggingface_hub

    # What the environment variable of this name was when these modules were imported.
    holders: list[Any] = [huggingface_hub.constants]
    with contextlib.suppress(ImportError):
        import datasets

        holders.append(datasets.config)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


@dataclass(frozen=True, kw_only=True)
class HuggingFace(StoredDataset):
    """Datasets of the Hugging Face library: its hub, folders, parquet, arrow, webdataset.

    Images are decoded as files are, not by the library.
    """

    name: ClassVar[str] = "huggingface"
    required: ClassVar[Mapping[str, str]] = {
        "path": "a folder, a dataset of the hub, or a format such as 'parquet' with train_files"
    }

    config_name: str | None = None
    """Configuration of a dataset of the hub, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a dataset of the hub."""
    train_files: str | None = None
    """Files of the training split, in the format that ``path`` names (``parquet``, ``arrow``,
    ``imagefolder``, ``webdataset``): a path, with ``*`` and ``**``."""
    test_files: str | None = None
    """Files of the test split, as in ``train_files``."""
    train_split: str | None = None
    """Name of the training split, or a slice such as ``train[:90%]``. Default: ``train``, or the
    only one."""
    test_split: str | None = None
    """Name of the test split. Default: ``test``, or else ``validation``."""
    image_column: str | None = None
    """Column of the images. Default: the only one."""
    label_column: str | None = None
    """Column of the labels. Default: the only one of class labels, or else of integers."""
    class_map: str | None = None
    """File that fixes the classes and their order: one name a line, or JSON. Default: the names
    of the data."""
    download: bool = False
    """Whether files may be fetched from the hub; else they have to be on this machine."""
    streaming: bool = False
    """Refused: a run reads by index. Streams are given from Python, to ``dat_ds.initialize``."""

    def problems(self) -> Iterator[str]:
        """Streaming, which a run from a config has no use for."""
        yield from super().problems()
        if self.streaming:
            yield (
                "streaming=true: a run from a config reads images by index, for epochs, exact "
                "resume and validation. Write false, or pass load_dataset(..., streaming=True)"
                ".shuffle(seed=0, buffer_size=1000) to dat_ds.initialize as training_data, with "
                "dat.schedule.max_steps (docs/data.md, Streamed datasets of Hugging Face)."
            )

    def read(self, seed: int) -> Source:
        """Both splits."""
        splits = self._load()
        train = self._part(splits, self._train_name(splits))
        test = self._part(splits, self._test_name(splits))
        if train.class_names != test.class_names:
            raise DataError(
                f"{self._where}: the parts name different classes: "
                f"{listed(train.class_names or ())} and {listed(test.class_names or ())}. Write "
                "dat.data.class_map."
            )
        return Source(
            train.images, test.images, IMAGENET_STATISTICS, train.class_names, train.num_classes
        )

    def read_train(self, seed: int) -> Part:
        """The training split, or the only one."""
        splits = self._load()
        return self._part(splits, self._train_name(splits))

    def read_test(self, seed: int) -> Part:
        """The test split, or the only one."""
        splits = self._load()
        only = self.test_split is None and len(splits) == 1
        return self._part(splits, next(iter(splits)) if only else self._test_name(splits))

    @property
    def _where(self) -> str:
        return f"dat.data.path={self.path!r}"

    def _arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``load_dataset``."""
        files = {"train": self.train_files, "test": self.test_files}
        given = {part: file for part, file in files.items() if file is not None}
        values = {"name": self.config_name, "revision": self.revision, "data_files": given}
        return {key: value for key, value in values.items() if value}

    def _load(self, split: str | None = None) -> Any:
        """The dataset, as a dict of splits; or one split.

        Raises:
            DataError: It cannot be loaded.
        """
        datasets = import_datasets("dat.data.name='huggingface'")
        try:
            with hub(self.download), _quiet(datasets):
                if _is_saved(str(self.path)):
                    found = datasets.load_from_disk(str(self.path))
                    if isinstance(found, datasets.Dataset):
                        found = datasets.DatasetDict({"train": found})
                    return found if split is None else found[split]
                return datasets.load_dataset(str(self.path), split=split, **self._arguments())
        # The library raises errors of every class, of its own and of those that it stands on.
        except Exception as error:
            reason = " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
            remedy = (
                "Correct the path or the files."
                if self.download or os.path.exists(str(self.path))
                else "If it is a dataset of the hub, write dat.data.download=true to fetch it."
            )
            raise DataError(f"{self._where} cannot be loaded ({reason}). {remedy}") from error

    def _train_name(self, splits: Any) -> str:
        if self.train_split is not None:
            return self.train_split
        for name in _TRAIN_SPLITS:
            if name in splits:
                return name
        if len(splits) == 1:
            return str(next(iter(splits)))
        raise DataError(
            f"{self._where} has the splits {', '.join(splits)}: write dat.data.train_split."
        )

    def _test_name(self, splits: Any) -> str:
        if self.test_split is not None:
            return self.test_split
        for name in _TEST_SPLITS:
            if name in splits:
                return name
        raise DataError(
            f"{self._where} has the splits {', '.join(splits)}: write dat.data.test_split. A test "
            "part is needed; to cut it out of the training part, write "
            "dat.data.train_split='train[:90%]' and dat.data.test_split='train[90%:]'."
        )

    def _part(self, splits: Any, name: str) -> Part:
        """Images and labels of a split.

        Raises:
            DataError: There is no such split, or its columns cannot be told.
        """
        datasets = import_datasets("dat.data.name='huggingface'")
        if name in splits:
            rows = splits[name]
        elif "[" in name or "+" in name:
            rows = self._load(name)
        else:
            raise DataError(
                f"{self._where} has no split {name!r}, but {', '.join(splits)}. Write one of them."
            )
        image, label = self._columns(rows, datasets)
        with _quiet(datasets):
            try:
                rows = rows.cast_column(image, datasets.Image(decode=False))
            except Exception as error:
                raise DataError(
                    f"dat.data.image_column={image!r} of {self.path} holds no images but "
                    f"{rows.features[image]}. {_columns_of(rows)}"
                ) from error
        labels, names = self._labels(rows, label)
        images = RowImages(
            rows, image, f"{self.path}:{name}", labels, self.side, "dat.data.path", self.crop_share
        )
        return Part(images, names, 0 if names is None else len(names))

    def _columns(self, rows: Any, datasets: Any) -> tuple[str, str]:
        """Names of the columns of images and labels.

        Raises:
            DataError: They are not there, or there are several.
        """
        features = rows.features
        images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
        labels = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
        labels = labels or [
            name for name, f in features.items() if "int" in str(getattr(f, "dtype", ""))
        ]
        problems = []
        chosen = []
        for key, given, found, kind in (
            ("image_column", self.image_column, images, "images"),
            ("label_column", self.label_column, labels, "class labels or integers"),
        ):
            if given is not None and given not in features:
                problems.append(f"dat.data.{key}={given!r} is not a column of {self.path}.")
            elif given is None and len(found) != 1:
                words = f"the columns {', '.join(found)}" if found else "no column"
                problems.append(
                    f"{self._where} has {words} of {kind}: write dat.data.{key}, one of "
                    "its columns."
                )
            else:
                chosen.append(given or found[0])
        raise_all([*problems, _columns_of(rows)] if problems else [])
        image, label = chosen
        return image, label

    def _labels(self, rows: Any, column: str) -> tuple[Tensor, tuple[str, ...] | None]:
        """Labels, and names of the classes where they are known.

        Raises:
            DataError: They are neither integers nor names of the class map.
        """
        feature = rows.features[column]
        own = getattr(feature, "names", None)
        names = None if own is None else tuple(own)
        wanted = names if self.class_map is None else read_class_map(self.class_map)
        values: Any = np.asarray(rows.select_columns([column]).with_format("numpy")[:][column])
        where = f"dat.data.label_column={column!r} of {self.path}"
        if values.dtype.kind not in "iu" and (wanted is None or values.dtype.kind not in "UO"):
            raise DataError(
                f"{where} holds {feature}, some of it missing perhaps: labels are integers, or "
                "names in dat.data.class_map, a file with one a line. " + _columns_of(rows)
            )
        if values.dtype.kind in "iu" and (names is None or names == wanted):
            if wanted is not None and len(values) and values.max() >= len(wanted):
                raise DataError(
                    f"{where} runs to {values.max()}, but there are {len(wanted)} names of classes."
                )
            return torch.from_numpy(values.astype(np.int64)), wanted
        assert wanted is not None
        place = {name: label for label, name in enumerate(wanted)}
        if values.dtype.kind in "iu":
            assert names is not None
            found = [names[v] if 0 <= v < len(names) else f"(label {v})" for v in values.tolist()]
        else:
            found = [str(value) for value in values.tolist()]
        if strange := set(found) - set(wanted):
            raise DataError(
                f"dat.data.class_map={self.class_map!r} lacks the classes {listed(strange)} of "
                f"{where}: add their names."
            )
        return torch.tensor([place[name] for name in found]), wanted


def _columns_of(rows: Any) -> str:
    kinds = ((name, type(f).__name__, f) for name, f in rows.features.items())
    words = (f"{name} ({f.dtype if kind == 'Value' else kind})" for name, kind, f in kinds)
    return f"Its columns: {', '.join(words)}."


def _is_saved(path: str) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any(os.path.isfile(os.path.join(path, n)) for n in ("dataset_dict.json", "state.json"))


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Inside, the library shows no progress bars: every rank would."""
    was = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was:
            datasets.enable_progress_bars()
