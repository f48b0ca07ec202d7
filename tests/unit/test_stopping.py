"""Claims about what signals ask of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dat_ds.training import stopping
from dat_ds.training.stopping import StopSignal, launchers


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_these_ask_to_stop_and_say_so(name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    stop = StopSignal()
    with stop.listening():
        assert stop.reason is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.reason == name
        assert not stop.saves
    assert signal.getsignal(signal.Signals[name]) == before


def test_sigusr2_asks_to_save_and_go_on() -> None:
    stop = StopSignal()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.saves
        assert stop.reason is None


def test_a_second_ctrl_c_interrupts_and_one_after_sigterm_does_not() -> None:
    stop = StopSignal()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM"
    again = StopSignal()
    with again.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_end_of_a_launcher_asks_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_LOOK", 0.01)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        monkeypatch.setattr(stopping, "launchers", lambda: [psutil.Process(other.pid)])
        stop = StopSignal()
        with stop.listening():
            time.sleep(0.1)
            assert stop.reason is None
            other.kill()
            deadline = time.monotonic() + 20
            while stop.reason is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert stop.reason == f"the end of its launcher (process {other.pid})"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/python3", "/venv/bin/deepspeed", "--quiet", "train.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/venv/bin/python3", "/venv/bin/torchrun", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["bash", "-c", "deepspeed train.py"], False),
        (["python", "train.py", "--deepspeed", "--deepspeed_config", "x", "deepspeed"], False),
        ([], False),
    ],
)
def test_which_process_is_a_launcher(words: list[str], expected: bool) -> None:
    assert stopping._is_launcher(words) is expected


def test_this_process_has_no_launcher() -> None:
    assert launchers() == []


WAITS = """
import ctypes
from dat_ds.training.stopping import StopSignal
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with StopSignal().listening():
    libc.pthread_mutex_lock(mutex)
    print("waits", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever, in C: no handler of Python's runs any more
"""


def test_a_second_ctrl_c_ends_a_wait_in_a_collective_too() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waits\n"
        for _ in range(2):
            time.sleep(0.3)
            waiting.send_signal(signal.SIGINT)
        _, errors = waiting.communicate(timeout=20)
        assert waiting.returncode == 130
        assert "Interrupted. Complete checkpoints are intact." in errors
        assert "Traceback" not in errors


def inner_launcher(name: str, *, in_own_group: bool = False) -> tuple[subprocess.Popen, list[int]]:
    """A script that runs a launcher that runs another one; the script, and both by number."""
    words = f"[sys.executable, '-c', 'import time; time.sleep(60)', {name!r}]"
    inner = f"inner = subprocess.Popen({words}, start_new_session={in_own_group})"
    outer = f"import subprocess, sys; {inner}; print(inner.pid, flush=True); inner.wait()"
    script = (
        f"import subprocess, sys; outer = subprocess.Popen([sys.executable, '-c', {outer!r}]); "
        "print(outer.pid, flush=True); outer.wait(); import time; time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    pids = sorted(int(process.stdout.readline()) for _ in range(2))
    return process, pids


@pytest.mark.parametrize(
    ("name", "in_own_group", "expected"),
    [
        ("deepspeed.launcher.launch", False, True),
        ("deepspeed.launcher.launch", True, False),  # setsid
        ("torch.distributed.run", False, False),  # nohup torchrun ... & of a script
        ("deepspeed.launcher.runner", False, False),
    ],
)
@pytest.mark.parametrize("script_ends", [False, True])
def test_an_inner_launcher_whose_outer_one_has_ended_was_orphaned(
    name: str, in_own_group: bool, expected: bool, script_ends: bool
) -> None:
    script, pids = inner_launcher(name, in_own_group=in_own_group)
    outer, inner = map(psutil.Process, pids)
    if inner.ppid() != outer.pid:
        outer, inner = inner, outer
    try:
        assert not stopping.was_orphaned(inner)
        if script_ends:
            script.kill()
            script.wait()
        outer.kill()
        deadline = time.monotonic() + 10
        while inner.ppid() == outer.pid and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stopping.was_orphaned(inner) is expected
    finally:
        inner.kill()
        script.kill()
        script.wait()
        script.stdout.close()
    assert not stopping.was_orphaned(psutil.Process())
