"""What a folder holds about a model: its evaluation, samples, curves and training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dat_ds.errors import DataError
from dat_ds.evaluation.samples import EVALUATION, SAMPLES, wilson_interval

RECORD, CURVES, METRICS = "record.json", "curves.json", "metrics.jsonl"

_KEYS = {"natural_acc", "robust_acc", "num_examples"}
_HOW = "Write one with: dat-ds eval TARGET --attacks standard --output DIR"


@dataclass(frozen=True)
class Evidence:
    """Everything that a report shows.

    Args:
        folder: Of the evaluation.
        run: Folder of the run that was evaluated; ``folder`` where there is none.
        evaluation: In the form of ``evaluation.json``; of a run's record where there is no other.
        record: A run's ``record.json``; None where there is none.
        samples: Rows of ``samples.jsonl``.
        curves: ``curves.json``; None where there is none.
        metrics: Rows of ``metrics.jsonl``.
        files: The files that were read.
    """

    folder: Path
    run: Path
    evaluation: dict[str, Any]
    record: dict[str, Any] | None
    samples: list[dict[str, Any]]
    curves: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    files: list[Path]

    @property
    def is_ensemble(self) -> bool:
        """Whether an ensemble of attacks ran, so that what stands may be called robust."""
        return self.evaluation.get("ensemble") is not None

    @property
    def attack_names(self) -> list[str]:
        """The attacks, in order."""
        return [attack["name"] for attack in self.evaluation["attacks"]]

    @property
    def worst_case(self) -> float | None:
        """Fraction of the images that withstands every attack; None where there was no attack."""
        found: float | None = self.evaluation["robust_acc"].get("all")
        return found

    def worst_case_in_words(self) -> str:
        """Its name: ``"robust accuracy"`` of an ensemble, else that of the attacks."""
        if self.is_ensemble:
            return "robust accuracy"
        names = self.attack_names
        return f"accuracy under {names[0] if len(names) == 1 else f'{len(names)} attacks'}"


def read_evidence(folder: Path) -> Evidence:
    """Read what a folder holds.

    Of a run, the evaluation in its folder ``evaluation/`` is taken where there is one, and of an
    evaluation, the record and the metrics of the run that was its target.

    Args:
        folder: Folder of a run or of an evaluation.

    Raises:
        DataError: With every file that cannot be read, or if there is no result at all.
    """
    problems: list[str] = []
    read: list[Path] = []

    def values(path: Path) -> dict[str, Any] | None:
        found: dict[str, Any] | None = _tried(path, json.loads, dict, problems, read)
        return found

    def rows(path: Path) -> list[dict[str, Any]]:
        return _tried(path, _rows, list, problems, read) or []

    home = folder / "evaluation"
    home = home if (home / EVALUATION).is_file() else folder
    evaluation = values(home / EVALUATION)
    run = _run_of(folder, evaluation)
    record = values(run / RECORD)
    for found, path in ((evaluation, home / EVALUATION), (record, run / RECORD)):
        if found is not None and not found.keys() >= _KEYS:
            missing = ", ".join(sorted(_KEYS - found.keys()))
            problems.append(f"{path} is not a result of dat-ds: it lacks {missing}. {_HOW}")
    if not problems and evaluation is None and record is None:
        problems.append(f"No result at {str(folder)!r}: neither {EVALUATION} nor {RECORD}. {_HOW}")
    samples, curves, metrics = rows(home / SAMPLES), values(home / CURVES), rows(run / METRICS)
    if problems:
        raise DataError("\n".join(problems))
    chosen = evaluation or record or {}
    return Evidence(
        folder=home,
        run=run,
        evaluation=chosen if "attacks" in chosen else _evaluation_of(chosen, folder),
        record=record,
        samples=samples,
        curves=curves,
        metrics=metrics,
        files=read,
    )


def _run_of(folder: Path, evaluation: Mapping[str, Any] | None) -> Path:
    """The folder of the run that was evaluated; ``folder`` where the target is none."""
    if (folder / RECORD).exists() or evaluation is None:
        return folder
    target = Path(str(evaluation.get("target", "")))
    try:
        return target if (target / RECORD).is_file() else folder
    except OSError:  # a target's name need not be a path
        return folder


def _tried(path: Path, parse: Any, kind: type, problems: list[str], read: list[Path]) -> Any:
    """The contents of a file; None where there is no file, or its problem was added."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"Cannot read {path}: {error}.")
        return None
    try:
        found = parse(text)
        if not isinstance(found, kind):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        problems.append(f"{path} is damaged: {error}. Remove it, or write it again.")
        return None
    read.append(path)
    return found


def _rows(text: str) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a last line that was cut off by a crash is left out."""
    lines, found = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"line {number} is not JSON") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        found.append(row)
    return found


def _evaluation_of(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A record of attacks that each saw all images, in the form of ``evaluation.json``.

    Images that withstand all attacks are counted where the record holds their outcomes.
    """
    total = record["num_examples"]
    outcomes = record.get("outcomes") or {}
    natural = record["natural_acc"]
    attacked = None if natural is None else round(natural * total)
    attacks = [
        {"name": name, "attacked": attacked, "broken": (attacked or 0) - round(share * total)}
        for name, share in record["robust_acc"].items()
    ]
    robust = dict(record["robust_acc"])
    columns = [outcomes[name] for name in robust if name in outcomes]
    if robust and len(columns) == len(robust):
        standing = sum(all(flag == "1" for flag in flags) for flags in zip(*columns, strict=True))
        robust["all"] = standing / total if total else 0.0
    elif len(robust) == 1:
        robust["all"] = next(iter(robust.values()))
    shares = {"natural_acc": natural, "all": robust.get("all")}
    dat = (record.get("config") or {}).get("dat", {})
    seconds = record.get("seconds", {})
    return {
        **{key: value for key, value in record.items() if key != "outcomes"},
        "target": str(folder),
        "threat_model": dat.get("threat_model"),
        "data": {"name": dat.get("data", {}).get("name", "")},
        "ensemble": None,
        "attacks": attacks,
        "robust_acc": robust,
        "intervals": {
            key: list(wilson_interval(round(share * total), total))
            for key, share in shares.items()
            if share is not None
        },
        "seconds": seconds.get("evaluate") if isinstance(seconds, Mapping) else seconds,
        "is_cumulative": False,
    }
