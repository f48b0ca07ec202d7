"""A user's mistake is one clear error with exit code 2: no traceback, no hang, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dat_ds.cli.main import main
from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.integration import tiny_run


def fails_with(
    folder: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], *arguments: str
) -> str:
    """Run the config, expect exit code 2, and return the message."""
    path = tiny_run.write(folder / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("dat-ds: error: ")
    assert "Traceback" not in message
    return message


def test_config_mistakes_come_all_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_run.config(tmp_path / "run", threat_model={"eps": 8}, atack={"steps": 3})
    values["gradiant_clipping"] = 1.0
    message = fails_with(tmp_path, capsys, values)
    for part in ("dat.threat_model.eps=8", "'8/255'", "dat.atack", "'attack'", "gradiant_clipping"):
        assert part in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"model": {"name": "vit_tinny_patch16_224"}}, ["vit_tiny_patch16_224", "dat.model.name"]),
        ({"data": {"name": "cifar10", "path": "/no/such"}}, ["dat.data.path", "/no/such"]),
        ({"data": {"name": "imagefolder", "path": "/no/such"}}, ["dat.data.path", "/no/such"]),
        ({"data": {"name": "digits", "num_classes": 5}}, ["dat.data.num_classes", "9"]),
        ({"output_dir": "/proc/run"}, ["/proc/run", "dat.output_dir"]),
        ({"model": {**tiny_run.VIT, "num_classes": 3}}, ["dat.model.num_classes=3", "4"]),
        (
            {"model": {**tiny_run.VIT, "img_size": 32}},
            ["dat.model.img_size=32", "dat.data.img_size"],
        ),
        ({"model": {**tiny_run.VIT, "patch_size": 3}}, ["patch_size", "3"]),
    ],
    ids=["model", "cifar", "folder", "labels", "output", "classes", "size", "patch"],
)
def test_mistakes_found_at_set_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, Any], parts: list[str]
) -> None:
    message = fails_with(tmp_path, capsys, tiny_run.config(tmp_path / "run", **section))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"zero_optimization": {"stage": 2, "stagee": 1}}, ["stagee"]),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}, ["overlap_comm", "maybe"]),
        ({"optimizer": {"type": "Adamm", "params": {}}}, ["optimizer.type='Adamm'", "'Adam'"]),
        ({"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}, ["optimizer.params.lrr", "'lr'"]),
        ({"optimizer": {"type": "SGD", "params": {"betas": 1}}}, ["optimizer.params.betas"]),
    ],
    ids=["zero-key", "zero-value", "optimizer", "parameter", "sgd"],
)
def test_mistakes_in_deepspeeds_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, Any], parts: list[str]
) -> None:
    values = {**tiny_run.config(tmp_path / "run"), **section}
    message = fails_with(tmp_path, capsys, values)
    for part in parts:
        assert part in message


def test_fp16_without_its_arithmetic_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.engine.hooks.supports_fp16", lambda: False)
    values = {**tiny_run.config(tmp_path / "run"), "fp16": {"enabled": True}}
    message = fails_with(tmp_path, capsys, values)
    assert "bf16" in message
    assert "torch_autocast" in message


def test_normalised_pixels_are_refused(tmp_path: Path) -> None:
    import dat_ds
    from dat_ds.errors import DataError

    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=tiny.config(0))
    x, y = tiny.images(2)
    with pytest.raises(DataError, match=r"outside the pixel range \[0, 1\].*dat.model.mean"):
        engine(4 * x - 2, y)
    with pytest.raises(DataError, match=r"x.float\(\) / 255"):
        engine((255 * x).byte(), y)
    engine.close()


def test_a_finished_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text("{}")
    message = fails_with(tmp_path, capsys, tiny_run.config(tmp_path / "run"))
    assert "--resume" in message
    assert (tmp_path / "run" / "record.json").read_text() == "{}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    values = tiny_run.config(folder / "run", schedule={"epochs": 1, "max_steps": 5})
    path = tiny_run.write(folder / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    return folder


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    values = tiny_run.config(tmp_path / "run", schedule={"epochs": 1, "max_steps": 5})
    values["dat"]["model"] = {**tiny_run.VIT, "embed_dim": 32}
    values["dat"]["seed"] = 3
    message = fails_with(tmp_path, capsys, values, "--resume", "auto")
    assert "dat.model.embed_dim: checkpoint 16, this run 32" in message
    assert "dat.seed: checkpoint 0, this run 3" in message
    untouched = json.loads((tmp_path / "run" / "config.json").read_text())
    assert untouched["dat"]["seed"] == 0


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_run.config(tmp_path / "run")
    message = fails_with(tmp_path, capsys, values, "--resume", str(tmp_path / "none"))
    assert str(tmp_path / "none") in message


def test_no_room_for_a_checkpoint_leaves_the_earlier_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    real = shutil.disk_usage

    def full_from_the_second_time(path: Any) -> Any:
        seen.append(1)
        return real(path) if len(seen) == 1 else real(path)._replace(free=1000)

    monkeypatch.setattr("dat_ds.engine.checkpoint.shutil.disk_usage", full_from_the_second_time)
    message = fails_with(tmp_path, capsys, tiny_run.config(tmp_path / "run"))
    assert "No room" in message
    assert "--resume auto" in message
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000005"
    path = tmp_path / "config.json"
    assert main(["train", "--deepspeed_config", str(path), "--resume", "auto"]) == 0
    assert tiny_run.rows(tmp_path / "run")[-1]["step"] == 24


def test_a_folder_in_which_another_run_is_at_work_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    holds = (
        "import sys, pathlib; from dat_ds.training.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", holds, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        message = fails_with(tmp_path, capsys, tiny_run.config(tmp_path / "run"))
        other.communicate("\n")
    assert f"in use by process {other.pid}" in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_disk_that_fills_up_while_writing_leaves_the_earlier_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = torch.save

    def fails_at_step_10(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "step-00000010" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fails_at_step_10)
    message = fails_with(tmp_path, capsys, tiny_run.config(tmp_path / "run"))
    assert "No space left" in message
    assert "Earlier checkpoints are intact" in message
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000005"


def test_non_finite_loss_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_run.config(tmp_path / "run")
    values["optimizer"]["params"]["lr"] = 1e30
    values["gradient_clipping"] = 0.0
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 1
    assert "step" in capsys.readouterr().err


# ---- several ranks


def make_image_folder(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 4)):
        for label in ("cat", "dog"):
            target = folder / part / label
            target.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.png")
    return folder


def train_on_rank(config: str, *arguments: str) -> tuple[str, str]:
    """Kind and text of the error that this rank ends with."""
    from dat_ds.training.run import train

    values = json.loads(config)
    from dat_ds.config import load_config

    try:
        train(load_config(values), resume=arguments[0] if arguments else "none")
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def several_mistakes(folder: str) -> list[tuple[str, str]]:
    """Cases in one spawn, each with what this rank ends with."""
    root = Path(folder)
    broken = tiny_run.config(
        root / "broken",
        data={"name": "imagefolder", "path": str(root / "images"), "img_size": 8},
        checkpoint={"every_steps": 1},
    )
    broken["train_micro_batch_size_per_gpu"] = 2
    few = tiny_run.config(
        root / "few",
        data={"name": "synthetic", "num_train": 1, "num_test": 4, "validation_fraction": 0},
    )
    model = tiny_run.config(root / "model", model={"name": "no_such_model"})
    fifo = tiny_run.config(root / "fifo", data={"name": "npz", "path": str(root / "data.npz")})
    nested = tiny_run.config(root / "nested")
    nested["zero_optimization"]["offload_optimizer"] = {"device": "disk"}
    return [train_on_rank(json.dumps(values)) for values in (broken, few, model, fifo, nested)]


def test_every_rank_ends_with_the_same_error(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images")
    for name in ("3.png", "5.png"):
        (images / "train" / "cat" / name).write_bytes(b"this is not an image")
    os.mkfifo(tmp_path / "data.npz")
    outcomes = run_ranks(several_mistakes, 2, str(tmp_path))
    for rank in outcomes:
        (broken, few, model, fifo, nested) = rank
        assert broken[0] == "DamagedImageError"
        assert "cat" in broken[1]
        assert ".png" in broken[1]
        assert few[0] == "DataError"
        assert "rank" in few[1]
        assert model[0] == "ModelError"
        assert fifo[0] == "DataError"
        assert "data.npz' is not a readable npz file of plain arrays" in fifo[1]
        assert "It is a FIFO, not a file" in fifo[1]
        assert nested[0] == "ConfigError"
        assert "zero_optimization.offload_optimizer.device='disk' is not valid" in nested[1]
    assert (tmp_path / "broken" / "checkpoints" / "latest").exists()


def short_tail(folder: str) -> list[list[int]]:
    """Steps logged by runs whose last batch leaves one of two ranks without images."""
    logged = []
    for name, sections in (
        ("dat", {"objective": {"name": "dat"}}),
        ("natural", {"attack": {"name": "none"}}),
        ("at", {}),
    ):
        data = {
            "name": "synthetic",
            "num_train": 9,
            "num_test": 4,
            "image_shape": [1, 8, 8],
            "num_classes": 4,
            "validation_fraction": 0,
        }
        values = tiny_run.config(Path(folder) / name, data=data, **sections)
        values["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        values["train_micro_batch_size_per_gpu"] = 4
        error = train_on_rank(json.dumps(values))
        assert error == ("", ""), error
        logged.append([row["step"] for row in tiny_run.rows(Path(folder) / name)])
    return logged


def test_ranks_without_images_keep_up_under_zero3(tmp_path: Path) -> None:
    assert run_ranks(short_tail, 2, str(tmp_path))[0] == [[1, 2, 3, 4]] * 3


def unreadable_evaluation(folder: str) -> tuple[str, str]:
    root = Path(folder)
    values = tiny_run.config(
        root / "run",
        data={"name": "imagefolder", "path": str(root / "images"), "img_size": 8},
        schedule={"epochs": 1},
    )
    return train_on_rank(json.dumps(values))


def test_an_unreadable_test_image_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images")
    (images / "test" / "cat" / "0.png").write_bytes(b"this is not an image")
    outcomes = run_ranks(unreadable_evaluation, 2, str(tmp_path))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == "DataError"
    assert "0.png" in outcomes[0][1]
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_checkpoint_never_holds_nans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dat_ds.engine import AdversarialEngine

    step = AdversarialEngine.step

    def poison_after_7(self: AdversarialEngine) -> None:
        step(self)
        if self.global_steps == 7:
            next(self.module.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(AdversarialEngine, "step", poison_after_7)
    values = tiny_run.config(tmp_path / "run", logging={"every_steps": 100})
    values["zero_optimization"] = {"stage": 0}
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 1
    assert "not finite" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000005"
