"""Entries of "time to robustness": how they are made, which count, and the table on the page."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dat_ds.bench.time_to_robustness import (
    JUDGE,
    TASKS,
    broken_rules,
    describe_entry,
    leaderboard,
    measure_entry,
)
from dat_ds.config import load_config
from dat_ds.errors import ConfigError, DataError
from tests.integration.tiny_run import ROOT

RECIPE = ROOT / "recipes" / "time_to_robustness.py"
RECORDS = sorted((ROOT / "docs" / "results").glob("time_to_robustness_*.json"))


def entry_of(task: str, robust: float, seconds: float = 10.0) -> dict[str, Any]:
    """An entry with the task's own config that keeps every rule."""
    run = {
        "steps": 7,
        "events": [],
        "natural_acc": 0.9,
        "robust_acc": {"apgd-ce-100": robust + 0.02, "apgd-t-100": robust, "all": robust},
        "ensemble": JUDGE,
        "num_examples": TASKS[task].num_test,
        "ranks": 1,
    }
    return {
        "task": task,
        "config": load_config(ROOT / f"ds_configs/time_to_robustness_{task}.json").to_dict(),
        "runs": [{**run, "seed": i, "seconds": {"train": seconds + i}} for i in range(3)],
        "hardware": {"processor": "P", "torch_threads": 1, "device": TASKS[task].device},
        "versions": {"torch": "2.0", "deepspeed": "0.1"},
        "commit": "0123456789abcdef",
    }


@pytest.fixture
def tiny_images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 40), ("test", 6)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 10
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_the_cifar10_config_runs_and_other_images_do_not_count(
    tiny_images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "entry.json"
    settings = [
        "train_micro_batch_size_per_gpu=8",
        "dat.data.name=npz",
        f"dat.data.path={tiny_images}",
        "dat.data.num_workers=0",
        'dat.model.options={"channels": [8, 8, 8, 8]}',
        "dat.schedule.max_steps=3",
    ]
    words = [sys.executable, str(RECIPE), "--task", "cifar10", "--seeds", "1"]
    words += ["--output", str(output), *(w for text in settings for w in ("--set", text))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    for reason in ("fewer than 3 seeds", "trained on npz, not cifar10", "part of the test set"):
        assert reason in said
    entry = json.loads(output.read_text())
    assert describe_entry(entry) == said
    (run,) = entry["runs"]
    assert run["steps"] == 3
    assert run["num_examples"] == 6
    assert run["ensemble"] == JUDGE
    assert 0 <= run["robust_acc"]["all"] == min(run["robust_acc"].values()) <= run["natural_acc"]
    assert 0 < run["seconds"]["train"] < run["seconds"]["total"]
    assert entry["commit"]


def test_mistakes_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    config = ROOT / "ds_configs" / "time_to_robustness_digits.json"
    with pytest.raises(ConfigError, match="--seeds 0: give at least 1"):
        measure_entry(config, task="digits", seeds=0)
    with pytest.raises(ConfigError, match="there is no folder"):
        measure_entry(config, task="digits", seeds=1, output=tmp_path / "none" / "entry.json")
    with pytest.raises(ConfigError, match=r"dat\.schedule\.epoch"):
        measure_entry(config, task="digits", seeds=1, overrides=["dat.schedule.epoch=1"])


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_configs_keep_the_rules(task: str) -> None:
    assert broken_rules(entry_of(task, 0.9)) == []


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("runs", [], "fewer than 3 seeds"),
        ("runs.0.seed", 7, "seeds were chosen"),
        ("runs.2.ranks", 2, "several ranks"),
        ("runs.1.num_examples", 100, "part of the test set only"),
        ("runs.1.ensemble", None, "not judged by the ensemble standard"),
        ("commit", "0123+", "source files differed from the commit"),
        ("hardware.device", "cuda", "not on one cpu device"),
        ("config.dat.data.name", "npz", "trained on npz, not digits"),
        ("config.dat.data.img_size", 16, "images were resized"),
        ("config.dat.data.pseudo_labels", "runs/a", "dat.data.pseudo_labels='runs/a' comes from"),
        ("config.dat.model.pretrained", "runs/a", "dat.model.pretrained='runs/a' comes from"),
        ("config.dat.model.name", "hf:a", "dat.model.name='hf:a' comes from outside"),
        ("config.dat.threat_model.eps", "1/16", "the ball is not l-infinity, eps 2/16"),
        ("config.dat.threat_model.norm", "l2", "the ball is not l-infinity, eps 2/16"),
    ],
)
def test_every_rule_is_checked(key: str, value: Any, reason: str) -> None:
    entry = copy.deepcopy(entry_of("digits", 0.9))
    node: Any = entry
    *parents, last = key.split(".")
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    node[last] = value
    (told,) = broken_rules(entry)
    assert told.startswith(reason)


def test_the_leaderboard_has_the_fastest_first_and_leaves_out_what_does_not_pass(
    tmp_path: Path,
) -> None:
    entries = {
        "slow": entry_of("cifar10", 0.51, seconds=300),
        "fast": entry_of("cifar10", 0.46, seconds=200),
        "weak": entry_of("cifar10", 0.44, seconds=100),
        "dirty": {**entry_of("cifar10", 0.6), "commit": "0+"},
    }
    files = [tmp_path / f"{name}.json" for name in entries]
    for file, entry in zip(files, entries.values(), strict=True):
        file.write_text(json.dumps(entry))
    table = leaderboard(files)
    _, below, above = table.split("### `cifar10`, ")
    assert below.startswith("45%")
    assert [line.split(" | ")[0] for line in below.splitlines()[4:6]] == ["| 201.0", "| 301.0"]
    assert "200.0, 201.0, 202.0 | 90.0 | 48.0 | 46.0 | 46.0 |" in below
    assert "fast.json" not in above
    assert "slow.json" in above
    assert "weak.json" not in table
    assert "`dirty.json` does not count: source files differed from the commit." in above
    files[0].write_text("[]")
    with pytest.raises(DataError, match=r"slow.json.*not an entry"):
        leaderboard(files)


def test_without_entries_the_leaderboard_says_how_to_make_one() -> None:
    for task in TASKS:
        assert f"No entry yet: `python recipes/time_to_robustness.py --task {task} " in leaderboard(
            []
        )


def test_the_page_shows_the_committed_entries_and_only_them() -> None:
    page = (ROOT / "docs" / "time_to_robustness.md").read_text(encoding="utf-8")
    assert RECORDS
    assert leaderboard(RECORDS) in page, (
        "run: python recipes/time_to_robustness.py --leaderboard docs/results/time_to_robustness_*"
    )
