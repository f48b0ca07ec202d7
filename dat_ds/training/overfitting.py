"""Robust overfitting: robust accuracy on held-out images falls while training goes on.

Rice et al., ICML 2020, arXiv 2002.11569: robust test error rises after the first decay of the
learning rate, over most of a run, while robust training error still falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dat_ds.evaluation.samples import wilson_interval


def falls_in_a_row(
    history: Sequence[Mapping[str, Any]], attack: str, margin: float | None = None
) -> int:
    """How many of the latest validations, in a row, have fallen below the best one before them.

    Args:
        history: Validations in order: ``robust_acc`` by attack, and ``num_examples``.
        attack: Whose accuracy counts.
        margin: Fall that is allowed, as a fraction. None: as long as the Wilson 95 % intervals of
            both accuracies meet.
    """
    best: tuple[float, int] | None = None
    count = 0
    for row in history:
        now = (float(row["robust_acc"][attack]), int(row["num_examples"]))
        if best is None or now[0] >= best[0]:
            best, count = now, 0
        else:
            count = count + 1 if _has_fallen(best, now, margin) else 0
    return count


def _has_fallen(best: tuple[float, int], now: tuple[float, int], margin: float | None) -> bool:
    if margin is not None:
        # The tiny shift keeps a fall of the margin itself from counting by rounding.
        return best[0] - now[0] > margin + 1e-9
    return _interval(*now)[1] < _interval(*best)[0]


def _interval(share: float, count: int) -> tuple[float, float]:
    return wilson_interval(round(share * count), count)
