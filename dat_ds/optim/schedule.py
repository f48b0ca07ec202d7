"""Learning rate: its peak for a global batch, and its course along a run in units of the peak."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a constant, cosine or step schedule.

    Args:
        name: ``"constant"``, ``"cosine"`` (Loshchilov and Hutter, ICLR 2017, eq. 5, arXiv
            1608.03983, one cycle) or ``"step"``.
        total_steps: Optimizer steps of the run.
        warmup_steps: First steps, in which the factor rises linearly to 1.
        final_ratio: Factor at the end (cosine).
        milestones: Fractions of the run at which the factor drops (step).
        decay_factor: Factor of each drop (step).
    """

    name: str
    total_steps: int
    warmup_steps: int = 0
    final_ratio: float = 0.0
    milestones: Sequence[float] = ()
    decay_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in ("constant", "cosine", "step"):
            raise ValueError(f"name={self.name!r} is not one of constant, cosine, step.")

    def factor(self, step: int) -> float:
        """Factor of the peak learning rate in optimizer step ``step``, counted from 0.

        The last step of the warm-up and the step after it run at the peak; the cosine would reach
        ``final_ratio`` in step ``total_steps``, one past the last.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "cosine":
            span = max(1, self.total_steps - self.warmup_steps)
            progress = min(1.0, (step - self.warmup_steps) / span)
            share = 0.5 * (1 + math.cos(math.pi * progress))
            return self.final_ratio + (1 - self.final_ratio) * share
        if self.name == "step":
            # A quotient: 0.55 * 100 > 55 in floating point, and the drop would come a step late.
            done = step / max(1, self.total_steps)
            passed = sum(done >= fraction for fraction in self.milestones)
            return self.decay_factor**passed
        return 1.0

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """A torch scheduler that sets this factor; its ``step`` is one optimizer step."""
        return LambdaLR(optimizer, self.factor)


def lr_scale(scaling: str, global_batch: int, base_batch: int) -> float:
    """Factor on a learning rate that was chosen for another global batch.

    Args:
        scaling: ``"linear"`` (Goyal et al. 2017, arXiv 1706.02677) or ``"sqrt"`` (Krizhevsky 2014,
            arXiv 1404.5997).
        global_batch: Images per optimizer step.
        base_batch: Images per optimizer step that the learning rate was chosen for.

    Raises:
        ValueError: For an unknown rule.
    """
    if scaling not in ("linear", "sqrt"):
        raise ValueError(f"scaling={scaling!r} is not one of linear, sqrt.")
    ratio = global_batch / base_batch
    return ratio if scaling == "linear" else math.sqrt(ratio)


def usual_scaling(optimizer: str) -> str | None:
    """The rule that is usual for an optimizer, by its name in any spelling; None where none is.

    ``"linear"`` for SGD and LARS; ``"sqrt"`` for Adam (Malladi et al., NeurIPS 2022, arXiv
    2205.10287), LAMB (You et al., ICLR 2020, arXiv 1904.00962) and their relatives.
    """
    name = optimizer.lower()
    if name in ("sgd", "lars"):
        return "linear"
    return "sqrt" if "adam" in name or "lamb" in name else None
