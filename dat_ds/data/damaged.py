"""Damaged images that are replaced by the next readable one, and the list of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset

from dat_ds.data.transforms import Sample, fetch_raw, file_of
from dat_ds.errors import DamagedImageError, DataError
from dat_ds.files import replace_text

DAMAGED = "damaged.txt"
_MOST_IN_A_ROW = 100
_FOUND: ContextVar[dict[str, str] | None] = ContextVar("_FOUND", default=None)


@contextlib.contextmanager
def collected_damage() -> Iterator[dict[str, str]]:
    """Collect what :class:`Readable` datasets replace inside: the reason, by image."""
    found: dict[str, str] = {}
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def write_damaged(path: Path, damaged: Mapping[str, str]) -> None:
    """Write the list of damaged images, a line for each.

    Args:
        path: The file.
        damaged: The reason, by image.
    """
    lines = (" ".join(words.split()) for words in damaged.values())
    replace_text(path, "".join(f"{line}\n" for line in lines))


def too_many_damaged(
    damaged: Mapping[str, str], size: int, most: float, listed_in: Path
) -> DataError | None:
    """What to raise where more images are damaged than a run allows; else None.

    Args:
        damaged: The reason, by image.
        size: Number of all images.
        most: ``dat.data.most_damaged``.
        listed_in: File that lists them.
    """
    allowed = math.floor(most * size if most < 1 else most)
    if len(damaged) <= allowed:
        return None
    return DataError(
        f"{len(damaged)} damaged training images were met, and dat.data.most_damaged={most:g} "
        f"allows {allowed} of {size}: they are listed in {listed_in}. Replace them, or raise "
        "dat.data.most_damaged. Do not remove them: to go on, the data have to be the same."
    )


class Readable(Dataset[Sample]):
    """Images of which a damaged one is replaced by the next readable one of the dataset.

    What stands for an index is a function of the index and the files alone: the same on every rank,
    in every process, and after a resume.

    Args:
        dataset: Map-style dataset of ``(x, y)`` that raises :class:`DamagedImageError`.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of images, damaged ones too."""
        return len(cast(Any, self.dataset))

    def __getitem__(self, index: int) -> Sample:
        """``(x, y)`` of the image, or of the next readable one."""
        return self._first_readable(index, self.dataset.__getitem__)

    def raw(self, index: int) -> Sample:
        """Stored image before any resizing, and its label, likewise."""
        return self._first_readable(index, lambda place: fetch_raw(self.dataset, place))

    def file_of(self, index: int) -> str | None:
        """File of the image of that index, damaged or not."""
        return file_of(self.dataset, index)

    def _first_readable(self, index: int, read: Callable[[int], Sample]) -> Sample:
        tries = min(len(self), _MOST_IN_A_ROW)
        for step in range(tries):
            place = (index + step) % len(self)
            try:
                return read(place)
            except DamagedImageError as error:
                found = _FOUND.get()
                if found is not None:
                    found[file_of(self.dataset, place) or f"image {place}"] = str(error)
                last = error
        raise DataError(
            f"{tries} training images in a row are damaged, so that none can stand for them; the "
            f"last: {last}"
        ) from last
