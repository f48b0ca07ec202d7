"""Runs that differ in a few keys, and the tables made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_ds.config import RunConfig, load_config
from dat_ds.errors import UserError
from dat_ds.training.run import train


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


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * statistics.fmean(values):.1f} +- {100 * statistics.stdev(values):.1f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
