"""The presets: valid, documented, found, refused where they do not fit, and able to train."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_ds.bench.preset_cost import cost_of, cost_table
from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.models import build_model
from dat_ds.presets import PRESETS, STARTING_POINTS, read_preset, table, with_data
from dat_ds.training.run import train
from tests.integration import tiny_run

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ds_configs" / "presets").glob("*.json"))
SIDE, CLASSES, STEPS, BATCH = 16, 4, 20, 4
CHAIN = ("advxl_stage1", "advxl_stage2")
PRETRAINED = ("convstem_heavy", "fare_clip")


def small_model(model: dict[str, Any], side: int) -> dict[str, Any]:
    """A tiny model of the same family, for images of that side."""
    small, options = {**model, "img_size": side}, model.get("options", {})
    if "num_classes" in small:
        small["num_classes"] = CLASSES
    if model["name"].startswith("resnet"):
        sizes = {"channels": [8] * 4, "layers": [1] * 4}
        return {**small, "stem": "cifar", "options": {**options, **sizes}}
    if model["name"].startswith("convnext"):
        sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
        return {**small, "options": {**options, **sizes}}
    patch = 8 if model["name"].startswith("xcit") else 4
    return {**small, "patch_size": patch, "depth": 1, "embed_dim": 16, "num_heads": 2}


def shrunk(name: str, output: Path) -> dict[str, Any]:
    """A preset with a tiny model, small random images and 20 steps; all else is its own."""
    values = read_preset(name)
    dat = values["dat"]
    side = SIDE // 2 if dat["model"]["img_size"] == 112 else SIDE
    side = 2 * SIDE if dat["model"]["name"].startswith("convnext") else side  # of strides 32
    dat["model"] = small_model(dat["model"], side)
    data = {**dat["data"], "name": "synthetic", "num_workers": 0, "validation_fraction": 0.1}
    data |= {"img_size": side, "num_train": 40, "num_test": 4, "num_classes": CLASSES}
    dat["data"] = {**data, "image_shape": [3, SIDE, SIDE]}
    dat["schedule"]["max_steps"] = STEPS
    if "base_batch" in dat["schedule"]:
        dat["schedule"]["base_batch"] = BATCH
    dat["evaluation"] = {
        "attacks": ["pgd-1"],
        "validation_attack": "pgd-1",
        "validation_every_epochs": 1000,
        "pictures": 0,
    }
    dat["checkpoint"] = {"every_epochs": 1000}
    dat["logging"] = {"every_steps": STEPS, "progress": False, "trackers": []}
    dat["output_dir"] = str(output)
    values["train_batch_size"] = BATCH
    if "train_micro_batch_size_per_gpu" in values:
        values["train_micro_batch_size_per_gpu"] = BATCH // 2
    return values


def trained(values: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, after checks that it went through its steps."""
    record = train(load_config(values))
    assert record is not None
    assert record["steps"] == STEPS
    (last,) = tiny_run.rows(Path(values["dat"]["output_dir"]))
    assert last["step"] == STEPS
    assert math.isfinite(last["loss"])
    return record


def weights_file(values: dict[str, Any], path: Path) -> Path:
    """Weights for the model of a preset that starts from some."""
    model = dict(values["dat"]["model"])
    model["num_classes"] = model.get("num_classes", 0)
    torch.save(build_model(**model).body.state_dict(), path)
    return path


# --- files and page


def test_the_list_the_files_and_the_page_name_the_same_presets() -> None:
    assert {path.stem for path in FILES} == set(PRESETS)
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert [name for name in sections if name in PRESETS] == list(PRESETS)
    for name, source in PRESETS.items():
        for row in ("| source |", "| taken from it |", "| should reach |", "| deviations |"):
            assert row in sections[name], (name, row)
        if "as above" not in sections[name].split("\n| taken")[0]:
            for part in source.split("; "):
                assert part.split("arXiv ")[1] in sections[name], name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_complete(name: str) -> None:
    values = read_preset(name)
    run = load_config(with_data(values, f"{values['dat']['data']['name']}:somewhere"))
    assert load_config(run.to_dict()) == run
    assert run.dat.schedule.warmup_epochs < run.dat.schedule.epochs
    # A global batch for any number of ranks that divides it.
    assert values["train_batch_size"] % values.get("train_micro_batch_size_per_gpu", 1) == 0
    assert (run.dat.schedule.base_batch or values["train_batch_size"]) in (
        values["train_batch_size"],
        512,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_of_a_preset_takes_its_images(name: str) -> None:
    dat = read_preset(name)["dat"]
    num_classes = dat["model"].get("num_classes", 0)
    with torch.device("meta"):  # shapes alone
        model = build_model(**{**dat["model"], "num_classes": num_classes})
        outputs = model.eval()(torch.zeros(2, 3, *[dat["model"]["img_size"]] * 2))
    assert outputs.shape == (2, num_classes or 1024)


def test_an_installed_package_has_them() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"dat_ds.presets" = ["*.json", "starting/*.json"]' in text
    assert (ROOT / "ds_configs" / "presets").resolve() == ROOT / "dat_ds" / "presets"
    starting = ROOT / "dat_ds" / "presets" / "starting"
    assert {path.stem for path in starting.glob("*.json")} == set(STARTING_POINTS)
    for name in STARTING_POINTS:
        assert (ROOT / "ds_configs" / f"{name}.json").resolve() == starting / f"{name}.json"


@pytest.mark.parametrize("name", STARTING_POINTS)
def test_a_starting_point_by_name_is_its_file(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--preset", name, "--print"]) == 0
    by_name = capsys.readouterr().out
    file = str(ROOT / "ds_configs" / f"{name}.json")
    assert main(["config", "--deepspeed_config", file, "--print"]) == 0
    assert capsys.readouterr().out == by_name


# --- training


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in CHAIN])
def test_a_shrunken_preset_trains(name: str, tmp_path: Path) -> None:
    values = shrunk(name, tmp_path / "run")
    if name in PRETRAINED:
        values["dat"]["model"]["pretrained"] = str(weights_file(values, tmp_path / "start.pt"))
    before = copy.deepcopy(values)
    record = trained(values)
    for key in ("attack", "objective", "optimizer", "schedule", "ema", "compression"):
        kept = record["config"]["dat"][key]
        for option, value in before["dat"].get(key, {}).items():
            assert kept[option] == value, (key, option)


