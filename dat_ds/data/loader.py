"""Batches for training and evaluation, the same ones for any number of workers.

Shapes: ``B`` samples of a micro-batch (0 is possible), ``C H W`` of an image.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dat_ds.data.damaged import collected_damage
from dat_ds.data.sampler import (
    BatchPlan,
    DistributedBatchSampler,
    SampleKey,
    seeded_generator,
    shard_evenly,
)
from dat_ds.data.samples import Batch, CollateFunction, Collator, refuse_unless_map_style
from dat_ds.data.transforms import fetch_sample, further_parts
from dat_ds.errors import CheckpointError, DataError

T = TypeVar("T")
PlannedBatch = tuple[Tensor, Tensor, BatchPlan | None]
"""Images, labels, and their place in the global batch; None for batches that are not a loader's."""
_GRACE_SECONDS = 20  # the deepspeed launcher waits 30 before it kills


class Loader(ABC):
    """This rank's micro-batches, epoch after epoch, resumable at any optimizer step.

    Iterating once gives the rest of the current epoch; the epoch then advances by itself, so
    ``for epoch in range(3): for x, y in loader`` goes on to the next every time. Stopping early and
    iterating again continues after the last optimizer step that was handed out completely.

    Yields ``(x, y)``: ``x`` float32 ``(B, C, H, W)`` in [0, 1], ``y`` int64 ``(B,)`` (or
    probabilities, float32 ``(B, K)``, where the dataset gives them).

    Args:
        accumulation: Micro-steps per optimizer step.

    Attributes:
        plans: Those of the micro-batches of the current optimizer step that were handed out so far.

    Raises:
        RuntimeError: The position was moved, or a second iterator started, during an iteration.
    """

    def __init__(self, accumulation: int) -> None:
        self.plans: list[BatchPlan] = []
        self._accumulation = accumulation
        self._iteration = 0

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per epoch; None where that is not known."""

    @property
    @abstractmethod
    def position(self) -> tuple[int, int]:
        """Epoch, and optimizer steps of it that were handed out completely."""

    @abstractmethod
    def _move(self, epoch: int, step: int) -> None:
        """Change :attr:`position`, during an iteration or between two."""

    @abstractmethod
    def _identity(self) -> dict[str, int]:
        """What a position is relative to."""

    @abstractmethod
    def _planned(self) -> Iterator[tuple[BatchPlan, Batch]]:
        """Micro-batches from the position to the end of the epoch."""

    @abstractmethod
    def _end(self, epoch: int) -> None:
        """Go on to the next epoch, where the last step of ``epoch`` did not."""

    @property
    def plan(self) -> BatchPlan | None:
        """Plan of the batch handed out last; None before the first."""
        return self.plans[-1] if self.plans else None

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the rest of the current epoch."""
        self._iteration += 1
        iteration, (epoch, _) = self._iteration, self.position
        for plan, batch in self._planned():
            if iteration != self._iteration:
                raise RuntimeError(
                    "The loader was moved or iterated anew during this iteration: "
                    "start a new 'for' loop after set_position or load_state_dict."
                )
            if plan.micro_step == 0:
                self.plans = []
            self.plans.append(plan)
            # Moved before the batch is handed out, so that a checkpoint written after the
            # update on the step's last micro-batch counts that step.
            if plan.micro_step == self._accumulation - 1:
                self._move(plan.epoch, plan.step + 1)
            yield batch
        if iteration == self._iteration:
            self._end(epoch)

    def steps(self) -> Iterator[list[PlannedBatch]]:
        """Iterate over the optimizer steps of the rest of the epoch: all micro-batches of each."""
        batches: list[PlannedBatch] = []
        for x, y in self:
            batches.append((x, y, self.plan))
            if len(batches) == self._accumulation:
                yield batches
                batches = []

    def set_position(self, epoch: int, step: int) -> None:
        """Continue at ``step`` (optimizer steps already done) of ``epoch``.

        Raises:
            ValueError: A position outside the data.
        """
        self._move(epoch, step)
        self._iteration += 1

    def state_dict(self) -> dict[str, int]:
        """Position and what it is relative to; plain integers.

        ``step`` counts the optimizer steps of ``epoch`` handed out completely. The end of an epoch
        is step 0 of the next one.
        """
        epoch, step = self.position
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state_dict`` was taken; ranks, accumulation and workers may differ.

        Raises:
            CheckpointError: The state is incomplete, or its seed, number of samples or global batch
                differs from this loader's: a step would then mean other samples.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise CheckpointError(f"The checkpoint's data position lacks {', '.join(missing)}.")
        own = self._identity()
        # Of a mixture that is no more, or that was none, only one of the two has keys.
        keys = [key for key in {**own, **state} if key not in ("epoch", "step")]
        differences = [
            f"{key}: checkpoint {state.get(key, 'none')}, this run {own.get(key, 'none')}"
            for key in keys
            if state.get(key) != own.get(key)
        ]
        if differences:
            raise CheckpointError(
                "The checkpoint's data position belongs to another run setup ("
                + "; ".join(differences)
                + "). Resume with the same data, seed and train_batch_size, or start a new run."
            )
        try:
            self.set_position(state["epoch"], state["step"])
        except ValueError as error:
            raise CheckpointError(f"The checkpoint's data position is invalid. {error}") from error


