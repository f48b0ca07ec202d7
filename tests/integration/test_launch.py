"""Runs under the deepspeed launcher, two ranks: killed, stopped, resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration import tiny_run
from tests.integration.silence import unexpected

TIMEOUT = 120


def launch(recipe: str, config: Path, *arguments: str) -> subprocess.Popen[str]:
    port = 29700 + os.getpid() % 200
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--quiet", "--num_accelerators", "2", "--master_port", str(port)),
        *(str(tiny_run.ROOT / "recipes" / recipe), "--deepspeed_config", str(config), *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def wait_for_rows(run: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(tiny_run.rows(run)) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} did not reach {count} rows")


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes, in order of rank."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    found = {}
    for child in children:
        match = re.search(r"--local_rank=(\d+)", " ".join(child.cmdline()))
        if match and "recipes" in " ".join(child.cmdline()):
            found.setdefault(int(match[1]), child)  # its forked workers look alike
    return [found[rank] for rank in sorted(found)]


def long_config(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    values = tiny_run.config(folder, model=model)
    values["dat"]["schedule"] = {"epochs": 8, "warmup_epochs": 0.5}
    values["dat"]["evaluation"]["validation_every_epochs"] = 4
    values["train_micro_batch_size_per_gpu"] = 4
    return values


def timeless(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "natural_acc", "robust_acc", "lr")
    return [tuple(row[key] for key in keys) for row in rows]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(tiny_run.VIT, id="vit"),
        pytest.param(tiny_run.CNN, id="cnn", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, model: dict[str, Any]) -> None:
    whole = tiny_run.write(tmp_path / "whole.json", long_config(tmp_path / "whole", model))
    code, output = finish(launch("train_vit.py", whole))
    assert code == 0, output
    assert unexpected(output) == []
    config = tiny_run.write(tmp_path / "killed.json", long_config(tmp_path / "killed", model))
    process = launch("train_vit.py", config, "--resume", "auto")
    wait_for_rows(tmp_path / "killed", 12)
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code != 0
    assert not (tmp_path / "killed" / "record.json").exists()
    code, output = finish(launch("train_vit.py", config, "--resume", "auto"))
    assert code == 0, output
    assert "Continuing from" in output
    assert timeless(tiny_run.rows(tmp_path / "killed")) == timeless(
        tiny_run.rows(tmp_path / "whole")
    )
    records = [
        json.loads((tmp_path / name / "record.json").read_text()) for name in ("whole", "killed")
    ]
    assert records[0]["outcomes"] == records[1]["outcomes"]


def test_sigterm_saves_and_exits_cleanly_on_every_rank(tmp_path: Path) -> None:
    values = long_config(tmp_path / "run", tiny_run.VIT)
    values["dat"]["schedule"]["epochs"] = 400
    values["dat"]["data"]["num_workers"] = 1
    values["dat"]["checkpoint"] = {"every_epochs": 400}
    config = tiny_run.write(tmp_path / "config.json", values)
    process = launch("train_vit.py", config)
    wait_for_rows(tmp_path / "run", 5)
    # A scheduler signals one rank or all, the loader's workers included; one is the harder case.
    rank = ranks_of(process)[1]
    for signalled in (*rank.children(recursive=True), rank):
        signalled.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    assert "Stopped by SIGTERM" in output
    assert "--resume auto" in output
    last = tiny_run.rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{last:08d}"


def test_ranks_whose_launcher_is_killed_save_and_stop(tmp_path: Path) -> None:
    values = long_config(tmp_path / "run", tiny_run.VIT)
    values["dat"]["schedule"]["epochs"] = 400
    values["dat"]["checkpoint"] = {"every_epochs": 400}
    config = tiny_run.write(tmp_path / "config.json", values)
    process = launch("train_vit.py", config)
    wait_for_rows(tmp_path / "run", 5)
    ranks = ranks_of(process)
    ranks[0].send_signal(signal.SIGUSR2)
    saved = tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + TIMEOUT
    while not saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    wait_for_rows(tmp_path / "run", len(tiny_run.rows(tmp_path / "run")) + 2)  # it goes on
    process.send_signal(signal.SIGKILL)
    _, output = finish(process)
    _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT)
    assert not alive
    assert "Stopped by the end of its launcher" in output
    last = tiny_run.rows(tmp_path / "run")[-1]["step"]
    assert saved.read_text() == f"step-{last:08d}"


def test_a_mistake_exits_with_2_and_one_error_per_rank(tmp_path: Path) -> None:
    values = long_config(tmp_path / "run", {"name": "no_such_model"})
    code, output = finish(launch("train_cnn.py", tiny_run.write(tmp_path / "c.json", values)))
    assert code == 2, output
    assert "dat-ds: error: dat.model.name='no_such_model'" in output
    assert "Traceback" not in output
