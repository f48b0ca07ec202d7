"""Reproductions of published results: the recipe from end to end, its configs and its networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from dat_ds.bench.tables.reproduction import Reference, Reproduction, reproduce, table_of
from dat_ds.config import load_config
from dat_ds.errors import ConfigError, UserError
from tests.integration.tiny_run import ROOT
from tests.settings import without_launcher

RECIPES = ROOT / "recipes"
CONFIGS = sorted((ROOT / "ds_configs" / "reproduce").glob("*.json"))
RECORDS = sorted((ROOT / "docs" / "results" / "reproduce").glob("*.json"))


@pytest.fixture(scope="module", autouse=True)
def _networks() -> Any:
    sys.path.insert(0, str(RECIPES))
    import networks

    yield networks
    sys.path.remove(str(RECIPES))


def tiny_mnist(path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 150), ("test", 20)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 8] += 180  # each class has a bar of its own
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


def test_the_recipe_trains_judges_and_writes_what_it_prints(tmp_path: Path) -> None:
    data = tiny_mnist(tmp_path / "tiny.npz")
    (tmp_path / "published.py").write_text(
        "import timm, torch, networks\n"
        "def network():\n"
        "    torch.manual_seed(0)\n"
        "    return timm.create_model('mnist_cnn', in_chans=1).eval()\n"
    )
    words = [sys.executable, str(RECIPES / "reproduce.py"), "mnist_cnn", "--data", f"npz:{data}"]
    words += ["--seeds", "2", "--num_examples", "10", "--output", "out.json"]
    words += ["--reference", "published:network", "--import", "published"]
    path = os.pathsep.join([str(ROOT), str(RECIPES), str(tmp_path)])
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**without_launcher(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    runs = record["measured"]["ours"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert {"clean", "pgd-50-10", "standard"} <= set(runs[0])
    for run in runs:
        assert run["standard"] <= run["clean"]
        folder = tmp_path / "runs/reproduce/mnist_cnn/ours" / f"seed-{run['seed']}"
        made = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert run["clean"] == made["natural_acc"]
        assert run["steps"] == made["steps"] == 20  # 150 images in batches of 100, 10 epochs
        judged = json.loads((folder / "evaluation" / "evaluation.json").read_text("utf-8"))
        assert run["standard"] == judged["robust_acc"]["all"]
        assert judged["num_examples"] == 10
    assert record["reference"]["pgd-50-10"] <= record["reference"]["clean"]
    assert table_of(record) in done.stdout
    mean = 50 * (runs[0]["clean"] + runs[1]["clean"])
    assert f"| ours | {mean:.2f} +- " in table_of(record)


def test_one_variant_labels_the_images_of_another_and_rows_come_one_by_one(tmp_path: Path) -> None:
    short = {"schedule": {"epochs": 1, "warmup_epochs": 0}, "checkpoint": {"every_epochs": 1}}
    few = {"labelled_fraction": 0.5, "drop_unlabelled": True}
    what = Reproduction(
        source="",
        image_shape=(1, 28, 28),
        published={},
        attacks=("pgd-2",),
        variants={
            "teacher": {"dat": {**short, "attack": {"name": "none"}, "data": few}},
            "self-training, weighed": {"dat": {**short, "data": {"labelled_fraction": 0.5}}},
        },
        labels_from={"self-training, weighed": "teacher"},
        judge="apgd-cw-10",
    )
    config = next(path for path in CONFIGS if path.stem == "mnist_cnn")
    data = {"name": "npz", "path": str(tiny_mnist(tmp_path / "tiny.npz"))}

    def rows(*variants: str) -> str:
        return reproduce(
            what, config, tmp_path / "runs", data=data, seeds=1, num_examples=10, variants=variants
        )

    with pytest.raises(ConfigError, match=r"--variants 'pupil' .* one of 'teacher', 'self-train"):
        rows("pupil")
    first = rows("teacher").splitlines()
    assert len(first) == 3  # header, rule, one row: nothing was published
    folder = tmp_path / "runs" / "teacher" / "seed-0"
    trained = (folder / "record.json").stat().st_mtime_ns
    both = rows().splitlines()
    assert both[:3] == first
    assert both[3].startswith("| self-training, weighed |")
    assert (folder / "record.json").stat().st_mtime_ns == trained  # not trained anew
    made = json.loads((tmp_path / "runs/self_training_weighed/seed-0/record.json").read_text())
    assert made["config"]["dat"]["data"]["pseudo_labels"] == str(folder)
    assert "`apgd-cw-10`, first 10 %" in both[0]


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (
            (1, 28, 28),
            {"seeds": 0, "num_examples": -1},
            "--seeds 0: .*\n--num_examples -1: ",
        ),
        ((3, 32, 32), {}, r"images have the shape \(C, H, W\) = \(1, 28, 28\), those"),
        ((1, 28, 28), {"reference": Reference("published:network")}, "add --import published"),
    ],
    ids=["counts", "images", "reference"],
)
def test_mistakes_are_told_before_anything_is_trained(
    tmp_path: Path, shape: tuple[int, int, int], changes: dict[str, Any], message: str
) -> None:
    what = Reproduction(source="", image_shape=shape, published={}, attacks=("pgd-2",))
    config = next(path for path in CONFIGS if path.stem == "mnist_cnn")
    asked = {
        "data": {"name": "npz", "path": str(tiny_mnist(tmp_path / "tiny.npz"))},
        "seeds": 1,
        "num_examples": 10,
        **changes,
    }
    with pytest.raises(UserError, match=message):
        reproduce(what, config, tmp_path / "runs", **asked)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_belongs_to_a_reproduction(config: Path) -> None:
    sys.path.insert(0, str(RECIPES))
    from reproduce import REPRODUCTIONS

    assert {path.stem for path in CONFIGS} == set(REPRODUCTIONS)
    what = Reproduction(**REPRODUCTIONS[config.stem])
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dat"]["data"]["path"] = "FILE"
    run = load_config(values)
    assert timm.is_model(run.dat.model.name)
    assert set(what.published) <= {"clean", what.judge, *what.attacks}
    assert set(what.labels_from) | set(what.labels_from.values()) <= set(what.variants)
    assert all(0 < value < 1 for value in what.published.values())


@pytest.mark.parametrize(
    ("name", "side", "channels", "parameters"),
    [
        # Counted by hand: weights and biases of each layer.
        ("mnist_cnn", 28, 1, 16 * 17 + 32 * 257 + 100 * 1569 + 10 * 101),
        ("lenet5", 28, 1, 32 * 10 + 64 * 289 + 200 * 3137 + 10 * 201),
        (
            "resnet2b",
            32,
            3,
            8 * 28 + (16 * 73 + 16 * 145 + 16 * 9) + 2 * 16 * 145 + 100 * 1025 + 10 * 101,
        ),
        (
            "resnet6",
            32,
            3,
            (16 * 27 + 32)
            + (32 * 144 + 32 * 288 + 32 * 16 + 3 * 64)
            + (64 * 288 + 64 * 576 + 64 * 32 + 3 * 128)
            + 10 * 65,
        ),
    ],
)
def test_a_network_has_the_size_that_its_layers_have(
    name: str, side: int, channels: int, parameters: int
) -> None:
    network = timm.create_model(name, in_chans=channels)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.rand(2, channels, side, side)).shape == (2, 10)
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        timm.create_model(name, depth=3)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_committed_record_is_of_committed_source_and_three_seeds(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert not record["commit"].endswith("+")
    for runs in record["measured"].values():
        assert [run["seed"] for run in runs] == [0, 1, 2]
