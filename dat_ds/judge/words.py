"""Numbers and advice as a report words them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Section = tuple[str, str, str]
"""``(key, title, body)`` of a page."""
AGAIN = "dat-ds eval TARGET --attacks standard --output DIR"
"""Command that measures what a report lacks."""
_SPACE = "\u00a0"  # which no line is broken at


def percent_of(share: float) -> str:
    """``"54.5 %"``."""
    return f"{100 * share:.1f}{_SPACE}%"


def interval_of(ends: Sequence[float]) -> str:
    """``"47.6 to 61.3 %"``."""
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}{_SPACE}%"


def count_of(value: float | None) -> str:
    """A count with thousands apart, or a measurement with one digit after the point."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def short_of(value: float | None) -> str:
    """Four digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def data_in_words(data: Mapping[str, Any]) -> str:
    """Name of the images, and of their file where there is one."""
    name, path = str(data.get("name") or ""), data.get("path")
    file = Path(str(path)).name if path else ""
    return f"{name} ({file})" if name and file else name or file
