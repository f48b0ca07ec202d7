"""Faulty numbers in a run: told with step, rank and samples, acted on, and repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dat_ds.cli.main import main
from dat_ds.data import loader as loader_module
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.evaluation import Record
from dat_ds.models import PixelModel
from tests.integration import tiny_run
from tests.spoilt import Spoil

WHITE = 5  # index of the one image that the planted model cannot take


def is_white(x: Tensor) -> Tensor:
    return (x.flatten(1).mean(1) > 0.8).unsqueeze(1)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Dark images and a white one, which a model can tell whatever the attack adds."""
    x = np.random.default_rng(0).integers(0, 150, (64, 8, 8), dtype=np.uint8)
    x[WHITE] = 255
    y = np.arange(64) % 4
    file = tmp_path / "data.npz"
    np.savez(file, x_train=x, y_train=y, x_test=x[40:], y_test=y[40:])
    return {"name": "npz", "path": str(file), "validation_fraction": 0}


@pytest.fixture
def nan_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model put out NaN for the white image."""
    forward = PixelModel.forward

    def broken(self: PixelModel, x: Tensor) -> Tensor:
        return forward(self, x) * torch.where(is_white(x), torch.nan, 1.0)

    monkeypatch.setattr(PixelModel, "forward", broken)


@pytest.fixture
def nan_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model's gradient be NaN for the white image, whose loss is finite."""
    forward = PixelModel.forward

    def broken(self: PixelModel, x: Tensor) -> Tensor:
        return Spoil.apply(forward(self, x), is_white(x))

    monkeypatch.setattr(PixelModel, "forward", broken)


def train(
    folder: Path, *arguments: str, deepspeed: dict[str, Any] | None = None, **dat: Any
) -> int:
    values = tiny_run.config(folder / "run", **dat) | (deepspeed or {})
    path = tiny_run.write(folder / "config.json", values)
    return main(["train", "--deepspeed_config", str(path), *arguments])


def events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run" / "record.json").read_text())
    return values


# ---- numbers that are not finite


def test_a_loss_that_is_nan_names_its_sample_and_can_be_repeated(
    tmp_path: Path, data: dict[str, Any], nan_output: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, data=data, logging={"every_steps": 100}) == 1
    (event,) = events(tmp_path)
    step = event["step"]
    assert (event["event"], event["kind"], event["ranks"]) == ("nonfinite", "loss", [0])
    assert event["samples"] == [[WHITE]]
    message = capsys.readouterr().err
    assert f"The loss is nan in step {step} on rank 0 (samples {WHITE})." in message
    assert f"dat-ds replay {event['reproducer']}" in message
    assert Path(event["reproducer"]).parent.name == f"step-{step:08d}"
    assert main(["replay", event["reproducer"]]) == 1
    words = capsys.readouterr().out
    assert "Weights: at the start of the step." in words
    assert "Loss: nan" in words
    assert "the output of the model (PixelModel), in a forward of the attack" in words
    assert words.strip().endswith(f"Samples: {WHITE}")
    # The same batch meets the same fault in a later session, which keeps it in the same place.
    assert train(tmp_path, "--resume", "auto", data=data, logging={"every_steps": 100}) == 1
    assert events(tmp_path) == [event, event]
    assert len(list((tmp_path / "run" / "faults").iterdir())) == 1


