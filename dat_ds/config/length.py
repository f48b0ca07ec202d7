"""Lengths in pixel units that remember how they were written."""

from __future__ import annotations

from dat_ds.attacks import parse_length


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

    def __repr__(self) -> str:
        return str(self.text)

    def __reduce__(self) -> tuple[type[Length], tuple[float | str]]:
        return Length, (self.text,)
