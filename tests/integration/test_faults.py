"""Ranks that stop, hang or die, and launchers that die.

``python -m tests.integration.test_faults 20 40`` stops a rank in so many runs and ends so many
launchers, at random, and prints two tables.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dat_ds.errors import FAULT
from dat_ds.files import sha256_of
from dat_ds.processes import free_port
from tests.integration import fault_ranks, tiny_run
from tests.integration.fault_ranks import Event
from tests.integration.test_launch import finish, launch, ranks_of, timeless, wait_for_rows

TIMEOUT, MARGIN = 6.0, 10.0  # seconds: dat.fault.timeout, and what the end may take besides
LONGEST = 180.0  # of a run that nothing happens to
EVENTS = {  # phase: how often a run enters it
    "join": 1,
    "start": 1,
    "data": 8,
    "attack": 8,
    "update": 8,
    "validation": 2,
    "checkpoint": 3,
}


def values_of(output: Path, **fault: Any) -> dict[str, Any]:
    """A run of 8 steps: 2 validations, 3 checkpoints."""
    values = tiny_run.config(output, checkpoint={"every_steps": 3}, fault=fault)
    values["dat"]["data"]["num_train"] = 64
    values["dat"]["evaluation"]["pictures"] = 0
    return values


def train(folder: Path, event: Event | None) -> tuple[list[int | None], float, str]:
    """``dat-ds train --resume auto`` on two ranks.

    Returns:
        Exit codes, None for what is left; seconds from the event to the end; what was printed.
    """
    config = tiny_run.write(folder / "config.json", values_of(folder / "run", timeout=TIMEOUT))
    words = ["train", "--deepspeed_config", str(config), "--resume", "auto"]
    logs = Path(tempfile.mkdtemp(dir=folder))
    processes = fault_ranks.start(words, 2, logs, event)
    began, longest, awaited = time.monotonic(), LONGEST, event
    alive = list(processes)
    while alive and time.monotonic() - began < longest:
        if awaited is not None and _has_happened(processes, awaited):
            began, longest, awaited = time.monotonic(), TIMEOUT + 2 * MARGIN, None
        if event is not None and event.phase == "join":
            alive = [p for rank, p in enumerate(processes) if p.is_alive() and rank != event.rank]
        else:
            alive = [process for process in processes if process.is_alive()]
        time.sleep(0.05)
    seconds = time.monotonic() - began
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    texts = [file.read_text(errors="replace") for file in sorted(logs.iterdir())]
    return codes, seconds, "\n".join(texts)


def _has_happened(processes: list[Any], event: Event) -> bool:
    process = processes[event.rank]
    if event.what != "stop":  # a hang is not seen from outside
        return process.exitcode is not None
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    return True


def result_of(run: Path) -> tuple[Any, ...]:
    """What a run has come to, to the bit."""
    steps = timeless(tiny_run.rows(run))
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    return steps, newest.name, sha256_of(newest / "model.safetensors")


def outcome_of(folder: Path, event: Event, whole: tuple[Any, ...]) -> str:
    """``right``, or what is wrong: with the end of the run, or with what goes on from there."""
    codes, seconds, printed = train(folder, event)
    joins = event.phase == "join"
    name = rf"Rank {event.rank} of 2 " if joins else rf"Rank {event.rank} \(host \S+, process \d+\)"
    expected: list[int | None] = [FAULT, FAULT]
    if joins:
        expected[event.rank] = None  # a launcher's to kill: nobody knows its process yet
    for wrong, words in (
        (codes != expected, f"exit codes {codes}"),
        (seconds > TIMEOUT + MARGIN, f"{seconds:.0f} s"),
        (printed.count("dat-ds: error") != 1, "not one message"),
        (not re.search(rf"error: {name}", printed), "not named"),
        ("Traceback" in printed, "traceback"),
        (not joins and "--resume auto" not in printed, "no advice"),
    ):
        if wrong:
            return f"{words}\n{printed}"
    codes, _, printed = train(folder, None)
    if codes != [0, 0]:
        return f"resumed: exit codes {codes}\n{printed}"
    if not joins and "Taking over" not in printed:
        return f"resumed: the lock\n{printed}"
    return "right" if result_of(folder / "run") == whole else "resumed: another result"


def random_event(source: random.Random) -> Event:
    phase = source.choice(list(EVENTS))
    nth = source.randint(1, EVENTS[phase])
    # Into the writing of a checkpoint, which takes a while.
    delay = source.random() * 0.1 if phase in ("checkpoint", "validation") else 0.0
    return Event(source.randrange(2), phase, nth, delay)


def stopped_ranks(folder: Path, count: int, seed: int) -> list[tuple[Event, str, float]]:
    """Stop a random rank at a random moment, so many times."""
    source, found = random.Random(seed), []
    (folder / "whole").mkdir(parents=True)
    codes, _, printed = train(folder / "whole", None)
    assert codes == [0, 0], printed
    whole = result_of(folder / "whole" / "run")
    for number in range(count):
        event, began = random_event(source), time.monotonic()
        (folder / str(number)).mkdir()
        outcome = outcome_of(folder / str(number), event, whole)
        found.append((event, outcome, time.monotonic() - began))
        sys.stderr.write(f"{number}: {event} {outcome} {found[-1][2]:.0f} s\n")
    return found


# ---- launchers


def torchrun(config: Path, *words: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words),
        *("--master_port", str(free_port()), str(tiny_run.ROOT / "recipes" / "train_vit.py")),
        *("--deepspeed_config", str(config), "--resume", "auto"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _rows(run: Path) -> int:
    return len(tiny_run.rows(run)) if (run / "metrics.jsonl").exists() else 0


def processes_of(config: Path) -> Iterator[psutil.Process]:
    """Every process that was started for a config."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(config) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def launcher_deaths(folder: Path, count: int, seed: int) -> list[tuple[str, str, str, str, float]]:
    """End a launcher at a random moment, so many times."""
    source, found = random.Random(seed), []
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL", "SIGHUP")
    kinds = [(kind, name) for name in names for kind in ("deepspeed", "torchrun")]
    for number in range(count):
        kind, name = kinds[number % len(kinds)]
        values = values_of(folder / str(number), timeout=30)
        values["dat"]["checkpoint"] = {"every_epochs": 500}
        values["dat"]["schedule"] = {"epochs": 500}
        values["dat"]["evaluation"]["validation_every_epochs"] = 500
        values["dat"]["data"]["num_workers"] = source.randrange(2)
        config = tiny_run.write(folder / f"{number}.json", values)
        process = launch("train_vit.py", config) if kind == "deepspeed" else torchrun(config)
        starts, seconds, rows = source.random() < 0.3, source.uniform(1, 8), source.randint(1, 20)
        try:
            began = math.inf
            while (
                time.monotonic() - began < seconds if starts else rows > _rows(folder / str(number))
            ):
                assert process.poll() is None, process.communicate()[0]
                # From the moment at which the ranks are there: they still import.
                if began == math.inf and len(list(processes_of(config))) > 2 + (kind != "torchrun"):
                    began = time.monotonic()
                time.sleep(0.05)
            process.send_signal(signal.Signals[name])
            began = time.monotonic()
            while list(processes_of(config)) and time.monotonic() - began < 90:
                time.sleep(0.2)
        finally:
            left = list(processes_of(config))
            for orphan in left:
                orphan.kill()
        took = time.monotonic() - began
        output, _ = process.communicate(timeout=30)
        outcome = f"{len(left)} orphans\n{output}" if left else "none left"
        when = f"{seconds:.1f} s" if starts else f"{rows} steps"
        found.append((kind, name, when, outcome, took))
        sys.stderr.write(f"{number}: {found[-1]}\n")
    return found


