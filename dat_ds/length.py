"""Lengths in pixel units, and shares of eps, that remember how they were written."""

from __future__ import annotations

import re
from dataclasses import dataclass

_OF_EPS = re.compile(r"\s*(?:([0-9.]+)\s*\*?\s*)?eps(?:\s*/\s*([0-9.]+))?\s*")


class Length(float):
    """A length in pixel units; prints as it was written, ``"8/255"`` or ``0.03``.

    Args:
        value: A number, or a fraction such as ``"8/255"``.

    Raises:
        ValueError: If ``value`` is neither.
    """

    text: float | str

    def __new__(cls, value: float | str) -> Length:
        """Parse ``value`` and remember it."""
        length = super().__new__(cls, parse_length(value))
        length.text = value.text if isinstance(value, Length) else value
        return length

    def scaled(self, factor: float) -> Length:
        """``factor`` times this length, written as a fraction where this one is."""
        if isinstance(self.text, str) and "/" in self.text:
            numerator, denominator = self.text.split("/")
            return Length(f"{float(numerator) * factor:g}/{denominator.strip()}")
        return Length(float(self) * factor)

    def __repr__(self) -> str:
        return str(self.text)

    def __reduce__(self) -> tuple[type[Length], tuple[float | str]]:
        return Length, (self.text,)


def parse_length(value: float | str) -> float:
    """A length in pixel units from a number or a fraction: ``"8/255"`` is 8 / 255.

    Raises:
        ValueError: If the text is neither.
    """
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            return float(numerator) / float(denominator) if slash else float(numerator)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is not a length: write 0.03 or '8/255'.") from None
    try:
        return float(value)
    except TypeError:
        raise ValueError(f"{value!r} is not a length: write 0.03 or '8/255'.") from None


@dataclass(frozen=True)
class OfEps:
    """A multiple of eps.

    Args:
        text: As it was written, ``"eps/4"``, ``"1.25 eps"`` or ``"2.5 eps/20"``.

    Raises:
        ValueError: If the text is none.
    """

    text: str

    def __post_init__(self) -> None:
        if not 0 <= self.share < float("inf"):
            raise ValueError(f"{self.text!r} is not a multiple of eps: write 'eps/4'.")

    @property
    def share(self) -> float:
        """The multiple."""
        found = _OF_EPS.fullmatch(self.text)
        try:
            if found is not None:
                return float(found[1] or 1) / float(found[2] or 1)
        except (ValueError, ZeroDivisionError):
            pass
        raise ValueError(f"{self.text!r} is not a multiple of eps: write 'eps/4' or '1.25 eps'.")


def parse_step(value: float | str) -> Length | OfEps:
    """A step size: a length, or where the text names eps, a multiple of it.

    Raises:
        ValueError: If the text is neither.
    """
    if isinstance(value, str) and "eps" in value:
        return OfEps(value)
    return Length(value)
