"""The guard against catastrophic overfitting: it leaves no trace, and acts as it was told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, equal

from dat_ds.cli.main import main
from dat_ds.training.guard import Guard, GuardReading
from tests.integration import tiny_run

FIRES_AT = 14  # between two checkpoints, which come every 5 steps


def train(folder: Path, guard: dict[str, Any], *arguments: str) -> int:
    values = tiny_run.config(
        folder / "run", attack={"name": "fgsm"}, guard={"every_steps": 7, **guard}
    )
    path = tiny_run.write(folder / "config.json", values)
    return main(["train", "--deepspeed_config", str(path), *arguments])


@pytest.fixture
def collapse(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the guard see a collapse in step 14, once; gives the steps at which it looked."""
    looked: list[int] = []

    def look(self: Guard, x: Tensor, y: Tensor) -> GuardReading:
        looked.append(self._engine.global_steps)
        return GuardReading(0.9, 0.1, looked[-1] == FIRES_AT)

    monkeypatch.setattr(Guard, "look", look)
    return looked


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "checkpoints" / "step-00000024" / "model.safetensors")


def test_a_guard_that_does_not_fire_changes_nothing(tmp_path: Path) -> None:
    folders = {action: tmp_path / action for action in ("none", "stop")}
    for action, folder in folders.items():
        folder.mkdir()
        assert train(folder, {"action": action, "largest_gap": 0.99, "num_images": 4}) == 0
    off, on = (weights(folder) for folder in folders.values())
    assert all(equal(off[key], on[key]) for key in off)
    readings = [row for row in tiny_run.rows(folders["stop"] / "run") if "guard_fired" in row]
    # Every 7 steps, before every checkpoint (every 5), and at the end.
    assert [row["step"] for row in readings] == [5, 7, 10, 14, 15, 20, 21, 24]
    assert all(0 <= row["guard_probe_acc"] <= 1 for row in readings)
    assert not any(row["guard_fired"] for row in readings)


def test_a_roll_back_repeats_from_the_last_checkpoint_with_a_stronger_attack(
    tmp_path: Path, collapse: list[int]
) -> None:
    assert train(tmp_path, {"action": "rollback", "stronger_steps": 3}) == 0
    assert collapse == [5, 7, 10, 14], "no look once the attack has several steps"
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    (event,) = record["events"]
    assert event["event"] == "catastrophic_overfitting"
    assert (event["step"], event["returned_to"]) == (14, "step-00000010")
    rows = tiny_run.rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[10]["guard_fired"], "told in the first row after the return"
    assert record["steps"] == 24


def test_going_on_from_here_keeps_the_steps_done(tmp_path: Path, collapse: list[int]) -> None:
    assert train(tmp_path, {"action": "strengthen"}) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["events"][0]["returned_to"] is None
    assert [row["step"] for row in tiny_run.rows(tmp_path / "run")] == list(range(1, 25))
    # A later session knows that the attack was changed, and what happened.
    assert train(tmp_path, {"action": "strengthen"}, "--resume", "auto") == 0
    assert collapse == [5, 7, 10, 14]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["events"] == record["events"]


def test_a_stop_ends_the_run_with_exit_code_1_and_names_the_last_checkpoint(
    tmp_path: Path, collapse: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, {"action": "stop"}) == 1
    message = capsys.readouterr().err
    assert "overfitting in step 14: accuracy is 90% under the training attack, but 10%" in message
    assert "step-00000010" in message
    assert "Traceback" not in message
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000010"
