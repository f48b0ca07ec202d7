"""Resuming from what a bad disk, another process or an attacker has left of a checkpoint.

``python -m tests.integration.test_damaged_checkpoints 400`` damages so many files, puts code into
100 more, and prints a table.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_ds.checkpoints import files_in, write_manifest
from dat_ds.cli.main import main
from dat_ds.errors import CheckpointError
from dat_ds.files import sha256_of
from tests.integration import tiny_run

STAGES = (0, 1, 2, 3)
SHORT = 60


def train(folder: Path, values: dict[str, Any], *words: str) -> int:
    path = tiny_run.write(folder / "config.json", values)
    return main(["train", "--deepspeed_config", str(path), *words])


def values_of(output: Path, stage: int) -> dict[str, Any]:
    values = tiny_run.config(output)
    values["dat"]["schedule"] = {"epochs": 1}
    values["dat"]["evaluation"]["pictures"] = 0
    values["zero_optimization"] = {"stage": stage}
    return values


def engine_of(run: Path) -> Any:
    """An engine that has not been trained, for the run's checkpoints."""
    import dat_ds
    from dat_ds.assembly import build_data_of, build_model_of
    from dat_ds.config import load_config

    config = load_config(json.loads((run / "config.json").read_text()))
    splits = build_data_of(config)
    model = build_model_of(config, splits)
    return dat_ds.initialize(model=model, config=config, training_data=splits.train)[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A finished run of each stage, with two checkpoints."""
    runs = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        assert train(folder, values_of(folder / "run", stage)) == 0
        runs[stage] = folder / "run"
    return runs


def flip(data: bytearray, source: random.Random) -> bytes:
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return bytes(data)


DAMAGES: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "one bit": flip,
    "cut": lambda data, source: bytes(data[: source.randrange(len(data))]),
    "zeros": lambda data, source: bytes(len(data)),
    "garbage": lambda data, source: source.randbytes(len(data)),
    "longer": lambda data, source: bytes(data) + b"\0",
}


class Runs:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def reseal(checkpoint: Path) -> None:
    """A manifest that agrees with the files, as someone who means harm would write it."""
    entries = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
        for name in files_in(checkpoint)
    }
    write_manifest(checkpoint, entries)


def outcome_of(load: Callable[[], Any], file: Path) -> str:
    """What came of loading: ``refused, named`` is right."""
    try:
        load()
    except CheckpointError as error:
        return "refused, named" if file.name in str(error) else f"refused without {file.name}"
    except Exception as error:
        return f"traceback: {type(error).__name__}"
    return "went on"


def campaign(run: Path, count: int, seed: int) -> Counter[tuple[str, str]]:
    """Damage one file of the newest checkpoint at a time, and load it."""
    source, engine = random.Random(seed), engine_of(run)
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    found: Counter[tuple[str, str]] = Counter()
    names = [*files_in(checkpoint), "manifest.json"]
    for number in range(count):
        file = checkpoint / names[number % len(names)]
        kind = source.choice([*DAMAGES, "missing"])
        whole = file.read_bytes()
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes(DAMAGES[kind](bytearray(whole), source))
        outcome = outcome_of(lambda: engine.load_checkpoint(checkpoint.parent), file)
        if outcome == "went on" and file.name == "manifest.json":
            outcome = "harmless (a space of the manifest)"
        found[kind, outcome] += 1
        file.write_bytes(whole)
    engine.load_checkpoint(checkpoint.parent)  # whole again
    engine.close()
    return found


def malicious(run: Path, count: int) -> Counter[str]:
    """Put code into a file at a time, under a manifest that agrees, and load it."""
    engine = engine_of(run)
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    files = [checkpoint / name for name in files_in(checkpoint) if name.endswith(".pt")]
    found: Counter[str] = Counter()
    sealed = (checkpoint / "manifest.json").read_bytes()
    for number in range(count):
        file, mark = files[number % len(files)], run.parent / f"ran-{number}"
        whole = file.read_bytes()
        if number // len(files) % 2:
            file.write_bytes(pickle.dumps(Runs(mark)))
        else:
            state = torch.load(file, map_location="cpu", weights_only=False)
            torch.save({**state, "more": Runs(mark)}, file)
        reseal(checkpoint)
        outcome = outcome_of(lambda: engine.load_checkpoint(checkpoint.parent), file)
        found["code ran" if mark.exists() else outcome] += 1
        file.write_bytes(whole)
    (checkpoint / "manifest.json").write_bytes(sealed)
    engine.close()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_damage_is_refused_and_named(finished: dict[int, Path], stage: int) -> None:
    found = campaign(finished[stage], SHORT // len(STAGES), seed=stage)
    assert {outcome for _, outcome in found} <= {
        "refused, named",
        "harmless (a space of the manifest)",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_no_code_of_a_checkpoint_runs(finished: dict[int, Path], stage: int) -> None:
    files = list((finished[stage] / "checkpoints").glob("step-*/*.pt"))
    found = malicious(finished[stage], len(files))
    assert set(found) == {"refused, named"}


def test_un_averaged_weights_run_no_code_either(
    finished: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[3], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000012"
    file = next(checkpoint.glob("*optim_states.pt"))
    state = torch.load(file, map_location="cpu", weights_only=False)
    torch.save({**state, "more": Runs(tmp_path / "ran")}, file)
    reseal(checkpoint)
    words = ["export", str(checkpoint), "--to", "safetensors", "--weights", "raw"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert file.name in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(
    finished: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[2], run)
    whole = json.loads((run / "record.json").read_text())
    weights = run / "checkpoints" / "step-00000012" / "model.safetensors"
    weights.write_bytes(flip(bytearray(weights.read_bytes()), random.Random(0)))
    assert train(tmp_path, values_of(run, 2), "--resume", "auto") == 0
    printed = capsys.readouterr().out
    assert f"{weights} has other bytes than were written. Going on from an earlier one." in printed
    assert f"Continuing from {run / 'checkpoints' / 'step-00000010'}" in printed
    again = json.loads((run / "record.json").read_text())
    assert again["outcomes"] == whole["outcomes"]


def test_a_model_of_a_damaged_checkpoint_is_not_evaluated(
    finished: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[0] / "checkpoints" / "step-00000012", tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    weights.write_bytes(flip(bytearray(weights.read_bytes()), random.Random(1)))
    assert main(["export", str(tmp_path / "saved"), "--to", "onnx"]) == 2
    assert "other bytes than were written" in capsys.readouterr().err


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "latest is a path": (
        lambda run: (run / "checkpoints" / "latest").write_text("../../elsewhere") and None,
        ("--resume", "auto"),
        "not the name of a folder beside it",
    ),
    "every checkpoint is damaged": (
        lambda run: (
            [p.write_bytes(b"?") for p in run.glob("checkpoints/step-*/rank-0.pt")] and None
        ),
        ("--resume", "auto"),
        "dat-ds checkpoint verify",
    ),
    "a step that is not there": (
        lambda run: None,
        ("--resume", "RUN/checkpoints/step-00000099"),
        "it has step-00000010, step-00000012",
    ),
    "a run in another folder": (
        lambda run: None,
        ("--resume", "RUN/checkpoints/step-00000010", "--set", "dat.output_dir=RUN-else"),
        "leave out dat.output_dir",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_resume_that_would_lead_elsewhere_is_refused_and_changes_nothing(
    finished: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, words, text = REFUSED[name]
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    damage(run)
    before = {path: sha256_of(path) for path in run.rglob("*") if path.is_file()}
    words = tuple(word.replace("RUN", str(run)) for word in words)
    assert train(tmp_path, values_of(run, 1), *words) == 2
    assert text in capsys.readouterr().err
    assert {path: sha256_of(path) for path in run.rglob("*") if path.is_file()} == before


def test_without_latest_a_run_goes_on_from_its_newest_step(
    finished: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    (run / "checkpoints" / "latest").unlink()
    assert train(tmp_path, values_of(run, 1), "--resume", "auto") == 0
    assert f"Continuing from {run / 'checkpoints' / 'step-00000012'}" in capsys.readouterr().out


def _table(count: int) -> None:
    damages: Counter[tuple[str, str]] = Counter()
    codes: Counter[str] = Counter()
    for stage in STAGES:
        folder = Path(tempfile.mkdtemp())
        train(folder, values_of(folder / "run", stage))
        damages += campaign(folder / "run", count // len(STAGES), seed=stage)
        codes += malicious(folder / "run", 100 // len(STAGES))
        shutil.rmtree(folder)
    print("| damage | outcome | files |\n| --- | --- | --- |")
    for (kind, outcome), number in sorted(damages.items()):
        print(f"| {kind} | {outcome} | {number} |")
    for outcome, number in sorted(codes.items()):
        print(f"| code | {outcome} | {number} |")


if __name__ == "__main__":
    _table(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