def test_the_second_stage_goes_on_from_the_first(tmp_path: Path) -> None:
    first, second = (shrunk(name, tmp_path / name) for name in CHAIN)
    assert (first["dat"]["model"]["img_size"], second["dat"]["model"]["img_size"]) == (
        SIDE // 2,
        SIDE,
    )
    trained(first)
    second["dat"]["model"]["pretrained"] = str(tmp_path / CHAIN[0])
    record = trained(second)
    assert record["config"]["dat"]["attack"]["steps"] == 3


# --- the command line


def test_the_commands_list_and_print_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert capsys.readouterr().out == table() + "\n"
    assert len(table().splitlines()) == len(PRESETS) + 1 + 1 + len(STARTING_POINTS) + 1
    assert main(["presets", "fast_at"]) == 0
    assert json.loads(capsys.readouterr().out) == read_preset("fast_at")
    words = ["config", "--preset", "trades_awp", "--data", "cifar10:x", "--set", "dat.seed=7"]
    assert main([*words, "--print"]) == 0
    resolved = json.loads(capsys.readouterr().out)["dat"]
    assert resolved["seed"] == 7
    assert resolved["data"]["path"] == "x"
    assert resolved["objective"]["beta"] == 6
    assert main(words) == 0
    assert "trades_awp: valid." in capsys.readouterr().out


def test_a_recipe_s_choices_do_not_reach_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {"dat": {"model": {"name": "resnet18", "options": {"channels": [8] * 4}}}}
    words = ["config", "--preset", "fast_at", "--data", "cifar10:x", "--print"]
    assert main(words, defaults=narrow) == 0
    model = json.loads(capsys.readouterr().out)["dat"]["model"]
    assert model["options"] == {"zero_init_last": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "fastat"], "'fastat' is not a preset (did you mean 'fast_at'?). Valid: dat_"),
        (["--preset", "fast_at"], "--preset fast_at needs its images: add --data cifar10:PATH."),
        (["--preset", "fast_at", "--data", "cifar10"], "write --data cifar10:PATH."),
        (
            ["--preset", "fast_at", "--data", "cifr:x"],
            "no dataset 'cifr' (did you mean 'cifar10'?)",
        ),
        (
            ["--preset", "fast_at", "--data", "synthetic", "--set", "dat.data.image_shape=[1,8,8]"],
            "dat.model.mean=[0.4914, 0.4822, 0.4465] is for images of 3 channel(s)",
        ),
        (
            ["--preset", "fast_at", "--data", "synthetic", "--set", "dat.data.image_shape=[1,8,8]"],
            "write dat.data.img_size=32",
        ),
        (
            ["--preset", "fast_at", "--data", "synthetic", "--set", "dat.data.num_classes=12"],
            "synthetic has 12 classes: write dat.model.num_classes=12",
        ),
        (
            ["--preset", "fast_at", "--data", "synthetic", "--set", "dat.data.num_classes=3"],
            "synthetic has 3 classes: write dat.model.num_classes=3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_preset_and_a_file_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--preset", "fast_at", "--deepspeed_config", "x.json"])
    assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert "--preset --deepspeed_config is required" in capsys.readouterr().err


def test_other_images_keep_augmentation_and_splits() -> None:
    values = read_preset("ares_vit")
    changed = with_data(values, "npz:file.npz")
    assert changed["dat"]["data"] == {**values["dat"]["data"], "name": "npz", "path": "file.npz"}
    assert "path" not in values["dat"]["data"]
    assert load_config(changed).dat.data.rand_augment == "rand-m9-mstd0.5-inc1"


