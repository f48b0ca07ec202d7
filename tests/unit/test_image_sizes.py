"""Images of any height and width reach the model, or are refused with advice that works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matplotlib.axes import Axes

from dat_ds.assembly import build_data_of, build_model_of
from dat_ds.attacks import ThreatModel
from dat_ds.config import load_config
from dat_ds.errors import ConfigError, ModelError
from dat_ds.evaluation import draw_examples
from dat_ds.evaluation.pictures import of_several_classes
from dat_ds.models import PixelModel, build_model, check_takes_images, load, save_weights
from tests.integration import tiny_run
from tests.unit.model_helpers import VIT

SMALL_VIT: dict[str, Any] = {"name": VIT, "depth": 1, "embed_dim": 16, "num_heads": 2}
ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


def hf_folder(folder: Path, kind: str) -> str:
    if kind == "clip":
        config = transformers.CLIPConfig(
            vision_config=ENCODER, text_config={"num_hidden_layers": 1}
        )
    elif kind == "hiera":
        config = transformers.HieraConfig(
            embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=[64, 64]
        )
    elif kind == "pvt":
        config = transformers.PvtConfig(
            image_size=64, depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4
        )
    else:
        config = {"vit": transformers.ViTConfig, "dinov2": transformers.Dinov2Config}[kind](
            **ENCODER
        )
    config.save_pretrained(folder)
    return f"hf:{folder}"


def built(channels: int, height: int, width: int, **arguments: Any) -> PixelModel:
    """A model as a run builds it for images of this shape."""
    name = arguments.pop("name")
    size = height if height == width else (height, width)
    model = build_model(name, num_classes=3, in_chans=channels, img_size=size, seed=0, **arguments)
    check_takes_images(model, (channels, height, width))
    return model


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({**SMALL_VIT, "patch_size": 2}, (6, 10)),
        ({**SMALL_VIT, "patch_size": 1}, (3, 5)),
        (tiny_run.CNN, (6, 10)),
        (tiny_run.CNN, (1, 7)),
        ({"name": "hf:vit"}, (8, 12)),
        ({"name": "hf:dinov2"}, (8, 12)),
        ({"name": "hf:clip"}, (32, 32)),
        ({"name": "hf:hiera"}, (64, 64)),
        ({"name": "hf:hiera"}, (32, 64)),
    ],
    ids=str,
)
def test_a_model_takes_them_and_is_saved_and_loaded(
    arguments: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    if arguments["name"].startswith("hf:"):
        arguments = {"name": hf_folder(tmp_path, arguments["name"][3:])}
    model = built(3, *size, **arguments).eval()
    x = torch.rand(2, 3, *size)
    assert model(x).shape == (2, 3)
    save_weights(tmp_path / "saved", model.state_dict(), model.spec)
    assert torch.equal(load(tmp_path / "saved")(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "shape", "words"),
    [
        (SMALL_VIT, (1, 8, 8), "patch_size=16x16 does not divide the image size 8x8"),
        (SMALL_VIT, (3, 24, 16), "patch_size=16x16 does not divide the image size 24x16"),
        ({**SMALL_VIT, "patch_size": 4}, (3, 6, 10), "does not divide the image size 6x10"),
        ({**SMALL_VIT, "patch_size": 3}, (3, 7, 9), "does not divide the image size 7x9"),
        (
            {"name": "mixer_s32_224"},
            (3, 40, 64),
            "patch_size=32x32 does not divide the image size 40x64",
        ),
        ({"name": "convnext_atto"}, (3, 6, 10), "does not take images of 6 x 10 pixels"),
        ({"name": "nest_tiny"}, (3, 32, 64), "only handles square inputs"),
        ({"name": "hf:vit"}, (3, 6, 10), "img_size=6x10 is not a multiple of the patch size 4"),
        ({"name": "hf:hiera"}, (3, 6, 10), "does not take images of 6 x 10 pixels"),
        ({"name": "hf:clip"}, (3, 8, 12), "takes square images only, .* 8 x 12 pixels"),
        ({"name": "hf:pvt"}, (3, 32, 64), "takes square images only, .* 32 x 64 pixels"),
    ],
    ids=str,
)
def test_a_model_that_does_not_take_them_says_what_to_write(
    arguments: dict[str, Any], shape: tuple[int, int, int], words: str, tmp_path: Path
) -> None:
    if arguments["name"].startswith("hf:"):
        arguments = {"name": hf_folder(tmp_path, arguments["name"][3:])}
    with pytest.raises(ModelError, match=words) as caught:
        built(*shape, **arguments)
    text = str(caught.value)
    assert "dat.model." in text
    assert "\n" not in text
    advised = re.findall(r"dat\.data\.img_size=(\d+)", text)
    assert len(advised) == 1
    built(shape[0], int(advised[0]), int(advised[0]), **arguments)
    patches = re.findall(r"such as (\d+)", text)
    assert len(patches) == ("Set dat.model.patch_size" in text)
    for patch in patches:
        built(*shape, **{**arguments, "patch_size": int(patch)})


def test_the_check_leaves_the_model_and_the_random_state_as_they_are() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    arguments = {**tiny_run.CNN, "drop_rate": 0.5}
    model = build_model(arguments.pop("name"), num_classes=3, img_size=8, seed=0, **arguments)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_takes_images(model, (3, 8, 8))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def npz(folder: Path, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 24), ("test", 8)):
        arrays[f"x_{part}"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % classes
    np.savez(folder / "data.npz", **arrays)
    return {"name": "npz", "path": str(folder / "data.npz")}


def model_of(data: dict[str, Any], folder: Path, **model: Any) -> PixelModel:
    values = tiny_run.config(folder / "run", data=data, model={**tiny_run.VIT, **model})
    run = load_config(values)
    return build_model_of(run, build_data_of(run))


def test_a_run_builds_its_model_for_the_height_and_width_of_the_data(tmp_path: Path) -> None:
    data = npz(tmp_path, (6, 10), 4)
    assert model_of(data, tmp_path, patch_size=2)(torch.rand(2, 1, 6, 10)).shape == (2, 4)
    with pytest.raises(ConfigError, match="but the images of npz have 6 x 10 pixels: ") as caught:
        model_of(data, tmp_path, patch_size=2, img_size=6)
    assert "write dat.data.img_size=6, which resizes them" in str(caught.value)
    model_of({**data, "img_size": 6}, tmp_path, patch_size=2, img_size=6)


def test_one_class_is_refused_with_advice_that_works(tmp_path: Path) -> None:
    data = npz(tmp_path, (8, 8), 1)
    with pytest.raises(ConfigError) as caught:
        model_of(data, tmp_path)
    assert str(caught.value) == (
        "All labels of npz are 0, and a classifier needs at least two classes: add images of "
        "another one, or write dat.data.num_classes=2 where the data lack it."
    )
    assert model_of({**data, "num_classes": 2}, tmp_path).num_classes == 2


def test_a_class_without_a_name_is_drawn_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **more: titles.append(text))
    x, y = torch.rand(2, 1, 4, 6), torch.tensor([0, 0])
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 2))
    torch.nn.init.zeros_(flat[1].weight)
    flat[1].bias.data = torch.tensor([0.0, 1.0])
    threat = ThreatModel("linf", 0.1)
    draw_examples({"m": flat}, x, y, threat, "pgd-1", tmp_path / "a.png", class_names=["only"])
    assert titles == ["\u2717 1\nis only"] * 4, "a cross, since it is wrong"


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [
        ([0, 0, 0, 1, 2, 1], 3, [0, 3, 4]),  # one of each class
        ([0, 0, 0, 1, 2, 1], 5, [0, 1, 3, 4, 5]),  # then second ones
        ([3, 3], 4, [0, 1]),
        ([2, 1, 0], 2, [0, 1]),
    ],
)
def test_pictures_are_of_as_many_classes_as_there_are(labels, count, expected):
    assert of_several_classes(torch.tensor(labels), count) == expected
