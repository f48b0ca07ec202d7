"""Datasets of which every global batch holds a fixed share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch.utils.data import Dataset

from dat_ds.data.sampler import FixedShare
from dat_ds.data.transforms import Sample, fetch_raw, file_of, further_parts


class Mixture(Dataset[Sample]):
    """A dataset, and another one with a fixed share of every global batch.

    An epoch is one pass over the first; the other is walked through on and on
    (:class:`dat_ds.data.DistributedBatchSampler`). Real and generated images are mixed like that
    by Gowal et al. (NeurIPS 2021, arXiv 2110.09468) and Wang et al. (ICML 2023, arXiv 2302.04638).

    Args:
        first: Map-style dataset of ``(x, y)``; it may be a mixture itself.
        second: Likewise, of images of the same shape and labels of the same classes.
        fraction: Share of ``second`` in a global batch, in (0, 1).
        key: Key of the config that says so, for messages.
    """

    def __init__(
        self,
        first: Dataset[Any],
        second: Dataset[Any],
        fraction: float,
        key: str = "fraction",
    ) -> None:
        self.first, self.second = first, second
        self.num_second = len(cast(Any, second))
        self._own = FixedShare(self.num_second, fraction, key)

    @property
    def further(self) -> tuple[FixedShare, ...]:
        """Parts with a fixed share, the second dataset last."""
        return (*further_parts(self.first), self._own)

    def __len__(self) -> int:
        """Number of samples of both."""
        return self._ends_first + self.num_second

    @property
    def _ends_first(self) -> int:
        return len(cast(Any, self.first))  # pseudo-labels may leave some out

    def __getitem__(self, index: int) -> Sample:
        """``(x, y)``."""
        dataset, place = self._owner(index)
        sample: Sample = dataset[place]
        return sample

    def raw(self, index: int) -> Sample:
        """Stored image before any resizing, and its label."""
        return fetch_raw(*self._owner(index))

    def file_of(self, index: int) -> str | None:
        """File of an image."""
        return file_of(*self._owner(index))

    def _owner(self, index: int) -> tuple[Dataset[Any], int]:
        if index < self._ends_first:
            return self.first, index
        return self.second, index - self._ends_first


def part_ranges(dataset: Dataset[Any]) -> Iterator[range]:
    """Indices of the first part of a dataset, and of each part with a fixed share."""
    size, parts = len(cast(Any, dataset)), further_parts(dataset)
    start = size - sum(part.num_samples for part in parts)
    yield range(start)
    for part in parts:
        yield range(start, start + part.num_samples)
        start += part.num_samples
