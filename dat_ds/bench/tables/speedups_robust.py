"""Robust accuracy with what makes attack passes cheaper, over seeds, on digits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dat_ds.bench.tables.runs import judged_by, markdown, record_of, spread

JUDGES = ("pgd-20", "apgd-ce-50")
"""Attacks that judge the models, in float32."""

SEEDS = (0, 1, 2)

_OF_BOTH: dict[str, dict[str, Any]] = {
    "float32": {},
    "attack in bf16": {"dat": {"attack": {"precision": "bf16"}}},
    "compiled": {"dat": {"engine": {"compile": "all"}}},
}


@dataclass(frozen=True)
class Network:
    """A network, and what its rows change.

    Args:
        model: ``dat.model``.
        epochs: Of training.
        rows: Nested keys over the config, by row.
    """

    model: Mapping[str, Any]
    epochs: int
    rows: Mapping[str, Mapping[str, Any]]


NETWORKS = {
    "ViT": Network(
        model={},
        epochs=30,
        rows={
            **_OF_BOTH,
            "attack in int8": {"dat": {"attack": {"precision": "int8"}}},
            "attack in fp8": {"dat": {"attack": {"precision": "fp8"}}},
            "4 micro-batches attacked as one": {
                "train_micro_batch_size_per_gpu": 16,
                "gradient_accumulation_steps": 4,
                "dat": {"engine": {"attack_micro_batches": 4}},
            },
        },
    ),
    "CNN": Network(
        model={"name": "resnet18", "stem": "cifar", "options": {"channels": [16, 32, 64, 128]}},
        epochs=10,
        rows={
            **_OF_BOTH,
            "channels last": {"dat": {"engine": {"channels_last": True}}},
            "BatchNorm folded": {"dat": {"attack": {"fold_batch_norm": True}}},
        },
    ),
}
"""The networks of the table by name."""


def changes_of(network: Network, row: str, seed: int) -> dict[str, Any]:
    """Nested keys that a run of the table changes in its config."""
    changes = network.rows[row]
    dat = {
        **changes.get("dat", {}),
        "model": network.model,
        "seed": seed,
        "schedule": {"epochs": network.epochs},
        "evaluation": judged_by(JUDGES),
    }
    return {**changes, "dat": dat}


def compare_speedups(config: Path, folder: Path) -> str:
    """Train and judge every row with every seed.

    Args:
        config: The run that all rows change: its data, threat model and schedule.
        folder: For the runs; one that is there already is not trained again.

    Returns:
        Markdown: mean and standard deviation of accuracies in percent, median seconds of training.
    """
    cells = []
    for kind, network in NETWORKS.items():
        for row in network.rows:
            records = [
                record_of(folder / f"{kind} {row} {seed}", config, changes_of(network, row, seed))
                for seed in SEEDS
            ]
            accuracies = [[record["natural_acc"] for record in records]]
            accuracies += [[record["robust_acc"][name] for record in records] for name in JUDGES]
            seconds = statistics.median(record["seconds"]["train"] for record in records)
            cells.append([f"{kind}, {row}", *map(spread, accuracies), f"{seconds:.0f}"])
    header = ["training", "clean %", *(f"{judge} %" for judge in JUDGES), "train s"]
    return markdown(header, cells)