def test_a_replay_repeats_the_loss_bit_for_bit(
    tmp_path: Path,
    data: dict[str, Any],
    nan_gradient: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses: list[float] = []
    train_step = AdversarialEngine.train_step

    def spied(self: AdversarialEngine, batches: Any) -> Tensor:
        losses.append(float(loss := train_step(self, batches)))
        return loss

    monkeypatch.setattr(AdversarialEngine, "train_step", spied)
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert train(tmp_path, data=data, deepspeed=sizes, seed=3) == 1
    assert "Gradients are not finite in step" in capsys.readouterr().err
    (event,) = events(tmp_path)
    assert (event["kind"], event["step"]) == ("gradient", len(losses))
    assert event["step"] > 1, "weights, buffers and random numbers have moved"
    assert main(["replay", str(Path(event["reproducer"]).parent)]) == 1  # the folder will do
    assert losses[-1] == losses[-2]
    words = capsys.readouterr().out
    assert f"Loss: {losses[-1]:.9g}" in words
    assert "First not finite: the gradient of " in words
    assert "Differs" not in words


def test_steps_are_left_out_with_the_statistics_of_batch_norm(
    tmp_path: Path, data: dict[str, Any], nan_output: None
) -> None:
    skip = {"nonfinite": "skip", "reproducers": 1}
    evaluation = {"validation_every_epochs": 2, "validation_attack": "pgd-1", "attacks": []}
    sections = {"checkpoint": {"every_steps": 16}, "evaluation": {**evaluation, "pictures": 0}}
    assert train(tmp_path, data=data, model=tiny_run.CNN, numerics=skip, **sections) == 0
    found = record(tmp_path)["events"]
    assert [event["samples"] for event in found] == [[[WHITE]], [[WHITE]]], "once an epoch"
    assert [event["action"] for event in found] == ["skip", "skip"]
    assert [event["reproducer"] is None for event in found] == [False, True]
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-00000016")
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


def test_too_many_steps_left_out_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = PixelModel.forward
    monkeypatch.setattr(PixelModel, "forward", lambda self, x: forward(self, x) * torch.nan)
    assert train(tmp_path, numerics={"nonfinite": "skip", "most_skipped": 3}) == 1
    assert "3 steps in a row, up to step 3, were left out" in capsys.readouterr().err
    assert len(events(tmp_path)) == 3


def test_leaving_out_is_refused_where_deepspeed_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"zero_optimization": {"stage": 0}}
    assert train(tmp_path, deepspeed=stage, numerics={"nonfinite": "skip"}) == 2
    assert "zero_optimization.stage=1, 2 or 3" in capsys.readouterr().err


def test_weights_that_have_moved_on_are_those_of_the_newest_checkpoint(
    tmp_path: Path, data: dict[str, Any], nan_output: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"zero_optimization": {"stage": 0}}
    sections = {"logging": {"every_steps": 16}, "checkpoint": {"every_steps": 1}, "seed": 3}
    assert train(tmp_path, deepspeed=stage, data=data, **sections) == 1
    (event,) = events(tmp_path)
    assert event["samples"] == [[WHITE]]
    before = f"step-{event['step'] - 1:08d}"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == before
    assert main(["replay", event["reproducer"]]) == 1
    words = capsys.readouterr().out
    assert f"Weights: of checkpoint {before}." in words
    assert words.strip().endswith(f"Samples: {WHITE}")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(["replay", event["reproducer"]]) == 2
    assert "is gone" in capsys.readouterr().err


def test_weights_that_are_not_finite_at_a_checkpoint_are_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = AdversarialEngine.step

    def poisoned(self: AdversarialEngine) -> None:
        step(self)
        if self.global_steps == 2:
            next(self.module.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(AdversarialEngine, "step", poisoned)
    often = {"checkpoint": {"every_steps": 1}, "logging": {"every_steps": 100}}
    assert train(tmp_path, deepspeed={"zero_optimization": {"stage": 0}}, **often) == 1
    assert "Weights are not finite after step 2" in capsys.readouterr().err
    (event,) = events(tmp_path)
    assert (event["kind"], event["step"], event["action"]) == ("weight", 2, "stop")
    assert Path(event["reproducer"]).is_file()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_found_late_is_the_first_faulty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    huge = {
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1e30}},
    }
    flat = {"epochs": 2, "warmup_epochs": 0}
    assert train(tmp_path, deepspeed=huge, schedule=flat, logging={"every_steps": 5}) == 1
    (event,) = events(tmp_path)
    assert event["step"] == 2, "the first update is finite, and the next forward is not"
    assert event["kind"] == "loss"
    assert "in step 2 on rank 0" in capsys.readouterr().err
    expected = 0 if stage == 0 else 1  # ZeRO-0 has moved on, to weights that are not finite
    assert main(["replay", event["reproducer"]]) == expected
    words = capsys.readouterr().out
    assert ("Weights: at the start of the run." in words) == (stage == 0)
    assert ("the fault was not repeated" in words) == (stage == 0)


