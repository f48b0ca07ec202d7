"""The processes of a run: agreeing on errors, and small exchanges between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.errors import UserError
from dat_ds.traffic import kind_of_traffic


@dataclass(frozen=True)
class Ranks:
    """The data-parallel processes of a run, as seen by one of them.

    Args:
        rank: This process, from 0.
        count: Number of processes.
        device: Where its model runs.
        cpu_group: Process group for small host-side exchanges; None for the default group.
    """

    rank: int
    count: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None

    @classmethod
    def of_default_group(cls, device: torch.device) -> Ranks:
        """The processes that someone else has started, or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(rank=0, count=1, device=device, cpu_group=None)
        return cls(dist.get_rank(), dist.get_world_size(), device, cpu_group=None)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """Largest ``value`` over the ranks; a host-side exchange."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, device=self._exchange_device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return int(tensor)

    def gather(self, value: object) -> list[object]:
        """``value`` of every rank, in order of rank; pickled, for small host-side data."""
        if self.count == 1:
            return [value]
        values: list[object] = [None] * self.count
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over the ranks."""
        if self.count == 1:
            return tensor.clone()
        total = tensor.to(self._exchange_device, copy=True)
        dist.all_reduce(total, group=self.cpu_group)
        return total.cpu()

    def any(self, flag: Tensor) -> bool:
        """Whether ``flag``, a 0-dim bool tensor, is true on any rank; synchronises the host."""
        return bool(self.max(int(flag)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.max(0)

    @property
    def _exchange_device(self) -> torch.device:
        """Where small exchanges lie: the default group may be NCCL's, which takes none on a CPU."""
        return self.device if self.cpu_group is None else torch.device("cpu")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; a user's error on any rank is raised on all of them.

        Other exceptions are not caught: the launcher ends the other ranks.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        errors = self.gather((type(error), str(error)) if error is not None else None)
        found = [(rank, item) for rank, item in enumerate(errors) if isinstance(item, tuple)]
        if error is not None:
            raise error
        if found:
            rank, (kind, message) = found[0]
            raise kind(f"rank {rank}: {message}")


class _RowsOfOthers(torch.autograd.Function):
    """Rows ``(n, D)`` of this rank to those of the others; the backward returns their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        gathered = [torch.empty_like(rows) for _ in range(ranks.count)]
        with kind_of_traffic("features"):
            dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered[: ranks.rank] + gathered[ranks.rank + 1 :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = list(gradients[0].chunk(ctx.ranks.count - 1))
        parts.insert(ctx.ranks.rank, torch.zeros_like(parts[0]))
        summed = torch.stack(parts)
        with kind_of_traffic("features"):
            dist.all_reduce(summed)
        return summed[ctx.ranks.rank], None


def rows_of_others(
    features: Tensor, y: Tensor, ranks: Ranks, *, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Features and ``y`` of all other ranks, differentiable; one all-gather.

    The backward is one all-reduce: the gradient of a rank's rows is the sum over the ranks that
    compared with them.

    Args:
        features: This rank's ``(n, D)``, float32.
        y: Small integers ``(n,)``.
        ranks: The processes, at least two.
        num_rows: Rows that every rank sends, at least ``n``; missing ones have a ``y`` of -1.

    Returns:
        ``((count - 1) * num_rows, D)`` and ``((count - 1) * num_rows,)``.
    """
    rows = torch.cat([features, y.to(features.dtype).unsqueeze(1)], dim=1)
    missing = rows.new_zeros(num_rows - len(rows), rows.shape[1])
    missing[:, -1] = -1
    others = _RowsOfOthers.apply(torch.cat([rows, missing]), ranks)
    return others[:, :-1], others[:, -1].detach().to(y.dtype)
