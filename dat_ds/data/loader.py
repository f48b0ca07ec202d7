"""Batches for training and evaluation, the same ones for any number of workers.

Shapes: ``B`` samples of a micro-batch (0 is possible), ``C H W`` of an image.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dat_ds.data.sampler import (
    BatchPlan,
    DistributedBatchSampler,
    SampleKey,
    seeded_generator,
    shard_evenly,
)
from dat_ds.data.transforms import Sample, fetch_sample
from dat_ds.errors import CheckpointError, DataError

Batch = tuple[Tensor, Tensor]
"""Images and labels."""
PlannedBatch = tuple[Tensor, Tensor, BatchPlan | None]
"""Images, labels and, where it is known, their place in the global batch."""
"""Images, labels, and their place in the global batch; None for batches that are not a loader's."""
_GRACE_SECONDS = 20  # the deepspeed launcher waits 30 before it kills


class DistributedLoader:
    """This rank's micro-batches of a dataset, epoch after epoch, resumable at any optimizer step.

    Iterating once gives the rest of the current epoch; the epoch then advances by itself, so
    ``for epoch in range(3): for x, y in loader`` reshuffles every time. Stopping early and
    iterating again continues after the last optimizer step that was handed out completely.

    Yields ``(x, y)``: ``x`` float32 ``(B, C, H, W)`` in [0, 1], ``y`` int64 ``(B,)`` (or
    probabilities, float32 ``(B, K)``, where the dataset gives them). In the last step of an epoch
    ``B`` may be smaller, even 0, and ``plan.weight`` is the batch's weight.

    Args:
        dataset: Map-style dataset of ``(x, y)``; an ``Augmented`` one also gets the epoch.
        micro_batch: Samples per rank per micro-step.
        accumulation: Micro-steps per optimizer step.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of data-parallel processes.
        seed: Seed of the order.
        num_workers: Worker processes; 0 reads in this process. Never changes what is read.
        pin_memory: Whether batches are put into page-locked memory.
        shuffle: False keeps the dataset's own order.
        replays: How many optimizer steps in a row get the same samples, each read anew.

    Attributes:
        sampler: The plan maker; its ``epoch`` and ``step`` are the current position.
        plans: Those of the micro-batches of the current optimizer step that were handed out so far.

    Raises:
        DataError: More ranks than samples, or an unreadable sample (its own message, whichever
            process met it).
        RuntimeError: The position was moved, or a second iterator started, during an iteration.

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
    ) -> None:
        self.sampler = DistributedBatchSampler(
            len(cast(Any, dataset)),
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            seed=seed,
            shuffle=shuffle,
            replays=replays,
        )
        self.dataset = dataset
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.plans: list[BatchPlan] = []
        self._collate = _Collate(dataset)
        self._iteration = 0

    @property
    def plan(self) -> BatchPlan | None:
        """Plan of the batch handed out last; None before the first."""
        return self.plans[-1] if self.plans else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.sampler.steps_per_epoch

    def __len__(self) -> int:
        """Number of micro-batches a rank sees in a full epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the rest of the current epoch."""
        sampler = self.sampler
        self._iteration += 1
        iteration = self._iteration
        batches = _read_batches(
            self.dataset,
            sampler,
            self._collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=seeded_generator("workers", sampler.seed, sampler.epoch),
        )
        # The DataLoader hands batches out in the order of its batch sampler however far its workers
        # run ahead, so a second pass over the same plans stays in step with it.
        planned = zip(sampler.plans(), batches, strict=True)
        for plan, batch in planned:
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
            if plan.micro_step == sampler.accumulation - 1:
                sampler.set_position(plan.epoch, plan.step + 1)
            yield batch

    def steps(self) -> Iterator[list[PlannedBatch]]:
        """Iterate over the optimizer steps of the rest of the epoch: all micro-batches of each."""
        batches: list[PlannedBatch] = []
        for x, y in self:
            batches.append((x, y, self.plan))
            if len(batches) == self.sampler.accumulation:
                yield batches
                batches = []

    def set_position(self, epoch: int, step: int) -> None:
        """Continue at ``step`` (optimizer steps already done) of ``epoch``.

        Raises:
            ValueError: A position outside the data.
        """
        self.sampler.set_position(epoch, step)
        self._iteration += 1

    def state_dict(self) -> dict[str, int]:
        """Position and what it is relative to; plain integers.

        ``step`` counts the optimizer steps of ``epoch`` handed out completely. The end of an epoch
        is step 0 of the next one.
        """
        return {"epoch": self.sampler.epoch, "step": self.sampler.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state_dict`` was taken; ranks, accumulation and workers may differ.

        Raises:
            CheckpointError: The state is incomplete, or its seed, number of samples or global batch
                differs from this loader's: a step would then mean other samples.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise CheckpointError(f"The checkpoint's data position lacks {', '.join(missing)}.")
        differences = [
            f"{key}: checkpoint {state[key]}, this run {value}"
            for key, value in self._identity().items()
            if state[key] != value
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

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.sampler.seed,
            "num_samples": self.sampler.num_samples,
            "global_batch": self.sampler.global_batch,
            "replays": self.sampler.replays,
        }


class EvaluationBatches:
    """This rank's part of the samples to evaluate; every rank has equally many batches.

    Iterating yields ``(x, y, indices)``: ``x`` float32 ``(B, C, H, W)`` in [0, 1], ``y`` int64
    ``(B,)``, dataset indices; ``B`` may be 0.
    """

    def __init__(self, dataset: Dataset[Any], shard: list[list[int]], num_workers: int) -> None:
        self._dataset, self._shard, self._num_workers = dataset, shard, num_workers

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        return len(self._shard)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Iterate over the batches, in dataset order."""
        if not self._shard:
            return
        batches = _read_batches(
            self._dataset,
            [[SampleKey(0, index) for index in indices] for indices in self._shard],
            _Collate(self._dataset),
            num_workers=self._num_workers,
            pin_memory=False,
            generator=seeded_generator("evaluation"),
        )
        for indices, (x, y) in zip(self._shard, batches, strict=True):
            yield x, y, indices

    def empty_batch(self) -> tuple[Tensor, Tensor, list[int]]:
        """A batch of no sample, for a rank that cannot read its own but has to keep up."""
        shape = self._dataset[0][0].shape
        return torch.empty((0, *shape)), torch.empty(0, dtype=torch.int64), []


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
        dataset: Map-style dataset of ``(x, y)``.
        batch_size: Largest batch, at least 1.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of processes; may exceed the number of samples.
        num_examples: Samples over all ranks; None, or more than there are, means all.
        num_workers: Worker processes; 0 reads in this process.

    Returns:
        This rank's batches.

    Raises:
        DataError: ``num_examples`` below 1; reading raises it for an unreadable sample.
    """
    if num_examples is not None and num_examples < 1:
        raise DataError(
            f"num_examples={num_examples} must be at least 1; write null to use every sample."
        )
    size = len(cast(Any, dataset))
    total = size if num_examples is None else min(num_examples, size)
    return EvaluationBatches(dataset, shard_evenly(total, rank, ranks, batch_size), num_workers)


def _read_batches(
    dataset: Dataset[Any],
    keys: Iterable[list[SampleKey]],
    collate: _Collate,
    *,
    num_workers: int,
    pin_memory: bool,
    generator: torch.Generator,
) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Samples(dataset),
        # torch asks for a Sampler but uses an iterable of lists, which is all that is needed here.
        batch_sampler=cast(Any, keys),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without its own generator a DataLoader draws one number per epoch from the global one.
        generator=generator,
        worker_init_fn=_outlive_sigterm,
    )
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            x, y = batch
            yield x, y
    finally:
        del iterator  # ends the workers, even where a traceback keeps this frame alive


def _outlive_sigterm(_worker: int) -> None:
    """Let a worker live on for a while after SIGTERM.

    Schedulers signal a whole process tree, and the main process still wants to finish its step. Not
    forever: Python ends forgotten workers by SIGTERM too, and waits for them.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


class _Samples(Dataset[Any]):
    """Reads the samples of one batch of keys.

    A ``DataError`` is returned and not raised: torch would re-raise it in the main process with the
    worker's whole traceback as its message.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample] | DataError:
        try:
            return [fetch_sample(self.dataset, key) for key in keys]
        except DataError as error:
            return error


class _Collate:
    """Stacks samples to ``(B, C, H, W)`` and ``(B,)`` or ``(B, K)``; knows an empty batch's shape.

    Args:
        dataset: Its first sample shows the shapes.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        x, y = fetch_sample(dataset, SampleKey(0, 0))
        self.image_shape = x.shape
        self.no_label = torch.as_tensor(y).new_empty((0, *torch.as_tensor(y).shape))

    def __call__(self, samples: list[Sample] | DataError) -> Batch | DataError:
        if isinstance(samples, DataError):
            return samples
        if not samples:
            return torch.empty((0, *self.image_shape)), self.no_label
        y = torch.stack([torch.as_tensor(y) for _, y in samples])
        return torch.stack([x for x, _ in samples]), y
