"""Pre-training runs without labels: what they report, how they resume, and fine-tuning them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dat_ds.cli.main import main
from tests.integration import tiny_run

TIMELESS = ("step", "loss", "robust_loss", "lr", "attack_zero_share")


def train(folder: Path, *arguments: str, **sections: Any) -> dict[str, Any]:
    """Train a run in ``folder`` and return its record."""
    folder.parent.mkdir(exist_ok=True)
    values = tiny_run.config(folder, **sections)
    values["dat"]["checkpoint"]["keep"] = 99
    path = tiny_run.write(folder.with_suffix(".json"), values)
    assert main(["train", "--deepspeed_config", str(path), *arguments]) == 0
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "rotation", objective={"name": "rotation"})
    train(folder / "contrastive", objective={"name": "contrastive"}, model=tiny_run.CNN)
    for name in ("contrastive", "rotation"):
        model = tiny_run.CNN if name == "contrastive" else tiny_run.VIT
        model = {**model, "pretrained": str(folder / name)}
        train(folder / f"fare_from_{name}", objective={"name": "fare"}, model=model)
    return folder


def record_of(run: Path, name: str = "record.json") -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / name).read_text())
    return record


def test_rotation_reports_how_often_it_tells_the_rotation(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(runs / "rotation")
    assert record["num_examples"] == 4 * 20
    assert 0 <= record["robust_acc"]["pgd-5"] <= record["natural_acc"] <= 1
    assert "natural_loss" not in record
    assert len(record["outcomes"]["natural"]) == 80
    assert all(0 <= row["robust_acc"] <= 1 for row in tiny_run.rows(runs / "rotation"))
    assert (runs / "rotation" / "examples.png").exists()
    assert main(["eval", str(runs / "rotation")]) == 0
    words = capsys.readouterr().out
    assert "The adversarially trained model: accuracy on the rotation of 80 test images" in words
    assert "fine-tune it: --set dat.model.pretrained=RUN" in words


@pytest.mark.parametrize("name", ["contrastive", "fare_from_rotation", "fare_from_contrastive"])
def test_where_there_is_no_accuracy_none_is_shown(
    runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record, rows = record_of(runs / name), tiny_run.rows(runs / name)
    assert record["natural_acc"] is None
    assert record["robust_acc"] == {}
    assert record["outcomes"] == {}
    assert 0 < record["natural_loss"] <= record["robust_loss"]["pgd-5"]
    assert record["largest_perturbation"]["pgd-5"] == pytest.approx(2 / 16, abs=1e-6)
    assert all(row["natural_acc"] is None and row["robust_acc"] is None for row in rows)
    assert not (runs / name / "examples.png").exists()
    lowest = min(row["robust_loss"]["pgd-2"] for row in record["validation"])
    assert record["best_validation"]["value"] == lowest
    assert main(["eval", str(runs / name)]) == 0
    words = capsys.readouterr().out
    assert f"Mean {name.split('_')[0]} loss of the adversarially trained model" in words
    assert "%" not in words.splitlines()[-2]


@pytest.mark.parametrize("name", ["rotation", "contrastive", "fare_from_rotation"])
def test_evaluating_a_run_again_finds_what_its_record_says(runs: Path, name: str) -> None:
    assert main(["eval", str(runs / name)]) == 0
    again, record = record_of(runs / name, "evaluation.json"), record_of(runs / name)
    keys = {"natural_acc", "robust_acc", "natural_loss", "robust_loss", "outcomes"} & record.keys()
    assert {k: again[k] for k in keys} == {k: record[k] for k in keys}


def test_a_report_keeps_losses_and_accuracies_apart(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs / "rotation"), str(runs / "contrastive")]) == 0
    header, _, rotation, contrastive = capsys.readouterr().out.splitlines()
    columns = [name.strip() for name in header.split("|")]
    cells = [dict(zip(columns, row.split("|"), strict=True)) for row in (rotation, contrastive)]
    assert cells[0]["clean loss"].strip() == cells[0]["pgd-5 loss"].strip() == "-"
    assert cells[1]["clean %"].strip() == "-"
    assert float(cells[1]["pgd-5 loss"]) > 0


def test_a_resumed_fare_run_measures_against_the_weights_it_started_with(
    runs: Path, tmp_path: Path
) -> None:
    whole = runs / "fare_from_rotation"
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    (resumed / "record.json").unlink()
    (resumed / "checkpoints" / "latest").write_text("step-00000015")
    for late in ("step-00000020", "step-00000024"):
        shutil.rmtree(resumed / "checkpoints" / late)
    # Other weights to build the model from, as where the file was replaced meanwhile.
    train(tmp_path / "other", objective={"name": "rotation"}, schedule={"epochs": 1})
    model = {**tiny_run.VIT, "pretrained": str(tmp_path / "other")}
    record = train(resumed, "--resume", "auto", objective={"name": "fare"}, model=model)
    rows = [tiny_run.rows(run) for run in (whole, resumed)]
    assert [{k: row[k] for k in TIMELESS} for row in rows[1]] == [
        {k: row[k] for k in TIMELESS} for row in rows[0]
    ]
    assert record["robust_loss"] == record_of(whole)["robust_loss"]
    assert record["validation"] == record_of(whole)["validation"]


def test_fine_tuning_starts_from_the_best_pre_trained_model_with_a_fresh_head(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**tiny_run.CNN, "pretrained": str(runs / "contrastive")}
    record = train(tmp_path / "finetuned", model=model)
    words = capsys.readouterr().out
    best = runs / "contrastive" / "checkpoints" / "best" / "model.safetensors"
    assert f"'{best}'" in words
    assert "freshly initialised instead: fc.bias, fc.weight" in words
    assert "left out fc.0.bias, fc.0.weight, fc.2.bias, fc.2.weight" in words
    assert 0 <= record["robust_acc"]["pgd-5"] <= record["natural_acc"] <= 1


@pytest.mark.parametrize(
    ("sections", "micro_batch", "parts"),
    [
        (
            {"objective": {"name": "fare"}},
            8,
            ["dat.objective.name='fare' keeps the features", "dat.model.pretrained"],
        ),
        (
            {
                "objective": {"name": "rotation"},
                "data": {"name": "synthetic", "image_shape": [1, 8, 4], "num_classes": 2},
            },
            8,
            ["turns images by 90 degrees", "8 x 4", "dat.data.img_size=8"],
        ),
        (
            {"objective": {"name": "contrastive"}},
            1,
            ["train_micro_batch_size_per_gpu=1", "compares the images", "at least 2"],
        ),
        (
            {
                "objective": {"name": "contrastive"},
                "model": {**tiny_run.VIT, "name": "deit_tiny_distilled_patch16_224"},
            },
            8,
            ["dat.model.name='deit_tiny_distilled_patch16_224'", "one linear layer"],
        ),
    ],
    ids=["random-weights", "not-square", "batch-of-one", "head"],
)
def test_what_cannot_be_pre_trained_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    micro_batch: int,
    parts: list[str],
) -> None:
    values = tiny_run.config(tmp_path / "run", **sections)
    values["train_micro_batch_size_per_gpu"] = micro_batch
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message
