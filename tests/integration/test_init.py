"""``dat-ds init``: a first config that is valid, explained, and trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dat_ds.cli.main import main
from dat_ds.config import load_config


def written(folder: Path, *words: str) -> dict[str, Any]:
    file = folder / "first.json"
    assert main(["init", *words, "--output", str(file)]) == 0
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    load_config(values)
    return values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "digits"], {"data.augment": "crop", "threat_model.eps": "2/16"}),
        (["--data", "cifar10:data"], {"model.stem": "cifar", "threat_model.eps": "8/255"}),
        (
            ["--data", "images.npz", "--norm", "l2", "--gpus", "1"],
            {"data.name": "npz", "threat_model.eps": 0.5, "data.num_workers": 8},
        ),
        (
            ["--data", "FOLDER", "--eps", "3/255", "--model", "convnext_tiny"],
            {
                "data.name": "imagefolder",
                "threat_model.eps": "3/255",
                "model.name": "convnext_tiny",
            },
        ),
        (
            ["--data", "FOLDER", "--pretrained", "weights.safetensors", "--gpus", "4"],
            {"model.pretrained": "weights.safetensors", "attack.step_size": "eps/2"},
        ),
    ],
)
def test_answers_make_a_valid_config_of_which_every_key_is_explained(
    tmp_path: Path, words: list[str], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    words = [str(photos) if word == "FOLDER" else word for word in words]
    dat = written(tmp_path, *words)["dat"]
    for key, value in expected.items():
        section, name = key.split(".")
        assert dat[section][name] == value
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for section, values in dat.items():
        for key, value in values.items():
            line = lines[f"dat.{section}.{key}"]
            assert line.rstrip().endswith("."), "what the key means"
            assert json.dumps(value) in line
    if "--gpus" in words and words[-1] == "4":
        assert "torchrun --no-python --nproc_per_node 4 dat-ds train" in "\n".join(lines.values())


def test_several_gpus_shard_and_shorten_floats_and_a_cpu_does_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    several = written(tmp_path / "a", "--data", "digits", "--gpus", "4")
    alone = written(tmp_path / "b", "--data", "digits")
    assert several["zero_optimization"]["stage"] == 2
    assert several["torch_autocast"]["enabled"]
    assert alone["zero_optimization"]["stage"] == 0
    assert "torch_autocast" not in alone


def test_the_config_trains(tmp_path: Path) -> None:
    written(tmp_path, "--data", "digits")
    words = ["dat.schedule.epochs=4", "dat.schedule.max_steps=3", "dat.evaluation.attacks=[]"]
    words += [f"dat.output_dir={tmp_path / 'run'}", "dat.evaluation.pictures=0"]
    sets = [part for word in words for part in ("--set", word)]
    assert main(["train", "--deepspeed_config", str(tmp_path / "first.json"), *sets]) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["steps"] == 3


def test_on_a_terminal_what_is_missing_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["digits", "", "l2", "0.25", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(said))
    dat = written(tmp_path)["dat"]
    assert dat["threat_model"] == {"norm": "l2", "eps": "0.25"}
    assert "model" not in dat


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data is missing"),
        (["--data", "digts"], "did you mean 'digits'?"),
        (
            ["--data", "digits", "--norm", "l3", "--gpus", "-1"],
            "--norm l3: write one of linf, l2, l1.",
        ),
        (["--data", "digits", "--gpus", "two"], "--gpus two: write a number"),
        (["--data", "digits", "--eps", "8"], "It looks like 0-255 units: write '8/255'"),
        (["--data", "digits", "--output", "there.json"], "is there already: choose another name"),
        (["--data", "imagefolder"], "dat.data.path is missing"),
    ],
)
def test_what_makes_no_config_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    assert main(["init", *words]) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert (tmp_path / "there.json").read_text() == "mine"
    assert not (tmp_path / "run.json").exists()
