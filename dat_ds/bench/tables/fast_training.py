"""Training with single-step attacks, and with Muon, over seeds, on digits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat_ds.bench.tables.runs import (
    judged_by,
    markdown,
    record_of,
    run_of,
    spread,
    unknown_rows,
)
from dat_ds.errors import ConfigError
from dat_ds.evaluation import commit
from dat_ds.files import check_files, write_json

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


def changes_of(row: str, seed: int, epochs: float | None = None) -> dict[str, Any]:
    """Nested keys that a run of the table changes in its config.

    Args:
        row: One of :data:`ROWS`.
        seed: Of the run.
        epochs: Length of the run in the place of the config's.
    """
    changes = ROWS[row].get("dat", {})
    schedule = {} if epochs is None else {"schedule": {"epochs": epochs}}
    return {"dat": {**changes, **schedule, "seed": seed, "evaluation": judged_by(JUDGES)}}


def compare_fast_training(
    config: Path,
    folder: Path,
    names: Sequence[str] = (),
    *,
    epochs: float | None = None,
    output: str | None = None,
) -> str:
    """Train and judge the rows with every seed.

    Args:
        config: The run that all rows change: its data, threat model and schedule.
        folder: For the runs; one that is there already is not trained again.
        names: Rows; none means all.
        epochs: Length of the runs in the place of the config's.
        output: File for the numbers of every run.

    Returns:
        Markdown: mean and standard deviation of accuracies in percent, median seconds of training.

    Raises:
        ConfigError: For unknown rows, a length that is none, or a file that cannot be written,
            before anything is trained.
    """
    if problems := unknown_rows(names, ROWS):
        raise ConfigError("\n".join(problems))
    check_files(output=output)
    for row in names or ROWS:
        run_of(config, changes_of(row, SEEDS[0], epochs))
    cells, numbers = [], {}
    for row in names or ROWS:
        records = [
            record_of(folder / f"{row} {seed}", config, changes_of(row, seed, epochs))
            for seed in SEEDS
        ]
        accuracies = [[record["natural_acc"] for record in records]]
        accuracies += [[record["robust_acc"][name] for record in records] for name in JUDGES]
        seconds = [record["seconds"]["train"] for record in records]
        cells.append([row, *map(spread, accuracies), f"{statistics.median(seconds):.0f}"])
        keys = ("seed", "natural_acc", "robust_acc", "num_examples", "seconds", "steps", "config")
        numbers[row] = [{key: record[key] for key in keys} for record in records]
    header = ["training", "clean %", *(f"{judge} %" for judge in JUDGES), "train s"]
    table = markdown(header, cells)
    if output is not None:
        write_json(Path(output), {"table": table, "commit": commit(), "rows": numbers})
    return table
