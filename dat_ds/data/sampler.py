"""Pure planning of which rank reads which sample, when, and with what weight.

Nothing here touches images or processes, so every claim (no sample twice, none dropped, every rank
the same number of micro-batches) can be checked by arithmetic alone.

Words: a *slot* is one micro-batch of one rank within one optimizer step; there are
``accumulation * ranks`` slots per step, and slot ``j = micro_step * ranks + rank``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dat_ds.errors import DataError


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Key of a sample for a worker: the epoch (for augmentation) and the index."""

    epoch: int
    index: int


@dataclass(frozen=True)
class BatchPlan:
    """One micro-batch of one rank.

    Attributes:
        epoch: Epoch number, from 0.
        step: Optimizer step within the epoch, from 0.
        micro_step: Micro-batch within the step, ``0 .. accumulation - 1``.
        indices: Dataset indices of this micro-batch; may be empty in the last step of an epoch.
        first_position: Position of the first sample within the global batch.
        weight: ``len(indices) * slots / global batch size``. The plain average over all slots of
            ``weight * local mean`` is the mean over the global batch; 1 for a full batch, 0 for an
            empty one.
        passes: Of each sample, which pass over its part of the data this is, from 0; empty where
            all are of the epoch's.
    """

    epoch: int
    step: int
    micro_step: int
    indices: tuple[int, ...]
    first_position: int
    weight: float
    passes: tuple[int, ...] = ()

    @property
    def keys(self) -> list[SampleKey]:
        """Keys of its samples."""
        passes = self.passes or (self.epoch,) * len(self.indices)
        return [SampleKey(*key) for key in zip(passes, self.indices, strict=True)]


@dataclass(frozen=True)
class FixedShare:
    """A part of a dataset that has a fixed share of every global batch.

    Attributes:
        num_samples: Its size, at least 1.
        fraction: Its share of a global batch, in (0, 1); rounded to whole samples.
        key: Key of the config that says so, for messages.
    """

    num_samples: int
    fraction: float
    key: str = "fraction"


def derive_seed(*parts: int | str) -> int:
    """Hash ``parts`` to a seed in ``[0, 2**63)``.

    Built on blake2b rather than on ``hash()``, which differs between processes, or on sums, where
    (seed 0, epoch 1) and (seed 1, epoch 0) would collide.
    """
    text = "/".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``derive_seed(*parts)``, apart from the global one."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def plan_step(num_left: int, micro_batch: int, slots: int) -> list[tuple[int, int]]:
    """Cut the next global batch into one consecutive piece per slot.

    Args:
        num_left: Samples of the epoch not yet handed out, at least 1.
        micro_batch: Samples per slot of a full global batch, at least 1.
        slots: ``accumulation * ranks``, at least 1.

    Returns:
        ``(first_position, size)`` per slot. A full batch gives every slot ``micro_batch`` samples;
        the last, partial one of ``n`` samples gives slot ``j`` ``n // slots + (j < n % slots)``,
        which is 0 for some slots when ``n < slots``.
    """
    size, extra = divmod(min(num_left, micro_batch * slots), slots)
    return [(j * size + min(j, extra), size + (j < extra)) for j in range(slots)]