def test_a_nan_pixel_is_an_event_and_the_cause_before_the_loss(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = loader_module.fetch_sample

    def spoiled(dataset: Any, key: Any) -> Any:
        sample = fetch(dataset, key)
        return (sample[0] * torch.nan, sample[1]) if key.index == WHITE else sample

    monkeypatch.setattr(loader_module, "fetch_sample", spoiled)
    assert train(tmp_path, data={**data, "num_workers": 0}) == 2
    (event,) = events(tmp_path)
    assert (event["event"], event["rank"], event["samples"]) == ("faulty_images", 0, [WHITE])
    assert np.load(event["reproducer"])["sample"].tolist() == [WHITE]


# ---- what replay is given


def test_replay_refuses_what_is_no_kept_step(
    tmp_path: Path, data: dict[str, Any], nan_output: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, data=data) == 1
    file = Path(events(tmp_path)[0]["reproducer"])
    folder = file.parent
    foreign, coded, other = folder / "foreign.pt", folder / "coded.pt", tmp_path / "a" / "step"
    torch.save({"weights": torch.zeros(2)}, foreign)
    torch.save({"format": 1, "code": main}, coded)
    shutil.copytree(folder, other)
    values = torch.load(other / file.name, weights_only=True)
    torch.save({**values, "buffers": {"body.strange": torch.zeros(2)}}, other / file.name)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for path, words in {
        folder / "rank-7.pt": "rank-7.pt is missing.",
        foreign: "foreign.pt is not a step that a run has kept",
        coded: "holds more than tensors and plain types",
        other / file.name: "is of another model, which has body.strange",
        tmp_path / "empty": "name one of the files of ranks in it: none.",
    }.items():
        assert main(["replay", str(path)]) == 2, path
        assert words in capsys.readouterr().err


# ---- trust ratios, overfitting


@pytest.mark.parametrize(("action", "code"), [("warn", 0), ("stop", 1), ("none", 0)])
def test_large_trust_ratios_name_their_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, code: int
) -> None:
    numerics = {"trust_ratios": action, "largest_trust_ratio": 1e-6}
    short = {"max_steps": 3, "warmup_epochs": 0}
    values = tiny_run.config(
        tmp_path / "run", numerics=numerics, optimizer={"name": "lamb"}, schedule=short
    )
    del values["optimizer"]
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == code
    assert ("Trust ratios above" in "".join(capsys.readouterr())) == (action != "none")
    if action != "none":
        layers = events(tmp_path)[0]["layers"]
        assert "body.blocks.0.attn.qkv.weight" in layers
        assert all(float(ratio) > 1e-6 for ratio in layers.values())


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let robust accuracy on the validation images rise once, and fall from then on."""
    shares = iter([0.5, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])

    def evaluate(self: AdversarialEngine, data: Any, attacks: Any, **options: Any) -> Record:
        return Record(0.9, {attacks[0]: next(shares)}, 1000, {}, {})

    monkeypatch.setattr(AdversarialEngine, "evaluate", evaluate)


EVALUATION = {"validation_every_epochs": 0.25, "validation_attack": "pgd-2", "attacks": ["pgd-2"]}


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_falling_robust_accuracy_is_told_once_and_may_end_training(
    tmp_path: Path, falling: None, action: str
) -> None:
    overfitting = {"action": action, "patience": 2}
    sections = {"overfitting": overfitting, "evaluation": {**EVALUATION, "pictures": 0}}
    assert train(tmp_path, **sections) == 0
    found = record(tmp_path)
    (event,) = found["events"]
    assert event["event"] == "robust_overfitting"
    assert (event["best_acc"], event["acc"], event["action"]) == (0.6, 0.2, action)
    assert event["step"] == found["validation"][3]["step"]
    assert found["steps"] == (event["step"] if action == "stop" else 24)
    assert found["best_validation"]["step"] == event["best_step"]
    # A later session knows that training has ended, and evaluates again.
    assert train(tmp_path, "--resume", "auto", **sections) == 0
    assert record(tmp_path)["steps"] == found["steps"]
    assert record(tmp_path)["events"] == found["events"]