# ---- the short form


def test_a_stopped_rank_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    codes, seconds, printed = train(tmp_path, Event(0, "attack", nth=5))
    assert codes == [FAULT, FAULT], printed
    assert seconds < TIMEOUT + MARGIN
    assert printed.count("dat-ds: error") == 1
    assert re.search(
        r"error: Rank 0 \(host \S+, process \d+\) has given no sign of life for 6 s "
        r"\(dat.fault.timeout\); the last was in step \d, phase \w+; rank 1 is in step 4, phase "
        r"\w+. All ranks end with exit code 75; --resume auto goes on from \S+step-00000003\.",
        printed,
    ), printed
    assert "Traceback" not in printed


# ---- the long form


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Event(1, "data", 5, what="hang"), "the others wait for this: Rank 1 "),
        (Event(0, "validation", 1, what="hang"), "the others wait for this: Rank 0 "),
        (Event(1, "update", 5, what="die"), r"Rank 1 \(host \S+, process \d+\) is dead: killed"),
        (Event(0, "checkpoint", 2, 0.02, what="die"), "Rank 0 .* is dead: killed"),
    ],
)
def test_a_rank_that_hangs_or_dies_is_named(tmp_path: Path, event: Event, words: str) -> None:
    codes, seconds, printed = train(tmp_path, event)
    ends = -signal.SIGKILL if event.what == "die" else FAULT
    assert codes == [ends if rank == event.rank else FAULT for rank in range(2)], printed
    assert printed.count("dat-ds: error") == 1
    assert re.search(words, printed), printed
    assert "Traceback" not in printed
    if event.what == "die":
        assert seconds < 5
    codes, _, printed = train(tmp_path, None)
    assert codes == [0, 0], printed


