"""Records side by side, as a markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat_ds.errors import DataError

_KEYS = {"natural_acc", "num_examples", "ranks", "robust_acc", "seconds"}
_OF_RUN, _OF_TARGET = {"config", "natural"}, {"attacks", "target"}


def report_table(paths: Sequence[Path]) -> str:
    """One row per record, with every attack that any of them was evaluated under.

    An evaluation of a target gives each attack the images that stand those before it: of the later
    ones the accuracy counts as that after all so far.

    Args:
        paths: Folders of runs (their ``record.json``) or of evaluations (``evaluation.json``), or
            such files.

    Returns:
        A markdown table; accuracies in percent.

    Raises:
        DataError: With every path that holds no record.
    """
    records, problems = {}, []
    for path in paths:
        file = _file_in(path) if path.is_dir() else path
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            records[str(path)] = _readable(record)
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


def _file_in(folder: Path) -> Path:
    record, evaluation = folder / "record.json", folder / "evaluation.json"
    return evaluation if evaluation.exists() and not record.exists() else record


def _readable(record: Any) -> dict[str, Any]:
    """A record with its accuracies by the names of the table's columns.

    Raises:
        ValueError: For anything else.
    """
    keys = record.keys() if isinstance(record, dict) else set()
    if not keys >= _KEYS or not (keys >= _OF_RUN or keys >= _OF_TARGET):
        raise ValueError("not a record of dat-ds train or eval")
    if not keys >= _OF_TARGET:
        return dict(record)
    names = [attack["name"] for attack in record["attacks"]]
    robust = {
        name if number == 0 else f"after {name}": record["robust_acc"][name]
        for number, name in enumerate(names)
    }
    return {**record, "robust_acc": robust}


def _row(
    name: str, record: dict[str, Any], attacks: Sequence[str], losses: Sequence[str]
) -> list[str]:
    config, robust = record.get("config"), record["robust_acc"]
    seconds = record["seconds"].get("train") if isinstance(record["seconds"], dict) else None
    loss_of = {"natural": record.get("natural_loss"), **record.get("robust_loss", {})}
    shown_losses = [loss_of.get(loss) for loss in ("natural", *losses)] if losses else []
    return [
        name,
        record["target"] if config is None else config["dat"]["model"]["name"],
        "-" if config is None else describe_training(config["dat"]),
        "-" if config is None else str(config["zero_optimization"]["stage"]),
        str(record["ranks"]),
        "-" if record["natural_acc"] is None else f"{100 * record['natural_acc']:.1f}",
        *(f"{100 * robust[a]:.1f}" if a in robust else "not measured" for a in attacks),
        *("-" if loss is None else f"{loss:.4g}" for loss in shown_losses),
        str(record["num_examples"]),
        f"{seconds:.0f}" if seconds is not None else "-",
    ]
