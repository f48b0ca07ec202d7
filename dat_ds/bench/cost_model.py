"""Seconds of an adversarial step from what its parts cost: latency, bandwidth and computation.

A message of ``n`` bytes takes ``alpha + beta n`` (Hockney, Parallel Computing 1994). Collectives
are those of Thakur, Rabenseifner and Gropp, IJHPCA 2005, on rings of ``p`` ranks::

    reduce-scatter, all-gather    (p - 1) alpha +     (p - 1) / p n beta
    all-reduce                  2 (p - 1) alpha + 2 (p - 1) / p n beta
    all-to-all (pairwise)         (p - 1) alpha +     (p - 1) / p n beta

``n`` is the whole tensor: what is reduced, gathered, or split among the ranks. Computation is
``(2 K + 3) F`` for an attack of ``K`` steps, ``F`` being one forward: see
:mod:`dat_ds.bench.step_time`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
_HALVES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Link:
    """What a message costs.

    Args:
        alpha: Seconds of a message of no length (latency).
        beta: Seconds a byte: ``8e-6 / beta`` megabits a second, in each direction.
    """

    alpha: float
    beta: float

    @classmethod
    def of(cls, *, mbit: float, microseconds: float) -> Link:
        """A link of a bandwidth and a latency."""
        return cls(microseconds * 1e-6, 8e-6 / mbit)

    @property
    def mbit(self) -> float:
        """Megabits a second, in each direction."""
        return 8e-6 / self.beta


def collective_seconds(
    collective: Collective, num_bytes: float, ranks: int, link: Link, *, calls: int = 1
) -> float:
    """Seconds of collectives over ranks with a link each; 0 for one rank.

    Args:
        collective: Which.
        num_bytes: Of the whole tensor, over all calls together.
        ranks: Number of ranks.
        link: Of every rank.
        calls: How many collectives the bytes are spread over.
    """
    if ranks == 1:
        return 0.0
    halves = _HALVES[collective]
    share = (ranks - 1) / ranks
    return halves * (calls * (ranks - 1) * link.alpha + share * num_bytes * link.beta)


def fit_link(collective: Collective, ranks: int, samples: Sequence[tuple[int, float]]) -> Link:
    """Alpha and beta of timed collectives of one kind, by least squares of relative errors.

    Args:
        collective: Which.
        ranks: At least 2.
        samples: ``(bytes, seconds)`` of at least 2 sizes.

    Returns:
        Neither alpha nor beta is negative.
    """
    rows = [
        [collective_seconds(collective, size, ranks, Link(a, b)) for a, b in ((1, 0), (0, 1))]
        for size, _ in samples
    ]
    alpha, beta = non_negative_fit(rows, [seconds for _, seconds in samples])
    return Link(alpha, beta)


def link_error(
    collective: Collective, ranks: int, samples: Sequence[tuple[int, float]], link: Link
) -> float:
    """Largest relative error of a link's prediction of the samples that it was fitted to."""
    return max(
        abs(collective_seconds(collective, size, ranks, link) / seconds - 1)
        for size, seconds in samples
    )


def non_negative_fit(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Coefficients, none negative, of least relative squared error ``|rows c / targets - 1|^2``.

    Args:
        rows: What each coefficient is multiplied by, for every target.
        targets: Positive.

    Returns:
        A coefficient for each column; 0 for a column of zeros.
    """
    matrix = np.asarray(rows, dtype=np.float64) / np.asarray(targets, dtype=np.float64)[:, None]
    norms = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(norms > 0, norms, 1)
    # Few columns: the best of all choices of those that are not zero is the exact answer.
    best, best_error = np.zeros(matrix.shape[1]), math.inf
    for chosen in range(1, 2 ** matrix.shape[1]):
        columns = [i for i in range(matrix.shape[1]) if chosen >> i & 1 and norms[i] > 0]
        found, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(len(matrix)), rcond=None)
        error = float(np.square(scaled[:, columns] @ found - 1).sum())
        if (found >= 0).all() and error < best_error - 1e-12:
            best, best_error = np.zeros(matrix.shape[1]), error
            best[columns] = found / norms[columns]
    return [float(value) for value in best]
