"""Seconds of training until a model withstands the standard ensemble on a share of the test set.

The rules are in ``docs/time_to_robustness.md``; :func:`broken_rules` checks those that a record can
show.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dat_ds.bench.timing import check_alone
from dat_ds.commands import carry_out
from dat_ds.config import RunConfig, load_config
from dat_ds.errors import ConfigError, DataError, UserError
from dat_ds.evaluation import describe_training
from dat_ds.evaluation.samples import EVALUATION
from dat_ds.files import check_files, write_json
from dat_ds.length import Length
from dat_ds.processes import end_process

JUDGE = "standard"
"""The ensemble that decides: the share that withstands every one of its attacks."""
MIN_SEEDS = 3

_TRAIN = "import sys; from dat_ds.bench.time_to_robustness import train_file as t; t(sys.argv[1])"
_KEPT = ("seed", "seconds", "steps", "events", "ranks")
_JUDGED = ("natural_acc", "robust_acc", "num_examples", "ensemble")
_COMMON = ("hardware", "versions", "commit")


@dataclass(frozen=True)
class RobustnessTask:
    """Task of the leaderboard: data, threat model and thresholds of robust accuracy.

    Attributes:
        data: Name of the dataset.
        num_test: Images of its test set; all of them are attacked.
        eps: Radius of the l-infinity ball, pixel units as text.
        thresholds: Shares of the test set to be withstood, each with a table of its own.
        device: Type of the one device: ``"cpu"`` or ``"cuda"``.
    """

    data: str
    num_test: int
    eps: str
    thresholds: tuple[float, ...]
    device: str


TASKS = {
    "digits": RobustnessTask("digits", 359, "2/16", (0.8,), "cpu"),
    "cifar10": RobustnessTask("cifar10", 10_000, "8/255", (0.45, 0.5), "cuda"),
}


def measure_entry(
    config: str | Path | Mapping[str, Any],
    *,
    task: str,
    seeds: int,
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> dict[str, Any]:
    """Train with each seed in a process of its own, and judge the models that come out.

    Args:
        config: The run, a file or its values; what it says of the evaluation on the test set, the
            seed and the folder is replaced.
        task: Name in :data:`TASKS`.
        seeds: Number of seeds, from 0 on.
        overrides: ``"dotted.key=value"`` over the config.
        output: JSON file for the entry; None writes nothing.

    Returns:
        The entry: ``task``, ``config``, ``runs`` (for each seed its seconds, steps, events, and
        accuracies under the ensemble), hardware, versions, commit.

    Raises:
        ConfigError: For mistakes in the config, and on a GPU that is shared.
        UserError: Where a run fails, which has said why, or ``output`` cannot be written any more.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: give at least 1, and {MIN_SEEDS} for an entry.")
    check_files(output=output)
    evaluation: dict[str, Any] = {
        "attacks": [],
        "num_examples": None,
        "natural_twin": False,
        "pictures": 0,
    }
    fixed = [f"dat.evaluation.{key}={json.dumps(value)}" for key, value in evaluation.items()]
    run = load_config(config, overrides=[*overrides, *fixed])
    if torch.cuda.is_available():
        check_alone(torch.device("cuda"))
    with tempfile.TemporaryDirectory() as folder:
        records = [_train_apart(run, seed, Path(folder)) for seed in range(seeds)]
    entry = {
        "task": task,
        "config": run.to_dict(),
        "runs": [_outcome(record) for record in records],
        **{key: records[0][key] for key in _COMMON},
    }
    if output is not None:
        write_json(output, entry)
    return entry


def _train_apart(run: RunConfig, seed: int, folder: Path) -> dict[str, Any]:
    """The record of one seed, whose clock pays for whatever a process does once."""
    output = folder / f"seed-{seed}"
    values = run.to_dict()
    values["dat"] |= {"seed": seed, "output_dir": str(output)}
    file = folder / f"seed-{seed}.json"
    write_json(file, values)
    if subprocess.run([sys.executable, "-c", _TRAIN, str(file)], check=False).returncode:
        raise UserError(f"The run with seed {seed} failed.")
    record: dict[str, Any] = json.loads((output / "record.json").read_text(encoding="utf-8"))
    judged = json.loads((output / "evaluation" / EVALUATION).read_text(encoding="utf-8"))
    return record | {key: judged[key] for key in _JUDGED}


def train_file(config: str) -> NoReturn:
    """Train the run of a config file, judge it, and end the process: what that of a seed does."""

    def command() -> int:
        from dat_ds.judge.evaluate import Question, evaluate_target
        from dat_ds.training.run import train

        run = load_config(config)
        if train(run) is not None:
            evaluate_target(Question(target=str(run.dat.output_dir), attacks=[JUDGE]))
        return 0

    end_process(carry_out(command))


def _outcome(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in (*_KEPT, *_JUDGED)}


