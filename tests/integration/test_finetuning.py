"""Own JPEGs, weights of others: a run that is fine-tuned, evaluated and loaded as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dat_ds import models
from dat_ds.cli.main import main
from tests.integration import tiny_run

VIT: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
CLASSES = ("cats", "dogs", "newts")


def write_photos(folder: Path) -> None:
    """JPEGs of several sizes; each class has a colour."""
    draws = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 120, (20 + i, 24, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")


def write_pretrained(file: Path) -> dict[str, torch.Tensor]:
    """What another library left: a larger image, another classifier, an average of the weights."""
    torch.manual_seed(3)
    network = timm.create_model(NAME, img_size=32, num_classes=10, **VIT)
    average = network.state_dict()
    raw = {key: torch.zeros_like(value) for key, value in average.items()}
    wrapped = {f"module.{key}": value for key, value in average.items()}
    torch.save({"state_dict": raw, "state_dict_ema": wrapped, "epoch": 7}, file)
    return average


def config(folder: Path, **finetuning: Any) -> dict[str, Any]:
    return tiny_run.config(
        folder / "run",
        model={"name": NAME, **VIT, "pretrained": str(folder / "vit.pth")},
        data={"name": "imagefolder", "path": str(folder / "photos"), "img_size": 16},
        finetuning=finetuning,
        schedule={"epochs": 2},
        optimizer={"name": "adamw", "lr": 0.003},
    )


def run_of(folder: Path, values: dict[str, Any]) -> Path:
    values.pop("optimizer")
    path = tiny_run.write(folder / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    write_photos(folder / "photos")
    return folder


def test_a_backbone_is_fine_tuned_evaluated_and_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_pretrained(folder / "vit.pth")
    rules = [{"match": "^patch_embed", "freeze": True}]
    run = run_of(folder, config(folder, layer_decay=0.5, parameters=rules))
    words = capsys.readouterr().out
    assert "holds several models (state_dict_ema, state_dict): 'state_dict_ema' is taken" in words
    assert "position embeddings are interpolated" in words
    assert "freshly initialised instead: head.bias, head.weight" in words
    assert "left out head.bias, head.weight" in words
    assert "Fine-tuning trains 30 of 32 parameter tensors" in words
    record = json.loads((run / "record.json").read_text())
    assert record["steps"] == 6
    assert record["config"]["zero_optimization"]["stage"] == 2
    weights = load_file(next((run / "checkpoints").glob("step-*")) / "model.safetensors")
    assert torch.equal(weights["body.patch_embed.proj.weight"], before["patch_embed.proj.weight"])
    moved = {
        key: (weights[f"body.{key}"] - before[key]).abs().max()
        for key in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")
    }
    ratio = moved["blocks.1.mlp.fc1.weight"] / moved["blocks.0.mlp.fc1.weight"]
    assert 1.4 < ratio < 2.8  # Adam's steps are about as long as the rate, and of it half

    assert main(["eval", str(run), "--set", 'dat.evaluation.attacks=["pgd-3"]']) == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["num_examples"] == 12
    model = models.load(run)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    assert not any(module.training for module in model.modules())


def test_adapters_leave_a_plain_model(folder: Path) -> None:
    pytest.importorskip("peft")
    before = write_pretrained(folder / "vit.pth")
    values = config(folder, lora={"rank": 2})
    values["dat"]["output_dir"] = str(folder / "adapted")
    run_of(folder, values)
    model = models.load(folder / "adapted")
    state = model.state_dict()
    assert not any("lora" in key for key in state)
    qkv, fc1 = "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"
    assert torch.equal(state[f"body.{fc1}"], before[fc1])
    update = state[f"body.{qkv}"] - before[qkv]
    values = torch.linalg.svdvals(update)
    assert values[1] > 0
    assert values[2] < 1e-2 * values[0], "of rank 2"
    target = folder / "adapted"
    assert main(["eval", str(target), "--set", 'dat.evaluation.attacks=["pgd-2"]']) == 0
    arguments = ["--to", "safetensors", "--output", str(folder / "exported")]
    assert main(["export", str(target), *arguments]) == 0