@pytest.mark.slow
def test_the_elastic_agent_of_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    codes, _, printed = train(tmp_path / "whole", None)
    assert codes == [0, 0], printed
    config = tiny_run.write(tmp_path / "config.json", values_of(tmp_path / "run", timeout=60))
    process = torchrun(config, "--max-restarts", "3")
    wait_for_rows(tmp_path / "run", 4)
    children = psutil.Process(process.pid).children()
    ranks = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
    ranks["1"].kill()
    output, _ = process.communicate(timeout=3 * LONGEST)
    assert process.returncode == 0, output
    assert output.count("Continuing from") == 1, output
    assert output.count("dat-ds: error: Rank 1 ") == 1, output
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole" / "run")


@pytest.mark.slow
def test_launchers_return_the_exit_code_of_a_fault(tmp_path: Path) -> None:
    config = tiny_run.write(tmp_path / "c.json", values_of(tmp_path / "run", timeout=TIMEOUT))
    process = launch("train_vit.py", config)
    wait_for_rows(tmp_path / "run", 2)
    ranks_of(process)[1].send_signal(signal.SIGSTOP)
    code, output = finish(process)
    assert (code, list(processes_of(config))) == (FAULT, []), output


@pytest.mark.slow
def test_stopped_ranks(tmp_path: Path) -> None:
    assert [o for _, o, _ in stopped_ranks(tmp_path, 6, seed=1) if o != "right"] == []


@pytest.mark.slow
def test_launcher_deaths(tmp_path: Path) -> None:
    assert [death for death in launcher_deaths(tmp_path, 10, 1) if death[3] != "none left"] == []


if __name__ == "__main__":
    # A shell starts its background jobs with SIGINT ignored, and nohup with SIGHUP, which launchers
    # would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stops, deaths = (int(word) for word in [*sys.argv[1:], "20", "40"][:2])
    with tempfile.TemporaryDirectory() as name:
        stopped = stopped_ranks(Path(name) / "stops", stops, seed=0)
        (Path(name) / "deaths").mkdir()
        ended = launcher_deaths(Path(name) / "deaths", deaths, seed=0)
    outcomes = Counter((e.phase, e.rank, text.split("\n")[0]) for e, text, _ in stopped)
    print("| stopped in | rank | outcome | runs |\n| --- | --- | --- | --- |")
    for (phase, rank, text), number in sorted(outcomes.items()):
        print(f"| {phase} | {rank} | {text} | {number} |")
    outcomes = Counter((kind, name, text.split("\n")[0]) for kind, name, _, text, _ in ended)
    print("\n| launcher | ended by | outcome | runs |\n| --- | --- | --- | --- |")
    for (kind, name, text), number in sorted(outcomes.items()):
        print(f"| {kind} | {name} | {text} | {number} |")
    print(f"\nSlowest end after a launcher's: {max((s for *_, s in ended), default=0):.0f} s.")