class DistributedLoader(Loader):
    """This rank's micro-batches of a map-style dataset, shuffled anew in every epoch.

    In the last step of an epoch ``B`` may be smaller, even 0, and ``plan.weight`` is the batch's
    weight. Parts of a :class:`dat_ds.data.Mixture` have their fixed shares of every global batch.

    Args:
        dataset: Map-style dataset, of samples as :class:`dat_ds.data.samples.Collator` takes them;
            an ``Augmented`` one also gets the epoch.
        micro_batch: Samples per rank per micro-step.
        accumulation: Micro-steps per optimizer step.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of data-parallel processes.
        seed: Seed of the order.
        num_workers: Worker processes; 0 reads in this process. Never changes what is read.
        pin_memory: Whether batches are put into page-locked memory.
        shuffle: False keeps the dataset's own order.
        replays: How many optimizer steps in a row get the same samples, each read anew.
        collate_fn: The user's own, from a list of samples to ``(x, y)``; None stacks them.

    Attributes:
        sampler: The plan maker; its ``epoch`` and ``step`` are the current position.

    Raises:
        DataError: No map-style dataset, more ranks than samples, or an unreadable sample (its own
            message, whichever process met it).

    Note:
        No random number is drawn from the global generator.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        shuffle: bool = True,
        replays: int = 1,
        collate_fn: CollateFunction | None = None,
    ) -> None:
        refuse_unless_map_style(dataset)
        further = further_parts(dataset)
        self.sampler = DistributedBatchSampler(
            len(cast(Any, dataset)) - sum(part.num_samples for part in further),
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            seed=seed,
            shuffle=shuffle,
            replays=replays,
            further=further,
        )
        super().__init__(accumulation)
        self.dataset = dataset
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._batches = _Batches(dataset, Collator(collate_fn))
        self._damaged: dict[str, str] = {}

    def take_damaged(self) -> dict[str, str]:
        """What was damaged in the batches handed out since the last call: the reason, by image.

        Images of a :class:`dat_ds.data.Readable` dataset, which others stood for.
        """
        found, self._damaged = self._damaged, {}
        return found

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.sampler.steps_per_epoch

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and optimizer steps of it that were handed out completely."""
        return self.sampler.epoch, self.sampler.step

    def __len__(self) -> int:
        """Number of micro-batches a rank sees in a full epoch."""
        return len(self.sampler)

    def read(self, plan: BatchPlan) -> Batch:
        """Read a micro-batch again, in this process; the position stays.

        Args:
            plan: What the loader handed it out with.

        Raises:
            DataError: For an unreadable sample.
        """
        read = self._batches.__getitems__(plan.keys)
        if isinstance(read, DataError):
            raise read
        return read[0]

    def _move(self, epoch: int, step: int) -> None:
        self.sampler.set_position(epoch, step)

    def _planned(self) -> Iterator[tuple[BatchPlan, Batch]]:
        sampler = self.sampler
        batches = read_batches(
            self._batches,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=seeded_generator("workers", sampler.seed, sampler.epoch),
        )
        # The DataLoader hands batches out in the order of its batch sampler however far its workers
        # run ahead, so a second pass over the same plans stays in step with it.
        for plan, (batch, damaged) in zip(sampler.plans(), batches, strict=True):
            self._damaged |= damaged
            yield plan, batch

    def _end(self, epoch: int) -> None:
        """Nothing: the number of steps is known, and the last one went on to the next epoch."""

    def _identity(self) -> dict[str, int]:
        sampler = self.sampler
        values = {
            "seed": sampler.seed,
            "num_samples": sampler.num_samples,
            "global_batch": sampler.global_batch,
            "replays": sampler.replays,
        }
        for number, part in enumerate(sampler.further, start=2):
            values[f"num_samples_of_part_{number}"] = part.num_samples
            values[f"per_batch_of_part_{number}"] = sampler.further_per_batch[number - 2]
        return values