def test_a_preset_trains_from_the_command_line_on_images_that_fit(tmp_path: Path) -> None:
    values = shrunk("n_fgsm", tmp_path / "run")
    changes = [
        f"dat.{section}={json.dumps(values['dat'][section])}"
        for section in ("model", "schedule", "evaluation", "logging")
    ]
    data = values["dat"]["data"]
    changes += [f"dat.data.{key}={json.dumps(data[key])}" for key in data if key != "name"]
    changes += [f"dat.output_dir={tmp_path / 'run'}", f"train_batch_size={BATCH}"]
    overrides = [word for change in changes for word in ("--set", change)]
    assert main(["train", "--preset", "n_fgsm", "--data", "synthetic", *overrides]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["steps"] == STEPS
    assert record["config"]["dat"]["attack"]["name"] == "n_fgsm"


# --- costs


def convolution(side: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    """Floating-point operations of a convolution, by the side of what comes out."""
    return 2 * side**2 * kernel**2 * inputs * outputs


def test_operations_hours_and_memory_are_those_of_a_computation_by_hand() -> None:
    # ResNet-18 for 32 pixels: stem, then four stages of four convolutions and a shortcut.
    stem = convolution(32, 3, 64)
    forward = stem + 4 * convolution(32, 64, 64) + 2 * 512 * 10
    for side, width in ((16, 128), (8, 256), (4, 512)):
        forward += convolution(side, width // 2, width) + 3 * convolution(side, width, width)
        forward += convolution(side, width // 2, width, kernel=1)
    update = 3 * forward - stem  # no gradient at the pixels
    # One step of FGSM on every image, then an update, in bfloat16.
    images, cost = 15 * 0.98 * 50_000, cost_of("fast_at")
    assert cost.operations == pytest.approx(images * (2 * forward + update), rel=1e-9)
    hours = cost.operations / (0.2 * 312e12) / 3600
    assert cost.gpu_hours == pytest.approx(hours, rel=1e-9)
    assert (cost.gpus, cost.micro_batch) == (1, 128)
    # Weights, gradients and momentum in float32, and activations of 128 images in 16 bits: the
    # outputs of convolutions, BatchNorms and ReLUs, some of them shared.
    states = 3 * 4 * 11_173_962
    outputs = 128 * (5 * 64 * 32**2 + 5 * (128 * 16**2 + 256 * 8**2 + 512 * 4**2))
    assert states + 2 * outputs < cost.memory_gib * 2**30 < states + 3 * 4 * outputs


def test_operations_count_natural_images_and_perturbed_weights() -> None:
    fast, trades = cost_of("fast_at"), cost_of("trades_awp")
    of_an_image = fast.operations / (15 * 0.98 * 50_000)
    stem = convolution(32, 3, 64)
    forward = (of_an_image + stem) / 5
    # PGD-10 on the divergence from a forward of its own; two images in an outer forward, which
    # AWP takes twice after 5 % of the run.
    expected = (11 + 10) * forward + 2 * (3 * forward - stem) * 1.95
    images = 200 * 0.98 * 50_000
    assert trades.operations == pytest.approx(images * expected, rel=1e-9)
    # float32: convolutions in TF32, the classifier's few products not.
    assert trades.gpu_hours == pytest.approx(trades.operations / (0.2 * 156e12) / 3600, rel=1e-3)


def test_the_command_prints_costs_and_what_they_assume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "fast_at", "--cost", "--gpu", "h100", "--utilisation", "0.4"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("fast_at"))
    assert row.split()[1:5] == ["1", "x", "128", "0.4"]
    for words in ("no GPU run has confirmed", "0.4 of the peak of one H100 (989 TFLOP/s"):
        assert words in printed


def test_the_page_shows_the_costs_that_the_command_prints() -> None:
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    shown = page.split("\n## Memory and GPU-hours")[1].split("\n## ")[0]
    assert [name for name in PRESETS if f"\n{name} " in shown] == list(PRESETS)
    (row,) = [line for line in cost_table(["fast_at"]).splitlines() if line.startswith("fast_at")]
    (line,) = [line for line in shown.splitlines() if line.startswith("fast_at ")]
    assert line.split() == row.split()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100"], "--gpu belongs to the costs of presets: write --cost."),
        (["--cost", "--gpu", "a10"], "--gpu a10: its speed is not known (did you mean 'a100'?)"),
        (["--cost", "--utilisation", "2"], "--utilisation 2: write a number in (0, 1]"),
        (["fast_act", "--cost"], "'fast_act' is not a preset (did you mean 'fast_at'?)"),
    ],
)
def test_a_cost_that_cannot_be_computed_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["presets", *arguments]) == 2
    assert words in capsys.readouterr().err
