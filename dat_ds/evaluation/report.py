"""Records side by side, as a markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat_ds.errors import DataError

_KEYS = {"config", "natural", "natural_acc", "num_examples", "ranks", "robust_acc", "seconds"}


def report_table(paths: Sequence[Path]) -> str:
    """One row per record, with every attack that any of them was evaluated under.

    Args:
        paths: Folders of runs (their ``record.json``), or record files.

    Returns:
        A markdown table; accuracies in percent.

    Raises:
        DataError: With every path that holds no record.
    """
    records, problems = {}, []
    for path in paths:
        file = path / "record.json" if path.is_dir() else path
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or not record.keys() >= _KEYS:
                raise ValueError("not a record of dat-ds train or eval")
            records[str(path)] = record
        except (OSError, ValueError) as error:
            problems.append(f"No record at {str(file)!r}: {error}.")
    if problems:
        raise DataError("\n".join(problems))
    attacks = sorted({name for record in records.values() for name in record["robust_acc"]})
    header = ["run", "model", "training", "ZeRO", "ranks", "clean %", *(f"{a} %" for a in attacks)]
    losses = sorted({name for record in records.values() for name in record.get("robust_loss", {})})
    header += ["clean loss", *(f"{name} loss" for name in losses)] if losses else []
    header += ["images", "train s"]
    rows = [header, ["---"] * len(header)]
    rows += [_row(name, record, attacks, losses) for name, record in records.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe_training(dat: dict[str, Any]) -> str:
    """Attack, objective and weight perturbation in a few words: ``"trades pgd-10 awp"``.

    Args:
        dat: A resolved ``"dat"`` section, as a record holds it.
    """
    attack, objective = dat["attack"], dat["objective"]
    if attack["name"] == "none":
        learns_classes = objective["name"] in ("at", "dat")
        return "natural" if learns_classes else f"{objective['name']} natural"
    words = [] if objective["name"] == "at" else [objective["name"]]
    words.append(f"{attack['name']}-{attack.get('steps', 1)}")
    perturbation = dat.get("weight_perturbation", {}).get("name", "none")
    return " ".join([*words, *([] if perturbation == "none" else [perturbation])])


def _row(
    name: str, record: dict[str, Any], attacks: Sequence[str], losses: Sequence[str]
) -> list[str]:
    dat, robust = record["config"]["dat"], record["robust_acc"]
    seconds = record["seconds"].get("train")
    loss_of = {"natural": record.get("natural_loss"), **record.get("robust_loss", {})}
    shown_losses = [loss_of.get(loss) for loss in ("natural", *losses)] if losses else []
    return [
        name,
        dat["model"]["name"],
        describe_training(dat),
        str(record["config"]["zero_optimization"]["stage"]),
        str(record["ranks"]),
        "-" if record["natural_acc"] is None else f"{100 * record['natural_acc']:.1f}",
        *(f"{100 * robust[a]:.1f}" if a in robust else "not measured" for a in attacks),
        *("-" if loss is None else f"{loss:.4g}" for loss in shown_losses),
        str(record["num_examples"]),
        f"{seconds:.0f}" if seconds is not None else "-",
    ]
