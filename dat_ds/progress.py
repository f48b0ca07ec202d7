"""What this process is doing, for the thread that watches over its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

# "step" is what a step does besides reading data, the attack and the update.
Phase = Literal[
    "start", "data", "attack", "update", "step", "guard", "validation", "checkpoint", "evaluation"
]


class Progress:
    """Phase and optimizer step of this process; other threads only read them.

    Attributes:
        phase: Entered last.
        step: Optimizer steps done.
        count: Grows whenever one of the two is set.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = 0
        self.count = 0

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Begin a phase; ``step`` stays as it is if None."""
        self.phase = phase
        self.step = self.step if step is None else step
        self.count += 1

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Be in a phase inside, and afterwards in the former one."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


PROGRESS = Progress()
"""Of this process."""
