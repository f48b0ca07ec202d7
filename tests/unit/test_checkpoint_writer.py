"""Files of a checkpoint, written beside training."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_ds.engine.checkpoint_writer import CheckpointWriter, Job, snapshot
from dat_ds.errors import CheckpointError
from dat_ds.files import sha256_of


def writer(folder: Path, *jobs: Job, in_background: bool = True) -> CheckpointWriter:
    return CheckpointWriter(folder, list(jobs), in_background=in_background)


def test_training_goes_on_while_files_are_written(tmp_path: Path) -> None:
    may_write = threading.Event()

    def write() -> None:
        may_write.wait(20)
        (tmp_path / "a.pt").write_bytes(b"abc")

    writing = writer(tmp_path, Job(write, ("a.pt",)))
    assert not writing.is_done
    may_write.set()
    writing.wait()
    assert writing.is_done
    sha256 = sha256_of(tmp_path / "a.pt")
    assert writing.entries == {"a.pt": {"bytes": 3, "sha256": sha256}}


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_said_when_the_loop_asks(tmp_path: Path, in_background: bool) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    never = Job(lambda: pytest.fail("written after a failure"), ("b.pt",))
    writing = writer(tmp_path / "step", Job(fail, ("a.pt",)), never, in_background=in_background)
    with pytest.raises(CheckpointError, match=r"No space left.*Earlier checkpoints are intact"):
        writing.wait()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    writing = writer(tmp_path, Job(fail, ()))
    with pytest.raises(ZeroDivisionError):
        writing.wait()


def test_a_snapshot_is_not_changed_by_training() -> None:
    weight = torch.ones(3, requires_grad=True)
    state: dict[str, Any] = {"a": [weight, (weight.detach(), 2)], "b": {"c": {1, 2}}, "d": None}
    taken = snapshot(state)
    with torch.no_grad():
        weight.zero_()
    state["b"]["c"].add(3)
    assert taken["a"][0].tolist() == taken["a"][1][0].tolist() == [1, 1, 1]
    assert not taken["a"][0].requires_grad
    assert taken["a"][1][1] == 2
    assert taken["b"] == {"c": {1, 2}}
