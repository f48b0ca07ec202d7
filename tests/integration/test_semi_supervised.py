"""Training with few labels: stability on unlabelled images, and pseudo-labels."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png

from dat_ds import load_config, models
from dat_ds.assembly import build_data_of
from dat_ds.cli.main import main
from dat_ds.data import classes_of
from dat_ds.engine.launch import setup_ranks
from dat_ds.errors import DataError, ModelError
from dat_ds.evaluation.samples import Journal
from dat_ds.judge.label import label_run
from dat_ds.training.pseudo_labels import label_images, labels_for, read_labels
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
    ranks = setup_ranks()
    given = labels_for(splits, str(labeller), ranks, batch_size=8, num_workers=0).classes
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


def config_of(folder: Path, **data: Any) -> Path:
    values = tiny_run.config(folder / "run")
    values["dat"]["data"] |= {**FEW, "pseudo_labels": "labels", **data}
    folder.mkdir(exist_ok=True)
    return tiny_run.write(folder / "config.json", values)


def test_labels_are_the_models_likeliest_classes_and_are_trained_on(
    tmp_path: Path, labeller: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, output = config_of(tmp_path, pseudo_labels=None), tmp_path / "labels"
    words = ["label", str(labeller), "--deepspeed_config", str(config), "--output", str(output)]
    assert main(words) == 0
    printed = capfd.readouterr().out
    splits = build_data_of(load_config(config_of(tmp_path)))
    images = splits.mixture.unlabelled
    pairs = [images[i] for i in range(len(images))]
    with torch.no_grad():
        shares = models.load(labeller)(torch.stack([x for x, _ in pairs])).double().softmax(1)
    found, about = read_labels(output, splits), json.loads((output / "labels.json").read_text())
    assert torch.equal(found.classes, shares.argmax(1))
    assert found.confidence.tolist() == pytest.approx(shares.amax(1).tolist(), rel=1e-5)
    truth = torch.tensor([y for _, y in pairs])
    assert about["accuracy"] == (truth == found.classes).double().mean()
    assert (about["num_images"], about["known_labels"]) == (68, 68)
    assert f"dat.data.pseudo_labels='{output}'" in printed
    assert main(words) == 0  # finished already
    assert "holds these labels already" in capfd.readouterr().out
    threshold = float(found.confidence.sort().values[40])
    data = {**FEW, "pseudo_labels": str(output), "least_confidence": threshold}
    train(tmp_path / "rst", data=data, objective={"name": "at"})
    kept = int((found.confidence >= threshold).sum())
    words = f"{22 + kept} training images ({kept} of them with pseudo-labels)"
    assert words in capfd.readouterr().out


def test_labelling_goes_on_where_it_was_broken_off(tmp_path: Path, labeller: Path) -> None:
    images = build_data_of(load_config(config_of(tmp_path))).mixture.unlabelled
    model, seen = models.load(labeller), []

    def counting(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return model(x)

    folder = tmp_path / "labels"
    folder.mkdir()
    ranks = setup_ranks()
    with pytest.raises(KeyboardInterrupt):
        label_images(images, counting, ranks, batch_size=10, journal=Journal(folder, 0))
    again = label_images(images, counting, ranks, batch_size=7, journal=Journal(folder, 0))
    assert sum(seen[4:]) == 68 - 30
    whole = label_images(images, model, ranks, batch_size=68)
    assert torch.equal(again.classes, whole.classes)
    assert again.confidence.tolist() == pytest.approx(whole.confidence.tolist(), rel=1e-5)


def test_labels_of_other_images_and_other_classes_are_refused(
    tmp_path: Path, labeller: Path
) -> None:
    output = tmp_path / "labels"
    label_run(str(labeller), load_config(config_of(tmp_path)), output)
    other = load_config(config_of(tmp_path / "other"), overrides=["dat.seed=1"])
    with pytest.raises(DataError, match=r"labels of other images .*Label these with dat-ds label"):
        read_labels(output, build_data_of(other))
    whole = config_of(tmp_path / "whole", labelled_fraction=1.0, pseudo_labels=None)
    with pytest.raises(DataError, match=r"has no image without a label: write dat\.data\.labelled"):
        label_run(str(labeller), load_config(whole), tmp_path / "none")
    more = load_config(config_of(tmp_path / "more", num_classes=7))
    with pytest.raises(ModelError, match=r"has 4 outputs, and the run has 7 classes"):
        label_run(str(labeller), more, tmp_path / "seven")
    (output / "labels.npz").write_bytes(b"damaged")
    same = build_data_of(load_config(config_of(tmp_path)))
    with pytest.raises(DataError, match="is not a readable npz file"):
        read_labels(output, same)
    data = {**FEW, "pseudo_labels": str(labeller), "least_confidence": 0.9999999}
    values = tiny_run.config(tmp_path / "sure")
    values["dat"]["data"] |= data
    path = tiny_run.write(tmp_path / "sure.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 2


def test_labels_and_models_of_other_classes_are_refused_in_training_too(
    tmp_path: Path, labeller: Path
) -> None:
    output, ranks = tmp_path / "labels", setup_ranks()
    run = load_config(config_of(tmp_path))
    label_run(str(labeller), run, output)
    splits = build_data_of(run)
    named = dataclasses.replace(splits, class_names=("a", "b", "c", "d"))
    about = json.loads((output / "labels.json").read_text())
    tiny_run.write(output / "labels.json", {**about, "class_names": ["b", "a", "c", "d"]})
    with pytest.raises(DataError, match=r"another order .*class 0 is 'b' there and 'a' here"):
        read_labels(output, named)
    other = dataclasses.replace(splits, class_names=("a", "b", "c", "owl"))
    with pytest.raises(DataError, match=r"have other names .*class 0 is 'b' there and 'a' here"):
        read_labels(output, other)
    fewer = dataclasses.replace(splits, num_classes=3)
    with pytest.raises(DataError, match=r"its classes run from \d to 3, and the run has 3"):
        read_labels(output, fewer)
    with pytest.raises(ModelError, match="has 4 outputs, and the run has 3 classes"):
        labels_for(fewer, str(labeller), ranks, batch_size=8, num_workers=0)
    other = dataclasses.replace(splits, image_shape=(4, 8, 8))
    with pytest.raises(ModelError, match="does not take the images of the run"):
        labels_for(other, str(labeller), ranks, batch_size=8, num_workers=0)


def test_a_damaged_unlabelled_image_is_listed_when_it_is_labelled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    colour = {"image_shape": [3, 8, 8]}
    data = {**FEW, **colour, "drop_unlabelled": True}
    labeller = train(tmp_path / "labeller", data=data, attack={"name": "none"})
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        pixels = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(i))
        write_png(pixels.to(torch.uint8), str(folder / f"{i}.png"))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    keys = {**colour, "labelled_fraction": 1.0, "unlabelled_path": str(folder), "damaged": "skip"}
    config = load_config(config_of(tmp_path, **keys, most_damaged=1))
    about = label_run(str(labeller), config, tmp_path / "labels")
    assert about["damaged_images"] == 1
    assert "for 1 damaged ones another image was labelled" in capfd.readouterr().out
    assert str(folder / "1.png") in (tmp_path / "labels" / "damaged.txt").read_text()
    classes = read_labels(tmp_path / "labels", build_data_of(config)).classes
    assert classes[1] == classes[2], "the next readable image stands for it, as in training"
    strict = load_config(config_of(tmp_path, **keys, most_damaged=0))
    for _ in range(2):
        with pytest.raises(DataError, match=r"most_damaged=0 allows 0 of 4: they are listed in"):
            label_run(str(labeller), strict, tmp_path / "strict")
    shutil.copy(folder / "0.png", folder / "1.png")  # as the message says
    assert label_run(str(labeller), strict, tmp_path / "strict")["damaged_images"] == 0
    classes = read_labels(tmp_path / "strict", build_data_of(strict)).classes
    assert classes[1] == classes[0]
