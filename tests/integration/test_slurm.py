"""``recipes/slurm/train.sbatch`` with an ``srun`` and an ``scontrol`` of our own on the PATH."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dat_ds.processes import adopt_slurm_step
from tests.integration import tiny_run

SCRIPT = tiny_run.ROOT / "recipes" / "slurm" / "train.sbatch"
SRUN = """#!{python}
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for number in range(count):
    own = dict(SLURM_PROCID=str(number), SLURM_LOCALID=str(number), SLURM_STEP_ID="0",
               SLURM_STEP_NODELIST="localhost", SLURM_STEP_TASKS_PER_NODE=str(count))
    tasks.append(subprocess.Popen(words, env=dict(os.environ, **own)))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, _: [task.send_signal(n) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

WAITS = """#!{python}
import signal, sys, time
def stop(number, frame):
    print("told", flush=True)
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
signal.pause()
"""


class Cluster:
    """One job at a time."""

    def __init__(self, folder: Path, tasks: int) -> None:
        self.folder, self.tasks = folder, tasks
        (folder / "bin").mkdir()
        self.program("srun", SRUN.replace("{python}", sys.executable))
        self.program("scontrol", f'#!/bin/bash\necho "$@" >> {folder}/requeued\n')

    def program(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def submit(self, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
        environment = {name: v for name, v in os.environ.items() if name not in ("RANK",)}
        environment |= {
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_RESTART_COUNT": str(restarts),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def requeued(self) -> int:
        file = self.folder / "requeued"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, 0), (75, 0, 1), (137, 3, 1), (2, 0, 0), (1, 0, 0), (75, 50, 0)],
)
def test_what_is_queued_again(tmp_path: Path, code: int, restarts: int, again: int) -> None:
    cluster = Cluster(tmp_path, 1)
    cluster.program("dat-ds", f'#!/bin/bash\necho "$@"\nexit {code}\n')
    job = cluster.submit("--deepspeed_config", "x.json", restarts=restarts)
    output, _ = job.communicate(timeout=30)
    assert output.startswith("train --deepspeed_config x.json --resume auto")
    assert (job.returncode, cluster.requeued) == (code, again)


@pytest.mark.parametrize(("name", "again"), [("SIGUSR1", 1), ("SIGTERM", 0)])
def test_a_signal_reaches_the_task_and_a_cancelled_job_stays_away(
    tmp_path: Path, name: str, again: int
) -> None:
    cluster = Cluster(tmp_path, 1)
    cluster.program("dat-ds", WAITS.replace("{python}", sys.executable))
    job = cluster.submit()
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.Signals[name])
    output, _ = job.communicate(timeout=30)
    assert output.startswith("told\n")
    assert (job.returncode, cluster.requeued) == (75, again)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_run_goes_on_from_job_to_job(tmp_path: Path, tasks: int) -> None:
    cluster, run = Cluster(tmp_path, tasks), tmp_path / "run"
    values = tiny_run.config(run, checkpoint={"every_epochs": 100})
    values["dat"]["schedule"] = {"epochs": 20}
    values["dat"]["evaluation"]["validation_every_epochs"] = 20
    config = tiny_run.write(tmp_path / "config.json", values)
    job = cluster.submit("--deepspeed_config", str(config))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(tiny_run.rows(run)) < 4:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert (job.returncode, cluster.requeued) == (75, 1), output
    assert output.count("Stopped by SIGUSR1") == 1
    assert (run / "checkpoints" / "latest").exists()
    assert not (run / "record.json").exists()
    job = cluster.submit("--deepspeed_config", str(config), restarts=1)
    output, _ = job.communicate(timeout=240)
    assert (job.returncode, cluster.requeued) == (0, 1), output
    assert output.count("Continuing from") == 1
    assert json.loads((run / "record.json").read_text())["ranks"] == tasks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("a-1,a-2", "a-1"),
        ("n[3]x,n[4]x", "n3x"),
    ],
)
def test_what_srun_says_of_a_task(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    said = {
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_JOB_ID": "77",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }
    monkeypatch.setattr(os, "environ", dict(said))
    adopt_slurm_step()
    assert {name: v for name, v in os.environ.items() if name not in said} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "8",
        "MASTER_ADDR": first,
        "MASTER_PORT": "20540",
    }


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"SLURM_NTASKS": "2"},  # the batch script's own process
        {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "RANK": "5"},  # a launcher's, under srun
    ],
)
def test_where_srun_is_not_the_launcher(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(said))
    adopt_slurm_step()
    assert os.environ == said
