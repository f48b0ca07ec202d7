"""Training with single-step attacks, and with Muon, over seeds, on digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat_ds.bench.tables.runs import compare_runs

JUDGES = ("pgd-20", "apgd-ce-50", "apgd-t-50")
"""Attacks that judge the models."""

SEEDS = (0, 1, 2)

ROWS: dict[str, dict[str, Any]] = {
    "pgd": {},
    "n_fgsm": {"dat": {"attack": {"name": "n_fgsm"}}},
    "zero_grad": {"dat": {"attack": {"name": "zero_grad"}}},
    "guided + gat": {"dat": {"attack": {"name": "guided"}, "objective": {"name": "gat"}}},
    "guided + nuat": {
        "dat": {
            "attack": {"name": "guided", "guide": "nuclear", "guide_weight": 4.5},
            "objective": {"name": "nuat"},
        }
    },
    "fgsm_pgi + pgi": {"dat": {"attack": {"name": "fgsm_pgi"}, "objective": {"name": "pgi"}}},
    "pgd, our adamw": {"dat": {"optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01}}},
    "pgd, muon": {"dat": {"optimizer": {"name": "muon", "lr": 0.003, "weight_decay": 0.01}}},
}
"""Nested keys over the config, by row."""


def compare_fast_training(
    config: Path,
    folder: Path,
    names: Sequence[str] = (),
    *,
    epochs: float | None = None,
    seeds: Sequence[int] = SEEDS,
    output: Path | None = None,
) -> str:
    """Train and judge the rows with every seed: see :func:`dat_ds.bench.tables.runs.compare_runs`.

    Args:
        config: The run that all rows change: its data, threat model and schedule.
        folder: For the runs.
        names: Rows; none means all.
        epochs: Length of the runs in the place of the config's.
        seeds: Of the runs.
        output: File for the numbers of every run.
    """
    schedule = {} if epochs is None else {"schedule": {"epochs": epochs}}
    rows = {row: {"dat": {**changes.get("dat", {}), **schedule}} for row, changes in ROWS.items()}
    return compare_runs(
        config, folder, lambda _: rows, JUDGES, names=names, seeds=seeds, output=output
    )