def broken_rules(entry: Mapping[str, Any]) -> list[str]:
    """Why an entry does not count; empty where it does, for the thresholds that it passes."""
    task, dat, runs = TASKS[entry["task"]], entry["config"]["dat"], entry["runs"]
    threat, data = dat["threat_model"], dat["data"]
    ball = (threat["norm"], float(Length(threat["eps"])), threat["lower"], threat["upper"])
    outside = {
        "dat.model.pretrained": dat["model"]["pretrained"],
        "dat.data.unlabelled_path": data["unlabelled_path"],
        "dat.data.pseudo_labels": data["pseudo_labels"],
        "dat.objective.helper_model": dat["objective"].get("helper_model"),  # a key of hat alone
        "dat.model.name": dat["model"]["name"] if dat["model"]["name"].startswith("hf:") else None,
    }
    rules = {
        f"fewer than {MIN_SEEDS} seeds": len(runs) >= MIN_SEEDS,
        "seeds were chosen": [r["seed"] for r in runs] == list(range(len(runs))),
        f"trained on {data['name']}, not {task.data}": data["name"] == task.data,
        "images were resized": data["img_size"] is None,
        f"the ball is not l-infinity, eps {task.eps}, pixels in [0, 1]": ball
        == ("linf", float(Length(task.eps)), 0.0, 1.0),
        "part of the test set only": all(r["num_examples"] == task.num_test for r in runs),
        f"not judged by the ensemble {JUDGE}": all(r.get("ensemble") == JUDGE for r in runs),
        "several ranks": all(r["ranks"] == 1 for r in runs),
        f"not on one {task.device} device": entry["hardware"]["device"] == task.device,
        "source files differed from the commit": not str(entry["commit"]).endswith("+"),
        **{f"{key}={value!r} comes from outside": value is None for key, value in outside.items()},
    }
    return [words for words, kept in rules.items() if not kept]


def leaderboard(paths: Sequence[Path]) -> str:
    """Markdown: for each task and threshold the entries that pass it, fastest first.

    Args:
        paths: Files of entries, as :func:`measure_entry` gives them.

    Raises:
        DataError: With every file that holds no entry.
    """
    entries: dict[str, dict[str, Any]] = {}
    problems = []
    for path in paths:
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(entry, dict) or entry.get("task") not in TASKS:
                raise ValueError("not an entry of time_to_robustness")
            if missing := [key for key in ("config", "runs", *_COMMON) if key not in entry]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            entries[path.name] = entry
        except (OSError, ValueError) as error:
            problems.append(f"No entry at {str(path)!r}: {error}.")
    if problems:
        raise DataError("\n".join(problems))
    broken = {name: broken_rules(entry) for name, entry in entries.items()}
    lines = []
    for name, task in TASKS.items():
        for threshold in task.thresholds:
            passing = {
                file: entry
                for file, entry in entries.items()
                if entry["task"] == name and not broken[file] and _mean(entry, "all") >= threshold
            }
            lines += ["", f"### `{name}`, {threshold:.0%}", "", *_table(passing, name)]
    lines += [""] + [f"`{file}` does not count: {'; '.join(b)}." for file, b in broken.items() if b]
    return "\n".join(lines).strip()


def _table(entries: Mapping[str, Mapping[str, Any]], task: str) -> list[str]:
    if not entries:
        command = f"python recipes/time_to_robustness.py --task {task} --output FILE"
        return [f"No entry yet: `{command}`."]
    attacks = list(next(iter(entries.values()))["runs"][0]["robust_acc"])
    header = ["seconds", "by seed", "clean %", *(f"{name} %" for name in attacks)]
    header += ["training", "hardware", "versions", "commit", "record"]
    rows = [header, ["---"] * len(header)]
    for file, entry in sorted(entries.items(), key=lambda item: _mean_seconds(item[1])):
        versions, dat, steps = entry["versions"], entry["config"]["dat"], entry["runs"][0]["steps"]
        rows.append(
            [
                f"{_mean_seconds(entry):.1f}",
                ", ".join(f"{run['seconds']['train']:.1f}" for run in entry["runs"]),
                *(f"{100 * _mean(entry, name):.1f}" for name in ("natural_acc", *attacks)),
                f"{dat['model']['name']}, {describe_training(dat)}, {steps} steps",
                _hardware(entry["hardware"]),
                ", ".join(f"{package} {versions[package]}" for package in ("torch", "deepspeed")),
                f"`{str(entry['commit'])[:9]}`",
                f"[{file}](results/{file})",
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


def describe_entry(entry: Mapping[str, Any]) -> str:
    """Time and accuracy of an entry, and whether it counts."""
    task, robust = TASKS[entry["task"]], _mean(entry, "all")
    passed = [f"{t:.0%}" for t in task.thresholds if robust >= t]
    words = (
        f"{_mean_seconds(entry):.1f} s of training, mean of {len(entry['runs'])} seed(s); of the "
        f"test images {_mean(entry, 'natural_acc'):.1%} are classified correctly, and {robust:.1%} "
        f"withstand every attack of the ensemble {JUDGE}. "
        f"Passes {', '.join(passed) or 'no threshold'}."
    )
    broken = broken_rules(entry)
    return f"{words} Does not count: {'; '.join(broken)}." if broken else words


def _mean_seconds(entry: Mapping[str, Any]) -> float:
    return statistics.fmean(run["seconds"]["train"] for run in entry["runs"])


def _mean(entry: Mapping[str, Any], name: str) -> float:
    """Mean over seeds of the share that stands after an attack, or of a key of the run."""
    return statistics.fmean(
        run[name] if name in run else run["robust_acc"][name] for run in entry["runs"]
    )


def _hardware(hardware: Mapping[str, Any]) -> str:
    accelerator: str | None = hardware.get("accelerator")
    return accelerator or f"{hardware['processor']}, {hardware['torch_threads']} thread(s)"
