"""Targets of an evaluation: every kind is loaded, or refused with its reason."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from dat_ds.errors import ConfigError, DataError, ModelError, UserError
from dat_ds.judge.target import Target, load_target, open_case
from dat_ds.models import build_model, save_weights

MODEL = "test_resnet.r160_in1k"
MEAN_STD = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def tiny_model() -> Any:
    return build_model("test_resnet", num_classes=3, img_size=32, seed=0, **MEAN_STD).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    x = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x_test=x, y_test=np.arange(12) % 3)
    return f"npz:{path}"


def logits(target: Target) -> Tensor:
    x = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = target.model(x)
    return found


def expected() -> Tensor:
    return logits(Target("", tiny_model()))


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of the user's own."""
    module = types.ModuleType("zoo")
    module.good = tiny_model  # type: ignore[attr-defined]
    module.instance = tiny_model()  # type: ignore[attr-defined]
    module.wrapped = lambda: nn.DataParallel(tiny_model())  # type: ignore[attr-defined]
    module.compiled = lambda: torch.compile(tiny_model())  # type: ignore[attr-defined]
    module.training = lambda: tiny_model().train()  # type: ignore[attr-defined]
    module.function = lambda: lambda x: tiny_model()(x)  # type: ignore[attr-defined]
    module.none = lambda: None  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]

    def meta() -> nn.Module:
        with torch.device("meta"):
            return nn.Linear(2, 2)

    module.meta = meta  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo", module)
    return module


@pytest.mark.parametrize(
    "name", ["good", "instance", "wrapped", "compiled", "training", "function"]
)
def test_a_callable_gives_the_model(zoo: types.ModuleType, name: str) -> None:
    target = load_target(f"zoo:{name}", imports=["zoo"])
    assert torch.equal(logits(target), expected())
    assert not isinstance(target.model, nn.DataParallel)
    assert not hasattr(target.model, "_orig_mod")
    if isinstance(target.model, nn.Module):
        assert not any(module.training for module in target.model.modules())
    assert bool(target.was_training) == (name == "training")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "no callable of that name; it has .*good"),
        ("number", "no callable of that name"),
        ("none", "returned NoneType"),
        ("meta", "meta device.*load its weights"),
    ],
)
def test_a_callable_that_gives_none_is_refused(
    zoo: types.ModuleType, name: str, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        load_target(f"zoo:{name}", imports=["zoo"])


def test_a_module_is_imported_only_where_it_is_asked_for() -> None:
    with pytest.raises(ModelError, match="add --import zoo, which runs it"):
        load_target("zoo:good")


def test_a_saved_model_is_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    save_weights(tmp_path / "saved", model.state_dict(), model.spec)
    for text in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors"):
        target = load_target(str(text))
        assert torch.equal(logits(target), expected())
        assert target.digest == load_target(str(tmp_path / "saved")).digest is not None


OPTIONS = {"name": "test_resnet", **MEAN_STD}


@pytest.mark.parametrize("kind", ["whole", "body", "wrapped", "container"])
def test_a_state_dict_is_loaded_into_the_model_that_is_named(tmp_path: Path, kind: str) -> None:
    model = tiny_model()
    state = model.state_dict() if kind == "whole" else model.body.state_dict()
    if kind == "wrapped":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state} if kind == "container" else state, tmp_path / "w.pt")
    options = {"name": "test_resnet"} if kind == "whole" else OPTIONS
    target = load_target(str(tmp_path / "w.pt"), options=options, num_classes=3)
    assert torch.equal(logits(target), expected())


@pytest.mark.parametrize(
    ("options", "num_classes", "error", "words"),
    [
        ({}, 3, ModelError, r"does not say of which model: add --set dat\.model\.name=.*mean.*std"),
        ({"name": "test_resnet"}, 3, ModelError, r"--set dat\.model\.mean"),
        (OPTIONS, 5, ModelError, "does not fit 'test_resnet'.*fc"),
        ({**OPTIONS, "nmae": 1}, 3, ConfigError, "nmae"),
    ],
)
def test_a_state_dict_that_cannot_be_placed_is_refused(
    tmp_path: Path, options: dict[str, Any], num_classes: int, error: type[UserError], words: str
) -> None:
    torch.save(tiny_model().body.state_dict(), tmp_path / "w.pt")
    with pytest.raises(error, match=f"(?s){words}"):
        load_target(str(tmp_path / "w.pt"), options=options, num_classes=num_classes)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Bomb()}, "bomb.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(ModelError, match="must hold tensors only"):
            load_target(name, options=OPTIONS, num_classes=3)
    assert not Path("exploded").exists()


