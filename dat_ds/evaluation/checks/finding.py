"""Findings of checks, and the rows of the tables that hold the checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Status = Literal["ok", "suspicious", "failed", "skipped"]
"""``"failed"``: the reported numbers cannot be trusted. ``"suspicious"``: they need an explanation.
``"skipped"``: nothing was learned."""

ALARMS: tuple[Status, ...] = ("failed", "suspicious")

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Args:
        name: Name of the check.
        status: Verdict.
        found: What was measured, in words.
        meaning: What it means for the evaluation where the verdict is not ``"ok"``.
        remedy: What to do then.
        value: The measured number; None where there is none.
    """

    name: str
    status: Status
    found: str
    meaning: str
    remedy: str
    value: float | None = None

    @property
    def is_alarm(self) -> bool:
        """Whether it is suspicious or failed."""
        return self.status in ALARMS

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values: an entry of ``"checks"`` in ``evaluation.json``."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Measured:
    """What a check measured: verdict, words and number of its :class:`Finding`."""

    status: Status
    found: str
    value: float | None = None


RANDOM = Measured("skipped", "the model draws random numbers, which hides it")


def verdict(
    alarm: bool, found: str, value: float | None = None, *, fails: bool = False
) -> Measured:
    """``"ok"``, or where there is an alarm ``"suspicious"``, or ``"failed"`` where ``fails``."""
    if not alarm:
        return Measured("ok", found, value)
    return Measured("failed" if fails else "suspicious", found, value)


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """A named check.

    Args:
        name: As in the records.
        measure: Does it.
        meaning: Of its alarm.
        remedy: What to do about it.
    """

    name: str
    measure: Callable[[Subject], Measured]
    meaning: str
    remedy: str

    def finding(self, measured: Measured) -> Finding:
        """The finding for what was measured."""
        return Finding(
            self.name,
            measured.status,
            measured.found,
            self.meaning,
            self.remedy,
            measured.value,
        )
