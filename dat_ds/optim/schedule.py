"""Learning rate: its peak for a global batch, and its course along a run in units of the peak."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from dat_ds.method import (
    Method,
    Table,
    above,
    at_least,
    option,
    positive_share,
    share,
    table_of,
)
from dat_ds.optim.build import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class ScheduleMethod(Method):
    """Length of the run, and the learning rate along it after a linear warm-up.

    The peak is the optimizer's ``lr``, scaled to the global batch if told so.
    """

    kind: ClassVar[str] = "schedule"

    epochs: float = above(0, 30.0)
    """Length of the run in epochs."""
    warmup_epochs: float = at_least(0, 0.0)
    """Epochs of linear warm-up from 0, included in ``epochs``."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """The ``lr`` that is written is for a global batch of ``base_batch``: it is multiplied by
    ``global batch / base_batch`` (``linear``, usual for SGD and LARS) or by its square root
    (``sqrt``, usual for Adam and LAMB). The global batch is
    ``micro-batch * accumulation * ranks``."""
    base_batch: int | None = at_least(1, None)
    """Global batch size that ``lr`` was chosen for."""
    max_steps: int | None = at_least(1, None)
    """Ends the run (and its schedule) after this many optimizer steps, if that is sooner."""

    def problems(self) -> Iterator[str]:
        """A warm-up as long as the run; scaling without the batch that it starts from."""
        if self.warmup_epochs >= self.epochs:
            yield (
                f"warmup_epochs={self.warmup_epochs:g} must be below "
                f"dat.schedule.epochs={self.epochs:g}, of "
                "which it is a part."
            )
        if (self.scaling == "none") != (self.base_batch is None):
            yield (
                f"scaling={self.scaling!r} and dat.schedule.base_batch={self.base_batch} go "
                f"together: "
                "write 'linear' or 'sqrt' and the global batch that the learning rate is for, "
                "such as "
                "256, or neither."
            )

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """Factor of the peak learning rate in a step after the warm-up, counted from 0."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Constant(ScheduleMethod):
    """The peak throughout."""

    name: ClassVar[str] = "constant"


@dataclass(frozen=True, kw_only=True)
class Decay(ScheduleMethod):
    """From the peak down to ``final_ratio``, along a curve that a subclass gives."""

    final_ratio: float = share(0.0)
    """Learning rate at the end over the peak."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """It would reach ``final_ratio`` in step ``total_steps``, one past the last."""
        span = max(1, total_steps - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / span)
        return self.final_ratio + (1 - self.final_ratio) * self.left(progress)

    def left(self, progress: float) -> float:
        """What is left of the way down, 1 to 0, after a share of it."""
        raise TypeError(f"{type(self).__name__} defines no left.")


@dataclass(frozen=True, kw_only=True)
class Cosine(Decay):
    """Half a cosine from the peak down."""

    name: ClassVar[str] = "cosine"
    paper: ClassVar[str] = "Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983, eq. 5, one cycle"

    def left(self, progress: float) -> float:
        """The cosine."""
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Linear(Decay):
    """A straight line from the peak down; after a warm-up, one cycle of a triangular rate."""

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "Smith, WACV 2017, arXiv 1506.01186, sec. 3.1, one cycle"

    def left(self, progress: float) -> float:
        """The line."""
        return 1 - progress


@dataclass(frozen=True, kw_only=True)
class Step(ScheduleMethod):
    """Drops at milestones."""

    name: ClassVar[str] = "step"

    milestones: list[float] = option(
        [0.5, 0.75],
        "increasing fractions of the run in (0, 1)",
        lambda v: all(0 < m < 1 for m in v) and sorted(set(v)) == v,
    )
    """Fractions of the run at which the factor drops."""
    decay_factor: float = positive_share(0.1)
    """Factor at each milestone."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """``decay_factor`` to the power of the milestones passed."""
        # A quotient: 0.55 * 100 > 55 in floating point, and the drop would come a step late.
        done = step / max(1, total_steps)
        passed = sum(done >= fraction for fraction in self.milestones)
        return self.decay_factor**passed


SCHEDULES: Table[ScheduleMethod] = table_of(
    "schedule",
    ScheduleMethod,
    [
        Cosine,
        Constant,
        Linear,
        Step,
    ],
)
"""The choices of ``dat.schedule``: a new schedule is a class and a place in this list."""


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate along one run.

    Args:
        method: Its shape.
        total_steps: Optimizer steps of the run.
        warmup_steps: First steps, in which the factor rises linearly to 1.
    """

    method: ScheduleMethod
    total_steps: int
    warmup_steps: int = 0

    def factor(self, step: int) -> float:
        """Factor of the peak learning rate in optimizer step ``step``, counted from 0.

        The last step of the warm-up and the step after it run at the peak.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.method.factor(step, self.total_steps, self.warmup_steps)

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
    if optimizer in OPTIMIZERS:
        return OPTIMIZERS[optimizer].scaling
    name = optimizer.lower()
    if name == "sgd":
        return "linear"
    return "sqrt" if "adam" in name or "lamb" in name else None