def test_an_exported_program_is_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(model, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    target = load_target(str(tmp_path / "model.pt2"))
    torch.testing.assert_close(logits(target), expected())
    x = torch.rand(5, 3, 32, 32, requires_grad=True)
    target.model(x).sum().backward()
    assert x.grad is not None
    (tmp_path / "bad.pt2").write_text("no program")
    with pytest.raises(ModelError, match=r"not a program of torch\.export"):
        load_target(str(tmp_path / "bad.pt2"))


def test_a_timm_folder_is_loaded(tmp_path: Path) -> None:
    body = timm.create_model("test_resnet", num_classes=3)
    body.pretrained_cfg = {**body.pretrained_cfg, **MEAN_STD}
    timm.models.save_for_hf(body, tmp_path)
    target = load_target(str(tmp_path))
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(MEAN_STD[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(target.model(x), body.eval()((x - mean) / std))


def test_a_timm_name_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub's library tries again for most of a minute where there is no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="weights of the timm model 'test_resnet' cannot be had"):
        load_target("test_resnet")
    with pytest.raises(ModelError, match=r"no such file, folder or timm model.*A target is"):
        load_target("resnte")


def test_a_hugging_face_folder_is_loaded(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        num_labels=3,
        id2label={0: "ant", 1: "bee", 2: "cat"},
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path)
    target = load_target(str(tmp_path))
    assert target.class_names == ("ant", "bee", "cat")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target.model(x), model((x - 0.1) / 0.2).logits)


def test_class_folders_in_another_order_are_matched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo: types.ModuleType
) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "white").save(tmp_path / "test" / name / "a.png")
    original = load_target

    def named(*args: Any, **options: Any) -> Target:
        target = original(*args, **options)
        return Target(target.name, target.model, class_names=names)

    monkeypatch.setattr("dat_ds.judge.target.load_target", named)

    def labels() -> list[int]:
        case = open_case(
            "zoo:good", data=f"imagefolder:{tmp_path}", threat="linf:0.1", imports=["zoo"]
        )
        return [int(case.images[i][1]) for i in range(3)]

    names: tuple[str, ...] = ("cat", "ant", "bee")
    assert labels() == [1, 2, 0]
    names = ("ant", "bee", "cat", "dog")
    assert labels() == [0, 1, 2]
    names = ("ant", "bee", "cow")
    with pytest.raises(DataError, match="not trained on: cat"):
        labels()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((2, 3, 8, 8), np.float32)}, None),
        ({"x": np.zeros((2, 8, 8, 3), np.float64)}, None),
        ({"x": np.zeros((2, 8, 8), np.uint8)}, None),
        ({"x": np.full((2, 8, 8), 200.0)}, "look like 0..255"),
        ({"x": np.full((2, 8, 8), -1.5)}, "look normalised already"),
        ({"x": np.full((2, 8, 8), np.nan)}, r"pixels are in \[0, 1\]"),
        ({"x": np.zeros((3, 8, 8), np.uint8)}, "3 images but y has 2 labels"),
        ({"z": np.zeros(3)}, "to be evaluated it needs x_test and y_test, or"),
        ({"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0, int)}, "no image to evaluate"),
    ],
)
def test_arrays_are_pixels_or_refused(
    tmp_path: Path, zoo: types.ModuleType, arrays: dict[str, Any], words: str | None
) -> None:
    np.savez(tmp_path / "a.npz", **{"y": np.zeros(2, int), **arrays})
    arguments: dict[str, Any] = {"threat": "linf:0.1", "imports": ["zoo"]}
    if words is None:
        case = open_case("zoo:good", data=f"npz:{tmp_path}/a.npz", **arguments)
        assert case.images[0][0].shape[1:] == (8, 8)
        assert case.images[0][0].dtype == torch.float32
    else:
        with pytest.raises(DataError, match=words):
            open_case("zoo:good", data=f"npz:{tmp_path}/a.npz", **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": None, "threat": None}, "--data is missing(?s:.*)--threat is missing"),
        ({"threat": "linf"}, "--threat 'linf' is not NORM:EPS"),
        ({"threat": "linf:8"}, r"write '8/255'"),
        ({"threat": "l3:1"}, "l3"),
        ({"data": "npz"}, "as in --data npz:PATH"),
        ({"data": "digist"}, "digits"),
        ({"overrides": ["dat.attack.steps=3"]}, "the target is not a run of ours"),
    ],
)
def test_mistakes_in_the_question_are_told(
    data: str, zoo: types.ModuleType, arguments: dict[str, Any], words: str
) -> None:
    asked = {"data": data, "threat": "linf:2/255", **arguments}
    with pytest.raises(ConfigError, match=words):
        open_case("zoo:good", imports=["zoo"], **asked)


def test_a_threat_remembers_how_it_was_written(data: str, zoo: types.ModuleType) -> None:
    case = open_case("zoo:good", data=data, threat="linf:2/255", imports=["zoo"])
    assert case.threat.to_dict()["eps"] == "2/255"
    assert case.threat.build().eps == 2 / 255
