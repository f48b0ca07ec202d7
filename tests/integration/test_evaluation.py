"""``dat-ds eval`` of a target, as it is typed: one and several ranks, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dat_ds.cli.main import main
from dat_ds.processes import free_port
from tests.integration import tiny_run

TIMEOUT = 120
ZOO = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
"""
COMMAND = "from dat_ds.cli.main import run_script; run_script()\n"
ARGUMENTS = ["eval", "zoo:network", "--import", "zoo", "--data", "npz:data.npz"]
ARGUMENTS += ["--threat", "linf:4/255", "--attacks", "pgd-3", "apgd-ce-30", "--num_examples", "300"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module with a network, images labelled mostly as it sees them, and the expected result."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "zoo.py").write_text(ZOO)
    (folder / "command.py").write_text(COMMAND)
    x = np.random.default_rng(0).integers(0, 256, (320, 8, 8, 1), dtype=np.uint8)
    (folder / "label.py").write_text(
        "import numpy as np, torch, zoo\n"
        "x = np.load('x.npy')\n"
        "z = zoo.network()(torch.from_numpy(x).permute(0, 3, 1, 2) / 255)\n"
        "y = z.argmax(1).numpy()\n"
        "y[::7] = 0\n"
        "np.savez('data.npz', x_test=x, y_test=y)\n"
    )
    np.save(folder / "x.npy", x)
    subprocess.run([sys.executable, "label.py"], cwd=folder, env=environment(), check=True)
    done = run(folder, 1, "--output", "one")
    assert done.returncode == 0, done.stderr
    return folder


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(tiny_run.ROOT), os.environ.get("PYTHONPATH", "")])
    added = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    return {k: v for k, v in os.environ.items() if k != "RANK"} | added


def start(folder: Path, ranks: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    words = [sys.executable, *(launcher if ranks > 1 else []), "command.py", *ARGUMENTS, *arguments]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, ranks, *arguments)
    output, error = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def samples(folder: Path, name: str) -> bytes:
    return (folder / name / "samples.jsonl").read_bytes()


def kill_after(process: subprocess.Popen[str], folder: Path, entries: int) -> None:
    """Kill every process of an evaluation once it has kept so many entries."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        files = folder.glob("progress-*.jsonl")
        if sum(len(file.read_bytes().splitlines()) for file in files) >= entries:
            break
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    for child in [psutil.Process(process.pid), *children]:
        child.send_signal(signal.SIGKILL)
    process.wait(timeout=TIMEOUT)


def test_the_record_holds_what_outsiders_read(folder: Path) -> None:
    record: dict[str, Any] = json.loads((folder / "one" / "evaluation.json").read_text())
    lines = [json.loads(line) for line in samples(folder, "one").splitlines()]
    assert [line["index"] for line in lines] == list(range(300))
    robust = sum(line["robust"] for line in lines) / 300
    assert record["num_examples"] == 300
    assert record["natural_acc"] == sum(line["correct"] for line in lines) / 300
    assert record["robust_acc"]["all"] == robust == record["robust_acc"]["apgd-ce-30"]
    assert 0 < robust < record["robust_acc"]["pgd-3"] < record["natural_acc"] < 1
    low, high = record["intervals"]["all"]
    assert low < robust < high
    assert record["passes"] > 300
    assert record["seconds"] > 0
    assert isinstance(record["checks"], list)
    broken = [line for line in lines if line["broken_by"]]
    assert {line["broken_by"] for line in broken} == {"pgd-3", "apgd-ce-30"}
    assert all(line["verified"] and line["margin"] <= 0 for line in broken)
    assert all(line["distance"] <= 4 / 255 + 1e-6 for line in broken)


def test_two_ranks_killed_and_three_that_go_on_give_the_same_file(folder: Path) -> None:
    process = start(folder, 2, "--output", "killed", "--batch_size", "32")
    kill_after(process, folder / "killed", 12)
    assert not (folder / "killed" / "samples.jsonl").exists()
    changed = run(folder, 1, "--output", "killed", "--threat", "linf:8/255")
    assert changed.returncode == 2
    assert 'threat_model was {"norm": "linf", "eps": "4/255"' in changed.stderr
    done = run(folder, 3, "--output", "killed")
    assert done.returncode == 0, done.stderr
    assert samples(folder, "killed") == samples(folder, "one")
    assert not list((folder / "killed").glob("progress-*"))
    again = run(folder, 1, "--output", "killed")
    assert "holds this evaluation already" in again.stdout


def test_a_fault_on_one_rank_is_told_once_and_ends_all(folder: Path) -> None:
    arrays = dict(np.load(folder / "data.npz"))
    arrays["y_test"][250] = 9
    np.savez(folder / "bad.npz", **arrays)
    done = run(folder, 2, "--output", "bad", "--data", "npz:bad.npz")
    assert done.returncode != 0
    assert "9" in done.stderr
    assert "dat-ds: error:" in done.stderr
    assert not (folder / "bad" / "evaluation.json").exists()


def test_a_run_is_evaluated_as_before_and_under_an_ensemble(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.write(tmp_path / "run.json", tiny_run.config(tmp_path / "run"))
    assert main(["train", "--deepspeed_config", str(config)]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert record["robust_acc"].keys() == {"pgd-5"}
    ensemble = ["--attacks", "pgd-5", "apgd-ce-5"]
    assert main(["eval", str(tmp_path / "run"), *ensemble]) == 0
    judged = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert judged["natural_acc"] == record["natural_acc"]
    assert judged["threat_model"]["eps"] == "2/16"
    assert judged["config"] == record["config"]
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    arguments = [str(checkpoint), *ensemble, "--output", str(tmp_path / "other")]
    assert main(["eval", *arguments]) == 0
    capfd.readouterr()
    mistakes = ["--attacks", "pdg-5", "--indices", "0-5"]
    assert main(["eval", str(tmp_path / "run"), *mistakes]) == 2
    assert "'pdg-5' is not an evaluation attack" in capfd.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--indices", "5-20"]) == 2
    assert "the data have the samples 0 to 19" in capfd.readouterr().err
