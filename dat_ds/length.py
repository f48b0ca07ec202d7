"""Lengths in pixel units that remember how they were written."""

from __future__ import annotations


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
