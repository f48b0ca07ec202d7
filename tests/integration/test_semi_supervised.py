"""Training with few labels: stability on unlabelled images, and pseudo-labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_ds import load_config, models
from dat_ds.assembly import build_data_of
from dat_ds.cli.main import main
from dat_ds.data import classes_of
from dat_ds.engine.launch import setup_ranks
from dat_ds.training.run import _pseudo_labels
from tests.integration import tiny_run

FEW = {"labelled_fraction": 0.25}


def train(folder: Path, **sections: Any) -> Path:
    values = tiny_run.config(folder / "run", **sections)
    data = values["dat"]["data"]
    if "name" not in data:
        values["dat"]["data"] = {**tiny_run.config(folder)["dat"]["data"], **data}
    folder.mkdir(exist_ok=True)
    path = tiny_run.write(folder / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def labeller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeller")
    return train(folder, data={**FEW, "drop_unlabelled": True}, attack={"name": "none"})


def test_dropped_images_are_not_trained_on(labeller: Path) -> None:
    record = json.loads((labeller / "record.json").read_text())
    assert record["steps"] == 2 * -(-22 // 8), "22 of 90 images keep their labels"


def test_stability_training_takes_images_without_labels(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "uat", data=FEW, objective={"name": "trades"})
    assert "90 training images (68 of them without labels)" in capfd.readouterr().out
    rows = tiny_run.rows(run)
    assert len(rows) == 2 * 12
    assert all(row["consistency_loss"] > 0 for row in rows)


def test_robust_self_training_takes_the_labellers_word(
    tmp_path: Path, labeller: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {**FEW, "pseudo_labels": str(labeller), "labelled_repeats": 2}
    run = train(tmp_path / "rst", data=data, objective={"name": "at", "unlabelled_weight": 0.5})
    assert "112 training images (68 of them with pseudo-labels)" in capfd.readouterr().out
    config = load_config(run / "config.json")
    splits = build_data_of(config)
    given = _pseudo_labels(splits.mixture.unlabelled, config, setup_ranks())
    x = torch.stack([x for x, _ in splits.mixture.unlabelled])
    assert torch.equal(given, models.load(labeller)(x).argmax(1))
    splits.mixture.label(given)
    y = torch.tensor([splits.train[i][1] for i in range(len(splits.train))])
    assert torch.equal(classes_of(y[y < 0]), given)


def test_the_natural_twin_sees_labelled_images_only(tmp_path: Path) -> None:
    evaluation = {**tiny_run.config(tmp_path)["dat"]["evaluation"], "natural_twin": True}
    run = train(tmp_path / "twin", data=FEW, objective={"name": "trades"}, evaluation=evaluation)
    twin = load_config(run / "natural_twin" / "config.json")
    assert twin.dat.data.drop_unlabelled
    record = json.loads((run / "natural_twin" / "record.json").read_text())
    assert record["steps"] == 2 * -(-22 // 8)
