"""Runs that differ in a few keys, and the tables made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_ds.config import RunConfig, load_config
from dat_ds.errors import ConfigError, UserError
from dat_ds.files import check_files, write_json
from dat_ds.training.run import train

KEPT = (
    *("seed", "natural_acc", "robust_acc", "num_examples", "seconds", "ranks", "steps", "config"),
    *("commit", "versions", "hardware"),
)
"""Keys of a run's record that a table's file keeps."""


def run_of(config: Path, changes: Mapping[str, Any]) -> RunConfig:
    """The run of a config file with a few keys changed.

    Args:
        config: The JSON that all runs of a table share.
        changes: Nested keys over it. A section that names another method than the file does takes
            over none of the file's options for it.
    """
    defaults = json.loads(config.read_text(encoding="utf-8"))
    if "optimizer" in changes.get("dat", {}):
        defaults.pop("optimizer", None)  # DeepSpeed's, in the place of which it stands
    return load_config(changes, defaults=defaults)


def record_of(folder: Path, config: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run, trained now unless it is there.

    Args:
        folder: The run's; a run that was broken off there goes on.
        config: The JSON that all runs of a table share.
        changes: Nested keys over it, as :func:`run_of` takes them.

    Raises:
        UserError: For mistakes in the config, and where SIGTERM stopped the run.
    """
    file = folder / "record.json"
    if not file.exists():
        dat = {**changes.get("dat", {}), "output_dir": str(folder)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        if train(run_of(config, {**changes, "dat": dat}), resume="auto") is None:
            raise UserError(f"Stopped in {folder}: repeat the command to go on from there.")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def unknown_rows(names: Sequence[str], known: Collection[str], option: str = "") -> list[str]:
    """A message for each name that is not one of ``known``, which an option asks for."""
    words = ", ".join(map(repr, known))
    return [f"{option}{n!r} is not valid. Write one of {words}." for n in names if n not in known]


def judged_by(attacks: Sequence[str]) -> dict[str, Any]:
    """``dat.evaluation`` of a run whose record is all that is wanted of it."""
    return {"attacks": list(attacks), "pictures": 0, "natural_twin": False}


def run_folder(folder: Path, row: str, seed: int) -> Path:
    """Folder of the run of a row and a seed."""
    return folder / f"{row} {seed}"


def compare_runs(
    config: Path,
    folder: Path,
    rows_of: Callable[[int], Mapping[str, Mapping[str, Any]]],
    judges: Sequence[str],
    *,
    names: Sequence[str] = (),
    seeds: Sequence[int],
    output: Path | None = None,
) -> str:
    """Train rows that differ in a few keys with every seed, and judge them by the same attacks.

    Args:
        config: The run that all rows change.
        folder: For the runs, see :func:`run_folder`; one that is there already is not trained
            again.
        rows_of: Nested keys over the config by row, for a seed.
        judges: Evaluation attacks.
        names: Rows; none means all.
        seeds: Of the runs.
        output: JSON file for the numbers of every run; None writes nothing.

    Returns:
        Markdown: mean and standard deviation of accuracies in percent, median seconds of training.

    Raises:
        ConfigError: For unknown rows, mistakes in a row, or a file that cannot be written; before
            anything is trained.
    """
    rows = {seed: rows_of(seed) for seed in seeds}
    if not rows or len(rows) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: give at least one, each once.")
    known = rows[seeds[0]]
    if problems := unknown_rows(names, known):
        raise ConfigError("\n".join(problems))
    check_files(output=output)

    def changes_of(row: str, seed: int) -> dict[str, Any]:
        changes = rows[seed][row]
        own = {"seed": seed, "evaluation": judged_by(judges)}
        return {**changes, "dat": {**changes.get("dat", {}), **own}}

    chosen = list(names or known)
    for row in chosen:
        for seed in seeds:
            run_of(config, changes_of(row, seed))
    records = {
        row: [
            record_of(run_folder(folder, row, seed), config, changes_of(row, seed))
            for seed in seeds
        ]
        for row in chosen
    }
    cells = []
    for row, runs in records.items():
        accuracies = [[run["natural_acc"] for run in runs]]
        accuracies += [[run["robust_acc"][judge] for run in runs] for judge in judges]
        seconds = statistics.median(run["seconds"]["train"] for run in runs)
        cells.append([row, *map(spread, accuracies), f"{seconds:.0f}"])
    header = ["training", "clean %", *(f"{judge} %" for judge in judges), "train s"]
    table = markdown(header, cells)
    if output is not None:
        kept = {
            row: [{k: run.get(k) for k in KEPT} for run in runs] for row, runs in records.items()
        }
        write_json(output, {"table": table, "rows": kept})
    return table


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean in percent, with the standard deviation where there are several."""
    mean = f"{100 * statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} +- {100 * statistics.stdev(values):.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
