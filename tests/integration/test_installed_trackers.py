"""Weights & Biases offline and trackio, the packages themselves (the extra ``trackers``)."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dat_ds.config.deepspeed.sections import is_installed
from dat_ds.engine.trackers import WrittenSteps, start_tracker

ROOT = Path(__file__).parents[2]
RUN: Any = SimpleNamespace(
    dat=SimpleNamespace(logging=SimpleNamespace(project="robust")),
    to_dict=lambda: {"dat": {"seed": 0}},
)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_installed(package), reason=f"needs {package}")


def two_processes(name: str, output: Path) -> str:
    """Five steps, and from the third on again; the run's id."""
    picture = output / "examples.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    for first, last in ((1, 5), (3, 8)):
        written = WrittenSteps(output)
        tracker = start_tracker(name, RUN, output, written.run_id)
        for step in range(first, last + 1):
            if new := written.missing(name, step, {"train/loss": 1 / step}):
                tracker.write(step, new)
                written.mark(name, step, new)
        tracker.picture(last, "examples", picture)
        tracker.close()
    return written.run_id


@needs("trackio")
def test_trackio_has_each_step_once_in_one_run(tmp_path: Path) -> None:
    # In a process of its own: trackio reads its folder when it is imported.
    code = (
        "import pathlib, sys; from tests.integration.test_installed_trackers import two_processes; "
        "two_processes('trackio', pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    query = "select run_name, step from metrics where cast(metrics as text) like '%loss%'"
    database = sqlite3.connect(tmp_path / "trackio" / "robust.db")
    rows = database.execute(f"{query} order by id").fetchall()
    assert len({name for name, _ in rows}) == 1
    assert [step for _, step in rows] == list(range(1, 9))


@needs("wandb")
def test_wandb_offline_keeps_both_parts_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = two_processes("wandb", tmp_path)
    parts = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert all(part.name.endswith(run_id) for part in parts)
    assert all(list(part.glob(f"run-{run_id}.wandb")) for part in parts)
    assert list((tmp_path / "wandb").rglob("examples_8_*.png"))
