"""Batches of a stream: data that can only be read from their beginning on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset
from torch.utils.data import _utils as torch_utils

from dat_ds.data.loader import Loader, read_batches
from dat_ds.data.sampler import BatchPlan, seeded_generator
from dat_ds.data.samples import Batch, CollateFunction, Collator, refuse_no_dataset
from dat_ds.errors import DataError


class StreamLoader(Loader):
    """This rank's micro-batches of a stream, which every rank reads whole and in the same order.

    A global batch is the next ``micro_batch * accumulation * ranks`` samples; the rank keeps every
    ``ranks``-th micro-batch of it, so that batches are those of an unshuffled
    :class:`~dat_ds.data.loader.DistributedLoader`, and trading ranks for accumulation keeps them.
    What is left of an epoch after its last whole global batch is dropped.

    ``set_epoch(epoch)`` is called before an epoch is read, where the stream has it. To continue
    within an epoch, its earlier samples are read again and thrown away: exact where the stream is
    a function of the epoch.

    Args:
        stream: Gives samples as :class:`dat_ds.data.samples.Collator` takes them; it must not
            divide them among ranks or workers by itself.
        micro_batch: Samples per rank per micro-step.
        accumulation: Micro-steps per optimizer step.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of data-parallel processes.
        in_worker: Whether a process beside this one reads the stream.
        pin_memory: Whether batches are put into page-locked memory.
        replays: How many optimizer steps in a row get the same global batch, read once.
        collate_fn: The user's own, from a list of samples to ``(x, y)``; None stacks them.

    Raises:
        DataError: For an iterator, which can be read only once; while reading, for a sample that
            cannot be converted, an epoch without a whole global batch, or one that ends before
            the position to continue from.
    """

    def __init__(
        self,
        stream: IterableDataset[Any],
        *,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        in_worker: bool = False,
        pin_memory: bool = False,
        replays: int = 1,
        collate_fn: CollateFunction | None = None,
    ) -> None:
        refuse_no_dataset(stream)
        super().__init__(accumulation)
        self.dataset = stream
        self._slots = range(rank, accumulation * ranks, ranks)
        self._micro_batch = micro_batch
        self._global_batch = micro_batch * accumulation * ranks
        self._in_worker = in_worker
        self._pin_memory = pin_memory
        self._replays = replays
        self._collator = Collator(collate_fn)
        self._epoch = self._step = 0

    @property
    def steps_per_epoch(self) -> None:
        """Not known before the stream ends."""
        return None

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and optimizer steps of it that were handed out completely."""
        return self._epoch, self._step

    def _move(self, epoch: int, step: int) -> None:
        if epoch < 0 or step < 0:
            raise ValueError(f"Position (epoch={epoch}, step={step}) must be at least 0.")
        self._epoch, self._step = epoch, step

    def _identity(self) -> dict[str, int]:
        return {"streamed": 1, "global_batch": self._global_batch, "replays": self._replays}

    def _planned(self) -> Iterator[tuple[BatchPlan, Batch]]:
        epoch, step = self.position
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        whole = read_batches(
            _Share(
                self.dataset,
                self._collator,
                slots=self._slots,
                micro_batch=self._micro_batch,
                global_batch=self._global_batch,
                skipped=step // self._replays,
            ),
            batch_sampler=None,
            num_workers=int(self._in_worker),
            pin_memory=self._pin_memory,
            generator=seeded_generator("stream", epoch),
        )
        for micro_batches in whole:
            # Continued within the replays of a batch, the earlier ones are left out.
            for _ in range(step % self._replays, self._replays):
                for micro_step, batch in enumerate(micro_batches):
                    yield self._plan(epoch, step, micro_step), batch
                step += 1

    def _end(self, epoch: int) -> None:
        self._move(epoch + 1, 0)

    def _plan(self, epoch: int, step: int, micro_step: int) -> BatchPlan:
        first = self._slots[micro_step] * self._micro_batch
        start = step // self._replays * self._global_batch + first
        return BatchPlan(
            epoch=epoch,
            step=step,
            micro_step=micro_step,
            indices=tuple(range(start, start + self._micro_batch)),
            first_position=first,
            weight=1.0,
        )


@dataclass
class _Share(IterableDataset[Any]):
    """A rank's micro-batches of each whole global batch of a stream, or an error of reading them.

    Attributes:
        stream: Gives samples.
        collator: Makes micro-batches of them.
        slots: Which micro-batches of a global batch are the rank's.
        micro_batch: Samples of one.
        global_batch: Samples of all.
        skipped: Global batches that are read and thrown away first.
    """

    stream: IterableDataset[Any]
    collator: Collator
    slots: range
    micro_batch: int
    global_batch: int
    skipped: int

    def __iter__(self) -> Iterator[list[Batch] | DataError]:
        try:
            with _as_outside_of_workers():
                yield from self._read()
        except DataError as error:
            yield error

    def _read(self) -> Iterator[list[Batch]]:
        samples = iter(self.stream)
        needed = self.skipped * self.global_batch
        found = sum(1 for _ in itertools.islice(samples, needed))
        if found < needed:
            raise DataError(
                f"The stream ended after {found} samples, but the run to continue had read "
                f"{needed} of this epoch: it has to give the same samples in every run."
            )
        for start in itertools.count(needed, self.global_batch):
            own: dict[int, list[Any]] = {slot: [] for slot in self.slots}
            count = 0
            for position, sample in enumerate(itertools.islice(samples, self.global_batch)):
                count += 1
                slot = position // self.micro_batch
                if slot in own:
                    own[slot].append(sample)
            if count < self.global_batch:
                if start == 0:
                    raise DataError(
                        f"The stream ended after {count} samples, but an optimizer step takes "
                        f"{self.global_batch}: give more, or lower train_batch_size."
                    )
                return
            firsts = {slot: start + slot * self.micro_batch for slot in own}
            yield [
                self.collator(own[slot], range(first, first + self.micro_batch))
                for slot, first in firsts.items()
            ]


@contextlib.contextmanager
def _as_outside_of_workers() -> Iterator[None]:
    """Inside, torch does not say that this process is a worker.

    Streams of Hugging Face's library share out their files by worker, and the only one, which
    reads all of them, would get another order than the training process.
    """
    worker = torch_utils.worker
    before, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = before
