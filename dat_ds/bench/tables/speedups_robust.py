"""Robust accuracy with what makes attack passes cheaper, over seeds, on digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dat_ds.bench.tables.runs import compare_runs

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


def rows_of_all() -> dict[str, dict[str, Any]]:
    """Nested keys over the config, by network and row."""
    return {
        f"{kind}, {row}": {
            **changes,
            "dat": {
                **changes.get("dat", {}),
                "model": network.model,
                "schedule": {"epochs": network.epochs},
            },
        }
        for kind, network in NETWORKS.items()
        for row, changes in network.rows.items()
    }


def compare_speedups(
    config: Path, folder: Path, *, seeds: Sequence[int] = SEEDS, output: Path | None = None
) -> str:
    """Train and judge every row: see :func:`dat_ds.bench.tables.runs.compare_runs`.

    Args:
        config: The run that all rows change: its data, threat model and schedule.
        folder: For the runs.
        seeds: Of the runs.
        output: File for the numbers of every run.
    """
    rows = rows_of_all()
    return compare_runs(config, folder, lambda _: rows, JUDGES, seeds=seeds, output=output)
