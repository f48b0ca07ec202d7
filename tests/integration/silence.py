"""What our own commands print, so that a test can tell whatever else there is."""

from __future__ import annotations

import re

_PATTERNS = (
    r"Note: \S.*",
    r"\S+ on \S+: \d+ training images, \d rank\(s\), ZeRO-\d, \d+ steps of \d+ images; .*",
    r"(Run folder|Continuing from|Picture|Record): ?\S.*",
    r"epoch +\d+\.\d of \d+\.\d \| validation .* \| training .*",
    r"Training the natural twin, for comparison\.",
    r"(Of|Test set|The (adversarially|naturally) trained model:) .*",
    r"\S+-\d+: +\d+\.\d%",
)
_OURS = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS))


def unexpected(output: str) -> list[str]:
    """Lines that none of our commands prints."""
    return [line for line in output.splitlines() if line and not _OURS.fullmatch(line)]