class DistributedBatchSampler(Sampler[list[SampleKey]]):
    """This rank's micro-batches of one epoch, from any optimizer step on.

    The epoch's order depends on ``(num_samples, seed, epoch)`` only. It is cut into global batches
    of ``micro_batch * accumulation * ranks`` samples, so trading accumulation for ranks keeps every
    global batch, and its order, the same.

    Further parts of the dataset have a fixed share of every global batch, spread evenly over it; an
    epoch is one pass over the samples before them. Each further part is walked through on and on,
    shuffled anew in every pass, wherever epochs begin. In the last, partial batch of an epoch the
    shares are the same, rounded.

    Args:
        num_samples: Size of the dataset, without further parts; at least ``ranks``.
        micro_batch: Samples per rank per micro-step, at least 1.
        accumulation: Micro-steps per optimizer step, at least 1.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of data-parallel processes, at least 1.
        seed: Seed of the shuffling; any integer.
        shuffle: False keeps the dataset's own order in every epoch.
        replays: How many optimizer steps in a row get the same global batch.
        further: Parts with a fixed share, whose samples follow the first ``num_samples``.

    Raises:
        DataError: More ranks than samples, or a share that leaves nothing of a global batch to
            itself or to the first samples.
        ValueError: A count below 1, or a rank outside its range.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        ranks: int,
        seed: int,
        shuffle: bool = True,
        replays: int = 1,
        further: Sequence[FixedShare] = (),
    ) -> None:
        _check_ranks(
            rank, ranks, micro_batch=micro_batch, accumulation=accumulation, replays=replays
        )
        if ranks > num_samples:
            raise DataError(
                f"The training split has {num_samples} samples but there are {ranks} ranks: "
                "every rank needs at least one. Start fewer processes (deepspeed --num_gpus "
                f"{max(num_samples, 1)}), give more data, or lower dat.data.validation_fraction."
            )
        self.num_samples = num_samples
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank = rank
        self.ranks = ranks
        self.seed = seed
        self.shuffle = shuffle
        self.replays = replays
        self.further = tuple(further)
        self.epoch = 0
        self.step = 0
        self._check_shares()

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks and micro-steps, for a full step."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def further_per_batch(self) -> list[int]:
        """Samples of each further part in a full global batch."""
        return [round(part.fraction * self.global_batch) for part in self.further]

    @property
    def first_per_batch(self) -> int:
        """Samples in a full global batch that are of no further part."""
        return self.global_batch - sum(self.further_per_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; those of the last batch may hold fewer samples."""
        return self._batches_per_epoch * self.replays

    @property
    def _batches_per_epoch(self) -> int:
        return -(-self.num_samples // self.first_per_batch)

    def batch_of_step(self, step: int) -> int:
        """Samples of the global batch of an optimizer step of an epoch, from 0."""
        return sum(self._sizes(step // self.replays))

    def _sizes(self, batch: int) -> list[int]:
        """Samples of each part in the global batch number ``batch`` of an epoch."""
        full = self.first_per_batch
        first = min(full, self.num_samples - batch * full)
        return [first, *(round(count * first / full) for count in self.further_per_batch)]

    def _check_shares(self) -> None:
        """Refuse shares that leave a part without a sample in a full batch.

        Raises:
            DataError: With the fractions and the batch.
        """
        counts = self.further_per_batch
        if any(part.num_samples < 1 for part in self.further):
            raise DataError("A further part of the training data has no samples.")
        if min([self.first_per_batch, *counts]) < 1:
            shares = " and ".join(f"{part.key}={part.fraction:g}" for part in self.further)
            raise DataError(
                f"A global batch of {self.global_batch} with {shares} has {self.first_per_batch} "
                f"samples of the first part and {' and '.join(map(str, counts))} of the further: "
                "every part needs at least one. Write another fraction, or raise train_batch_size."
            )

    def set_position(self, epoch: int, step: int) -> None:
        """Start the next iteration at ``step`` of ``epoch``.

        Args:
            epoch: Epoch, from 0.
            step: Optimizer steps already done in that epoch, ``0 .. steps_per_epoch``. The upper
                end means the epoch is done and is stored as step 0 of the next one.

        Raises:
            ValueError: A position outside these ranges.
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"Position (epoch={epoch}, step={step}) is outside the data: epoch must be at "
                f"least 0 and step in 0..{self.steps_per_epoch}."
            )
        done, self.step = divmod(step, self.steps_per_epoch)
        self.epoch = epoch + done

    def __len__(self) -> int:
        """Number of micro-batches this rank sees in a full epoch."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Iterate over the sample keys of each plan, in the order of ``plans``."""
        return (plan.keys for plan in self.plans())

    def plans(self) -> Iterator[BatchPlan]:
        """Iterate over this rank's micro-batches from the current position to the epoch's end.

        The position is read now and not at the first ``next``, so moving it later does not disturb
        an iterator that was already handed out.
        """
        return self._plans_from(self.epoch, self.step, self._order(self.epoch))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(
            self.num_samples, generator=seeded_generator("order", self.seed, epoch)
        )

    def _plans_from(self, epoch: int, first_step: int, order: Tensor) -> Iterator[BatchPlan]:
        slots = self.accumulation * self.ranks
        walks = self._walks()
        for step in range(first_step, self.steps_per_epoch):
            batch, passes = self._global_batch_of(epoch, step // self.replays, order, walks)
            pieces = plan_step(len(batch), self.micro_batch, slots)
            for micro_step in range(self.accumulation):
                first, size = pieces[micro_step * self.ranks + self.rank]
                yield BatchPlan(
                    epoch=epoch,
                    step=step,
                    micro_step=micro_step,
                    indices=tuple(batch[first : first + size].tolist()),
                    first_position=first,
                    weight=size * slots / len(batch),
                    passes=tuple(passes[first : first + size].tolist()),
                )

    def _walks(self) -> list[_Walk]:
        walks, offset = [], self.num_samples
        for number, part in enumerate(self.further):
            seed = self.seed if self.shuffle else None
            walks.append(_Walk(part.num_samples, offset, number, seed))
            offset += part.num_samples
        return walks

    def _global_batch_of(
        self, epoch: int, number: int, order: Tensor, walks: list[_Walk]
    ) -> tuple[Tensor, Tensor]:
        """Indices of a global batch of an epoch, and their passes (none without further parts)."""
        full = self.first_per_batch
        first = order[number * full : (number + 1) * full]
        if not walks:
            return first, first[:0]
        sizes = self._sizes(number)
        last = self._sizes(self._batches_per_epoch - 1)
        indices, passes = [first], [torch.full_like(first, epoch)]
        for walk, count, size, at_end in zip(
            walks, self.further_per_batch, sizes[1:], last[1:], strict=True
        ):
            per_epoch = (self._batches_per_epoch - 1) * count + at_end
            found = walk.take(epoch * per_epoch + number * count, size)
            indices.append(found[0])
            passes.append(found[1])
        # Spread evenly, so that every micro-batch has its share of each part.
        places = torch.cat(
            [(torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1) for n in sizes]
        )
        spread = torch.argsort(places, stable=True)
        return torch.cat(indices)[spread], torch.cat(passes)[spread]


class _Walk:
    """Walks through a part of a dataset on and on, in another order in every pass.

    Args:
        size: Samples of the part.
        offset: Index of its first sample.
        number: Number of the part.
        seed: Of the orders; None keeps the part's own.
    """

    def __init__(self, size: int, offset: int, number: int, seed: int | None) -> None:
        self._size, self._offset, self._number, self._seed = size, offset, number, seed
        self._known: tuple[int, Tensor] = (-1, torch.empty(0))

    def take(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Indices of ``count`` samples from place ``start`` of the walk on, and their passes."""
        nothing = torch.empty(0, dtype=torch.int64)
        indices, passes = [nothing], [nothing]
        while count > 0:
            number, place = divmod(start, self._size)
            piece = self._order(number)[place : place + count]
            indices.append(piece + self._offset)
            passes.append(torch.full_like(piece, number))
            start, count = start + len(piece), count - len(piece)
        return torch.cat(indices), torch.cat(passes)

    def _order(self, number: int) -> Tensor:
        if self._known[0] != number:
            order = torch.arange(self._size)
            if self._seed is not None:
                generator = seeded_generator("order", self._seed, "part", self._number, number)
                order = torch.randperm(self._size, generator=generator)
            self._known = (number, order)
        return self._known[1]


def shard_evenly(num_samples: int, rank: int, ranks: int, batch_size: int) -> list[list[int]]:
    """Cut ``0 .. num_samples - 1`` into contiguous shards with equally many batches per rank.

    Equal counts keep collective calls (ZeRO-3 gathers in the forward pass) in step.

    Args:
        num_samples: Samples in all, at least 0.
        rank: This process, ``0 .. ranks - 1``.
        ranks: Number of processes; may exceed ``num_samples``.
        batch_size: Largest batch, at least 1.

    Returns:
        This rank's batches of indices; over the ranks every index occurs exactly once. A rank with
        a smaller shard gets empty lists at the end.

    Raises:
        ValueError: A count below 1, or a rank outside its range.
    """
    _check_ranks(rank, ranks, batch_size=batch_size)
    size, extra = divmod(num_samples, ranks)
    first = rank * size + min(rank, extra)
    stop = first + size + (rank < extra)
    num_batches = -(-(size + (extra > 0)) // batch_size)
    starts = (first + i * batch_size for i in range(num_batches))
    return [list(range(start, min(start + batch_size, stop))) for start in starts]


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices at random into kept and held out, in equal proportion per label.

    Args:
        labels: int64 labels of 0 or more, shape ``(N,)``.
        fraction: Part to hold out, in ``[0, 1)``.
        seed: The split is a function of ``(labels, fraction, seed)``.

    Returns:
        ``(kept, held)``, both sorted and disjoint, with ``len(held) == round(fraction * N)``. Each
        label's share is off by less than one sample (largest remainders are rounded up).
    """
    counts = labels.bincount()
    quotas = counts.double() * fraction
    take = quotas.floor().long()
    missing = round(fraction * len(labels)) - int(take.sum())
    take[torch.argsort(quotas - take, descending=True, stable=True)[:missing]] += 1

    order = torch.randperm(len(labels), generator=seeded_generator("hold_out", seed))
    grouped = order[torch.argsort(labels[order], stable=True)]
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for group, number in zip(torch.split(grouped, counts.tolist()), take.tolist(), strict=True):
        is_held[group[:number]] = True
    return (~is_held).nonzero().flatten().tolist(), is_held.nonzero().flatten().tolist()


def _check_ranks(rank: int, ranks: int, **counts: int) -> None:
    for name, value in {"ranks": ranks, **counts}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank={rank} is outside 0..{ranks - 1}.")
