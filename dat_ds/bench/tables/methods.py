"""Every attack and objective on digits: clean and robust accuracy, and seconds of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat_ds.attacks import ATTACKS, NoAttack
from dat_ds.bench.tables.runs import compare_runs, run_folder
from dat_ds.objectives import OBJECTIVES, Objective

JUDGES = ("pgd-20", "apgd-ce-50", "apgd-dlr-50")
"""Attacks that judge the models."""

NATURAL, NATURAL_ON_FEW_LABELS = "natural", "natural 10% labels"

_STEPS = {"steps": 3, "step_size": "1/16"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "mim": _STEPS,
    "apgd": {"steps": 3},
    "fat": {**_STEPS, "extra_steps": 1},
    "multi_norm": {"steps": 3, "other_norms": {"l2": 0.5}},
    "free": {"replays": 4},
}
"""Options of attacks that would not compare with the others by their defaults."""

_SCHEDULES: dict[str, dict[str, Any]] = {"free": {"epochs": 15}}
"""``free`` learns from every replay, so it needs fewer epochs."""


def rows_of(folder: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Nested keys over the config of each row of the table.

    Args:
        folder: Where the runs lie: some learn from the model of another row.
        seed: Of that model.

    Returns:
        A row for each attack and each objective that learns classes, and for what goes beside them.
    """
    attacks = {_row_of_attack(name): _of_attack(name) for name in ATTACKS}
    helper = {"helper_model": str(run_folder(folder, NATURAL, seed))}
    objectives = {
        name: {
            "objective": {"name": name, **(helper if kind.needs_helper_logits else {})},
            **_partner(kind),
        }
        for name, kind in OBJECTIVES.items()
        if kind.head == "classes" and name != OBJECTIVES.default
    }
    labeller = run_folder(folder, NATURAL_ON_FEW_LABELS, seed)
    rows = {**attacks, **objectives, **_beside(), **_few_labels(labeller)}
    return {name: {"dat": changes} for name, changes in rows.items()}


def compare_methods(
    config: Path,
    folder: Path,
    names: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0,),
    output: Path | None = None,
) -> str:
    """Train and judge the rows: see :func:`dat_ds.bench.tables.runs.compare_runs`.

    Args:
        config: The run that all rows change: its data, model and schedule.
        folder: For the runs.
        names: Rows; none means all.
        seeds: Of the runs.
        output: File for the numbers of every run.
    """
    return compare_runs(
        config,
        folder,
        lambda seed: rows_of(folder, seed),
        JUDGES,
        names=names,
        seeds=seeds,
        output=output,
    )


def _row_of_attack(name: str) -> str:
    return NATURAL if ATTACKS[name] is NoAttack else name


def _of_attack(name: str) -> dict[str, Any]:
    schedule = {"schedule": _SCHEDULES[name]} if name in _SCHEDULES else {}
    return {"attack": {"name": name, **_SETTINGS.get(name, {})}, **schedule}


def _partner(objective: type[Objective]) -> dict[str, Any]:
    """An attack that says where it started, for an objective that compares with that."""
    partners = (name for name, attack in ATTACKS.items() if attack.tells_start)
    return {"attack": {"name": next(partners)}} if objective.needs_start_logits else {}


def _beside() -> dict[str, dict[str, Any]]:
    """Other sections that go with an attack, or with an objective."""
    return {
        "pgd keep_tokens": {"attack": {**_STEPS, "keep_tokens": 0.75}},
        "fgsm grad_align": {"attack": {"name": "fgsm"}, "objective": {"grad_align": 0.2}},
        "pgd awp": {"weight_perturbation": {"name": "awp", "start": 0.2}},
        "pgd sam": {"weight_perturbation": {"name": "sam"}},
        "pgd mixup": {"data": {"mixup": 0.2}},
    }


def _few_labels(labeller: Path) -> dict[str, dict[str, Any]]:
    """Labels for a tenth of the images, with and without the other images."""
    few, labelled = {"labelled_fraction": 0.1}, {"labelled_fraction": 0.1, "drop_unlabelled": True}
    trades = {"name": "trades"}
    return {
        NATURAL_ON_FEW_LABELS: {"attack": {"name": "none"}, "data": labelled},
        "pgd 10% labels": {"data": labelled},
        "trades 10% labels and the other images": {"data": few, "objective": trades},
        "trades 10% labels and pseudo-labels": {
            "data": {**few, "pseudo_labels": str(labeller)},
            "objective": trades,
        },
    }
