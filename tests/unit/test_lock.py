"""Claims about the lock of a run's folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dat_ds.errors import CheckpointError
from dat_ds.training.lock import LOCK, locked

HOLDS = """
import sys, time
from pathlib import Path
from dat_ds.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_the_first_ones_process_and_a_killed_one_gives_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dat_ds")
    process = holder(tmp_path)
    words = rf"in use by process {process.pid} on host {socket.gethostname()}: wait"
    with pytest.raises(CheckpointError, match=words), locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert f"Taking over from process {process.pid}" in caplog.text
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_it_is_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_another_host_counts_while_it_gives_signs_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system whose locks do not reach other hosts."""
    file = tmp_path / LOCK
    file.write_text(json.dumps({"host": "node-7", "pid": 12}))
    with pytest.raises(CheckpointError, match="process 12 on host node-7"), locked(tmp_path):
        pass
    then = time.time() - 61
    os.utime(file, (then, then))
    with locked(tmp_path):
        assert "node-7, without a sign of life for 61 s" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"Cannot make .*nowhere"),
        locked(tmp_path / "nowhere"),
    ):
        pass


def test_words_that_a_crash_cut_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "no')
    with locked(tmp_path):
        pass