class EvaluationBatches:
    """This rank's part of the samples to evaluate; every rank has equally many batches.

    Iterating yields ``(x, y, indices)``: ``x`` float32 ``(B, C, H, W)`` in [0, 1], ``y`` int64
    ``(B,)``, dataset indices; ``B`` may be 0.

    Attributes:
        damaged: What was damaged in the batch handed out last, and the reason; images of a
            :class:`dat_ds.data.Readable` dataset, which others stood for.
    """

    def __init__(self, dataset: Dataset[Any], shard: list[list[int]], num_workers: int) -> None:
        self._dataset, self._shard, self._num_workers = dataset, shard, num_workers
        self.damaged: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        return len(self._shard)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Iterate over the batches, in dataset order."""
        if not self._shard:
            return
        batches = read_batches(
            _Batches(self._dataset, Collator()),
            batch_sampler=[[SampleKey(0, index) for index in indices] for indices in self._shard],
            num_workers=self._num_workers,
            pin_memory=False,
            generator=seeded_generator("evaluation"),
        )
        for indices, ((x, y), damaged) in zip(self._shard, batches, strict=True):
            self.damaged = damaged
            yield x, y, indices

    def empty_batch(self) -> tuple[Tensor, Tensor, list[int]]:
        """A batch of no sample, for a rank that cannot read its own but has to keep up."""
        readable, error = Collator(), None
        for index in range(len(cast(Any, self._dataset))):
            try:
                sample = fetch_sample(self._dataset, SampleKey(0, index))
                return *readable.empty(sample), []
            except DataError as found:
                error = error or found
        raise DataError("There is no readable sample.") from error


def evaluation_batches(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    num_examples: int | None = None,
    num_workers: int = 0,
) -> EvaluationBatches:
    """Divide the first ``num_examples`` samples among the ranks, in dataset order.

    Args:
        dataset: Map-style dataset, of samples as :class:`dat_ds.data.samples.Collator` takes them.
        batch_size: Largest batch, at least 1.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of processes; may exceed the number of samples.
        num_examples: Samples over all ranks; None, or more than there are, means all.
        num_workers: Worker processes; 0 reads in this process.

    Returns:
        This rank's batches.

    Raises:
        DataError: No map-style dataset, or ``num_examples`` below 1; reading raises it for an
            unreadable sample.
    """
    refuse_unless_map_style(dataset)
    if num_examples is not None and num_examples < 1:
        raise DataError(
            f"num_examples={num_examples} must be at least 1; write null to use every sample."
        )
    size = len(cast(Any, dataset))
    total = size if num_examples is None else min(num_examples, size)
    return EvaluationBatches(dataset, shard_evenly(total, rank, ranks, batch_size), num_workers)


def read_batches(
    dataset: Dataset[Any],
    *,
    batch_sampler: Iterable[list[SampleKey]] | None,
    num_workers: int,
    pin_memory: bool,
    generator: torch.Generator,
) -> Iterator[Any]:
    """Whole batches of a dataset, read by it, in its process or in workers.

    Args:
        dataset: Gives a batch for each list of keys; or, being iterable, one after another.
        batch_sampler: The lists of keys; None for an iterable dataset.
        num_workers: Worker processes; 0 reads in this process.
        pin_memory: Whether batches are put into page-locked memory.
        generator: Seeds the workers.

    Raises:
        DataError: That the dataset gave in the place of a batch. It is given and not raised: torch
            would raise it in the main process with the worker's whole traceback as its message.
    """
    # torch asks for a Sampler but uses an iterable of lists, which is all that is needed here.
    batching = {"batch_size": None} if batch_sampler is None else {"batch_sampler": batch_sampler}
    loader: DataLoader[Any] = DataLoader(
        dataset,
        **cast(Any, batching),
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without its own generator a DataLoader draws one number per epoch from the global one.
        generator=generator,
        worker_init_fn=_outlive_sigterm,
    )
    iterator = iter(loader)
    # With workers the main process still spends milliseconds on taking over a batch's memory.
    batches = one_ahead(iterator) if num_workers else iterator
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        # Ends the workers, even where a traceback keeps this frame alive.
        if isinstance(batches, Generator):
            batches.close()
        del batches, iterator


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Take every item in a thread while the one before it is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        coming: Future[T | None] = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_sigterm(_worker: int) -> None:
    """Let a worker live on for a while after SIGTERM.

    Schedulers signal a whole process tree, and the main process still wants to finish its step. Not
    forever: Python ends forgotten workers by SIGTERM too, and waits for them.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


class _Batches(Dataset[Any]):
    """Gives the batch of a list of keys, and the damaged images in the place of which others stand.

    Args:
        dataset: Its first sample shows the shapes of an empty batch.
        collator: Makes batches of its samples.
    """

    def __init__(self, dataset: Dataset[Any], collator: Collator) -> None:
        self._dataset, self._collator = dataset, collator
        self.empty = collator.empty(fetch_sample(dataset, SampleKey(0, 0)))

    def __getitems__(self, keys: list[SampleKey]) -> tuple[Batch, dict[str, str]] | DataError:
        if not keys:
            return self.empty, {}
        try:
            with collected_damage() as damaged:
                samples = [fetch_sample(self._dataset, key) for key in keys]
            return self._collator(samples, [key.index for key in keys]), damaged
        except DataError as error:
            return error
