"""Claims about dat_ds.models: architectures of timm, and files that come back the same."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dat_ds.attacks import build_attack
from dat_ds.errors import CheckpointError, ModelError
from dat_ds.models import PixelModel, build_model, load, save_weights
from tests.unit.model_helpers import HEADS, TINY_VIT, VIT, pixels, write_hf_vit


@pytest.fixture(scope="module")
def vit() -> PixelModel:
    return build_model(**TINY_VIT)


# timm


def test_vit_takes_8_pixel_images_of_one_channel(vit: PixelModel) -> None:
    assert vit(pixels()).shape == (2, 10)
    assert vit.num_classes == 10
    assert len(vit.body.blocks) == 2
    assert vit.spec["mean"] == vit.spec["std"] == [0.5]


def test_spec_is_json_and_builds_an_equal_model(vit: PixelModel) -> None:
    spec = json.loads(json.dumps(vit.spec))
    again = build_model(**spec)
    assert torch.equal(again(pixels()), vit(pixels()))


def test_published_mean_and_std_are_the_default_for_three_channels() -> None:
    model = build_model("resnet18", num_classes=10)
    assert model.spec["mean"] == [0.485, 0.456, 0.406]
    assert model.normalize.std.shape == (1, 3, 1, 1)


def test_img_size_is_dropped_for_a_model_that_takes_any_size() -> None:
    model = build_model("resnet18", num_classes=10, img_size=32).eval()
    assert model(pixels(32, 3)).shape == (2, 10)


def test_two_builds_with_the_same_seed_are_identical_and_another_seed_is_not(
    vit: PixelModel,
) -> None:
    state, same = vit.state_dict(), build_model(**TINY_VIT).state_dict()
    other = build_model(**{**TINY_VIT, "seed": 1}).state_dict()
    assert all(torch.equal(same[key], state[key]) for key in state)
    assert not torch.equal(other["body.head.weight"], state["body.head.weight"])


def test_global_random_state_is_unchanged_when_a_seed_is_given() -> None:
    before = torch.get_rng_state()
    build_model(**TINY_VIT)
    assert torch.equal(torch.get_rng_state(), before)


def test_cifar_stem_keeps_the_resolution_and_its_convolution_is_freshly_initialised() -> None:
    model = build_model("resnet18", num_classes=10, in_chans=1, stem="cifar", seed=0).eval()
    body: Any = model.body
    assert body.conv1.kernel_size == (3, 3)
    assert body.maxpool(body.conv1(pixels())).shape == (2, 64, 8, 8)
    # kaiming fan_out: std = sqrt(2 / (64 * 9)); 5 standard errors of 576 draws.
    assert body.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.15)
    assert model(pixels()).shape == (2, 10)


@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("source", ["timm", "hf"])
def test_activation_checkpointing_changes_neither_logits_nor_gradients(
    source: str, kind: Any, tmp_path: Path
) -> None:
    arguments = dict(TINY_VIT)
    if source == "hf":
        write_hf_vit(tmp_path)
        arguments = {"name": f"hf:{tmp_path}", "num_classes": 10, "seed": 0}
    channels = 1 if source == "timm" else 3
    results, calls = [], []
    for activation_checkpointing in ("none", kind):
        model = build_model(**arguments, activation_checkpointing=activation_checkpointing)
        inner = [module for module in model.modules() if isinstance(module, nn.Linear)][1]
        inner.register_forward_hook(lambda *_: calls.append("forward"))
        x = pixels(channels=channels).requires_grad_()
        logits = model(x)
        # The reentrant kind does not allow torch.autograd.grad.
        logits.square().sum().backward()
        results.append([logits, x.grad, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    # Once without; forward and recomputation with.
    assert len(calls) == 1 + 2


def test_each_model_keeps_its_own_kind_of_checkpointing() -> None:
    kinds: tuple[Any, ...] = ("reentrant", "non_reentrant")
    reentrant, other = (build_model(**TINY_VIT, activation_checkpointing=kind) for kind in kinds)
    x = pixels().requires_grad_()
    torch.autograd.grad(other(x).sum(), x)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(reentrant(x).sum(), x)
    torch.autograd.grad(other(x).sum(), x)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "is not a timm model; did you mean 'vit_tiny_patch16"),
        ({"name": "zzzzzz"}, r"is not a timm model\. Valid: any of timm\.list_models\(\) or 'hf:"),
        ({"name": f"{VIT}.bogus"}, "Invalid pretrained tag"),
        ({"patch_size": 3}, "dat.model.patch_size=3x3 does not divide the image size 8x8"),
        ({"embed_dim": 100, "num_heads": None}, "dat.model.embed_dim=100: .*dat.model.num_heads"),
        ({"num_heads": 7}, "dat.model.embed_dim=64 with dat.model.num_heads=7: the width"),
        ({"mean": [0.5, 0.5, 0.5]}, r"dat\.model\.mean=.* has 3 values for images of 1 channel"),
        ({"std": [0.0]}, r"dat\.model\.std=\[0\.0\] must be positive"),
        ({"stem": "cifar"}, "dat.model.stem='cifar' does not apply to .*conv1"),
        ({"stem": "tiny"}, "dat.model.stem='tiny' is unknown. Valid: 'default', 'cifar'"),
        ({"activation_checkpointing": "on"}, "dat.model.activation_checkpointing='on' is unknown"),
        ({"options": {"depth": 3}}, "dat.model.options.depth is not allowed"),
        ({"options": {"qkv_bais": False}}, r"not accept dat\.model\.options\.qkv_bais=False"),
        ({"options": {"act_layer": nn.ReLU}}, "dat.model.options must be plain JSON"),
    ],
)
def test_a_wrong_argument_is_named_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(**{**TINY_VIT, **changes})


def test_all_overrides_that_a_model_does_not_accept_are_named_at_once() -> None:
    with pytest.raises(ModelError, match="'resnet18' does not accept") as caught:
        build_model("resnet18", num_classes=10, patch_size=4, depth=3, options={"nope": 1})
    for part in ("dat.model.patch_size=4", "dat.model.depth=3", "dat.model.options.nope=1"):
        assert part in str(caught.value)


def test_a_model_without_activation_checkpointing_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"activation_checkpointing.*'none'"):
        build_model("dla46_c", num_classes=2, activation_checkpointing="reentrant")


# Pretrained checkpoints


def test_a_checkpoint_with_another_head_keeps_the_fresh_head_and_says_so(
    vit: PixelModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in vit.body.state_dict().items()}}, file)
    with caplog.at_level(logging.WARNING, logger="dat_ds"):
        model = build_model(**{**TINY_VIT, "num_classes": 3, "seed": 5}, pretrained=file)
    assert "head.bias, head.weight" in caplog.text
    assert model(pixels()).shape == (2, 3)
    torch.testing.assert_close(
        model.body.blocks[1].mlp.fc1.weight, vit.body.blocks[1].mlp.fc1.weight
    )


def test_a_checkpoint_of_the_same_shape_is_loaded_whole(
    vit: PixelModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(vit.state_dict(), file)
    model = build_model(**{**TINY_VIT, "seed": 5}, pretrained=file)
    assert torch.equal(model(pixels()), vit(pixels()))
    assert caplog.text == ""


RESNET = {"name": "resnet18", "stem": "cifar", "options": {"channels": [8, 8, 8, 8]}, "in_chans": 1}


@pytest.mark.parametrize(("head", "outputs"), HEADS)
@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_a_pre_trained_model_is_taken_over_but_for_its_head(
    architecture: str,
    head: Any,
    outputs: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = {k: v for k, v in TINY_VIT.items() if k not in ("num_classes", "mean", "std")}
    base = base if architecture == "vit" else RESNET
    given = {**base, "num_classes": outputs, "head": head}
    before = build_model(**{**given, "seed": 1}, mean=[0.3], std=[0.2]).eval()
    width = {"vit": 64, "resnet": 8}[architecture]
    assert before(pixels()).shape == (2, outputs or width)
    save_weights(tmp_path / "checkpoints" / "best", before.state_dict(), before.spec)
    assert torch.equal(load(tmp_path)(pixels()), before(pixels()))
    # As many classes as there are rotations: the head is a fresh one all the same.
    after = build_model(**{**base, "num_classes": 4, "seed": 2}, pretrained=tmp_path)
    fresh = build_model(**{**base, "num_classes": 4, "seed": 2})
    name = {"vit": "head", "resnet": "fc"}[architecture]
    for key, value in after.body.state_dict().items():
        source = fresh if key.startswith(f"{name}.") else before
        assert torch.equal(value, source.body.state_dict()[key]), key
    assert after.spec["mean"] == [0.3]
    assert f"freshly initialised instead: {name}.bias, {name}.weight" in caplog.text
    left_out = {
        "rotation": f"left out {name}.bias, {name}.weight",
        "projection": f"left out {name}.0.bias, {name}.0.weight, {name}.2.bias",
    }
    assert left_out.get(head, "") in caplog.text
    again = build_model(**given, pretrained=tmp_path / "checkpoints" / "best").eval()
    assert torch.equal(again(pixels()), before(pixels()))


def test_a_saved_head_of_other_classes_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {**TINY_VIT, "num_classes": 3}
    saved = build_model(**given, class_names=["cat", "dog", "owl"])
    save_weights(tmp_path, saved.state_dict(), saved.spec)
    fresh = build_model(**{**given, "seed": 7})
    for names, source in (
        (["cat", "dog", "owl"], saved),
        (None, saved),
        (["dog", "cat", "owl"], fresh),
    ):
        model = build_model(**{**given, "seed": 7}, class_names=names, pretrained=tmp_path)
        assert torch.equal(model.body.head.weight, source.body.head.weight), names
        assert torch.equal(model.body.pos_embed, saved.body.pos_embed)
    assert "freshly initialised instead: head.bias, head.weight" in caplog.text
    assert "of other classes: class 0 is 'cat' there and 'dog' here" in caplog.text


def test_timms_own_weights_are_taken_by_the_model_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    published, asked = timm.create_model("vit_tiny_patch16_224", depth=2), []
    create = timm.create_model

    def fetched(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if not pretrained:
            return create(name, **options)
        asked.append(name)
        return published

    monkeypatch.setattr(timm, "create_model", fetched)
    model = build_model(name, num_classes=5, depth=2, img_size=32, pretrained="timm", seed=1)
    assert asked == [name]
    assert torch.equal(model.body.blocks[1].mlp.fc1.weight, published.blocks[1].mlp.fc1.weight)
    assert model.body.head.weight.shape == (5, 192)
    assert model.spec["mean"] == [0.5, 0.5, 0.5], "what timm publishes for this name"
    with pytest.raises(ModelError, match="timm publishes no weights of this network"):
        build_model("resnet50t", num_classes=5, pretrained="timm")


def test_timms_own_weights_without_a_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def fetched(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fetched)
    with pytest.raises(ModelError, match=r"cannot be fetched \(no network\)"):
        build_model("resnet18", num_classes=5, pretrained="timm")


def test_a_checkpoint_of_a_training_script_is_read(vit: PixelModel, tmp_path: Path) -> None:
    file = tmp_path / "model_best.pth.tar"
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": vit.body.state_dict()}
    torch.save(content, file)
    model = build_model(**{**TINY_VIT, "seed": 5}, pretrained=file)
    assert torch.equal(model(pixels()), vit(pixels()))


def test_a_projection_is_two_layers_of_the_width_of_the_features() -> None:
    model = build_model(**{**TINY_VIT, "num_classes": 16}, head="projection")
    hidden, _, out = model.body.head
    assert (hidden.in_features, hidden.out_features) == (64, 64)
    assert (out.in_features, out.out_features) == (64, 16)
    features = build_model(**{**TINY_VIT, "num_classes": 0}, head="features")
    features.body.load_state_dict(model.body.state_dict(), strict=False)
    z = features(pixels())
    torch.testing.assert_close(model(pixels()), out(torch.relu(hidden(z))))


def test_a_model_without_one_linear_classifier_gets_no_projection() -> None:
    with pytest.raises(ModelError, match="'deit_tiny_distilled_patch16_224' does not end in one"):
        build_model("deit_tiny_distilled_patch16_224", num_classes=8, head="projection")


def test_position_embeddings_of_another_image_size_are_interpolated(
    vit: PixelModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights.pt"
    torch.save(vit.body.state_dict(), file)
    model = build_model(**{**TINY_VIT, "img_size": 16}, pretrained=file)
    assert "interpolated" in caplog.text
    assert model(pixels(16)).shape == (2, 10)


def test_what_a_file_lacks_and_what_is_left_out_are_listed(
    vit: PixelModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights.bin"
    torch.save({**vit.body.state_dict(), "decoder.weight": torch.ones(3)}, file)
    deeper = build_model(**{**TINY_VIT, "depth": 3}, pretrained=file)
    fresh = build_model(**{**TINY_VIT, "depth": 3}).state_dict()
    for key, value in deeper.state_dict().items():
        source = fresh if ".2." in key else vit.state_dict()
        assert torch.equal(value, source[key]), key
    lacking, left_out = (record.getMessage() for record in caplog.records)
    assert "freshly initialised instead: blocks.2.attn.proj.bias, " in lacking
    assert lacking.count("blocks.2.") == 12
    assert left_out.endswith("left out decoder.weight")
    caplog.clear()
    build_model(**{**TINY_VIT, "depth": 1}, pretrained=file)
    assert "left out blocks.1.attn.proj.bias, " in caplog.text


def test_a_file_of_another_network_is_refused(vit: PixelModel, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save(vit.body.state_dict(), file)
    with pytest.raises(ModelError, match=r"only the classifier \(head\) may have") as caught:
        build_model(**{**TINY_VIT, "embed_dim": 32}, pretrained=file)
    assert "... and 22 more" in str(caught.value)
    with pytest.raises(ModelError, match=r"shape \(64, 1, 4, 4\) in the file, \(64, 2, 4, 4\)"):
        build_model(**{**TINY_VIT, "in_chans": 2}, pretrained=file)
    other = {k.replace("blocks", "layers"): v for k, v in vit.body.state_dict().items()}
    torch.save(other, file)
    with pytest.raises(ModelError, match="have a name in common") as caught:
        build_model(**TINY_VIT, pretrained=file)
    assert "blocks.0.attn.proj.bias: the file has layers.0.attn.proj.bias" in str(caught.value)
    assert "of the 30 tensors of the model and the 30 of the file" in str(caught.value)
    assert "have a name in common: 6" in str(caught.value)
    assert "... and 16 more" in str(caught.value)


MEAN, STD = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.2)
WRAPPERS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "PixelModel": ("body.", {"normalize.mean": MEAN, "normalize.std": STD}),
    "RobustBench": ("model.", {"mu": MEAN, "sigma": STD}),
    "RobustBench, parallel": ("module.model.", {"module.mu": MEAN, "module.sigma": STD}),
    "named sequence": ("model.", {"normalize.mean": MEAN, "normalize.std": STD}),
    "sequence": ("1.", {"0.mean": MEAN, "0.std": STD}),
    "parallel sequence": ("module.1.", {"module.0.mean": MEAN, "module.0.std": STD}),
    "compiled": ("_orig_mod.", {}),
    "none": ("", {}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks_are_unwrapped_with_their_normalisation(
    wrapper: str, vit: PixelModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, (prefix, statistics) = tmp_path / "weights.pt", WRAPPERS[wrapper]
    weights = {f"{prefix}{key}": value for key, value in vit.body.state_dict().items()}
    torch.save({"state_dict": {**statistics, **weights}}, file)
    model = build_model(**{**TINY_VIT, "seed": 5}, pretrained=file)
    assert caplog.text == ""
    for key, value in model.body.state_dict().items():
        assert torch.equal(value, vit.body.state_dict()[key])
    assert model.spec["mean"] == pytest.approx([0.3] if statistics else [0.5])
    assert model.spec["std"] == pytest.approx([0.2] if statistics else [0.5])
    other = build_model(**TINY_VIT, mean=[0.5], std=[0.2], pretrained=file)
    assert other.spec["mean"] == [0.5]
    told = "dat.model.mean=[0.5], but the network of" in caplog.text
    assert told == bool(statistics)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_average_of_the_weights_is_taken_and_named(
    key: str, nested: bool, vit: PixelModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, average = tmp_path / "weights.pt", vit.body.state_dict()
    raw = {name: torch.zeros_like(value) for name, value in average.items()}
    content = {"decay": 0.9, "module": average} if nested else average
    torch.save({"model": raw, key: content, "epoch": 3}, file)
    model = build_model(**{**TINY_VIT, "seed": 5}, pretrained=file)
    assert torch.equal(model.body.pos_embed, vit.body.pos_embed)
    assert f"holds several models ({key}, model): '{key}' is taken" in caplog.text


def test_torchvisions_resnet_is_timms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "resnet18.pth"
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(theirs.state_dict(), file)
    model = build_model("resnet18", num_classes=7, mean=[0, 0, 0], std=[1, 1, 1], pretrained=file)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), theirs(x))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "absent.pt': there is no such file"),
        ("weights.ckpt", None, "ends in .safetensors, .pt, .pth, .bin or .pth.tar"),
        ("weights.pt", [1, 2], "does not hold a state dict"),
        ("object.pt", {"config": Path("x")}, "must hold tensors only"),
        ("weights.safetensors", b"not a header", "Cannot read weights"),
        ("weights.pth", b"", "Cannot read weights"),
    ],
)
def test_an_unreadable_checkpoint_is_an_error(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ModelError, match=message):
        build_model(**TINY_VIT, pretrained=file)


# Saved models


def test_a_saved_model_gives_equal_logits(vit: PixelModel, tmp_path: Path) -> None:
    save_weights(tmp_path, vit.state_dict(), vit.spec)
    before = torch.get_rng_state()
    model = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert torch.equal(model(pixels()), vit(pixels()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_both_files_of_a_saved_model_are_readable_by_the_same_people(
    vit: PixelModel, tmp_path: Path
) -> None:
    save_weights(tmp_path, vit.state_dict(), vit.spec)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_a_16_bit_file_loads_as_float32_with_exact_normalisation(
    vit: PixelModel, tmp_path: Path
) -> None:
    model = build_model(**TINY_VIT, mean=[0.1307], std=[0.3081])
    save_weights(tmp_path, {k: v.bfloat16() for k, v in model.state_dict().items()}, model.spec)
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.normalize.mean, model.normalize.mean)


def test_a_model_trained_with_checkpointing_loads_without_it(tmp_path: Path) -> None:
    model = build_model(**TINY_VIT, activation_checkpointing="reentrant")
    save_weights(tmp_path, model.state_dict(), model.spec)
    x = pixels().requires_grad_()
    torch.autograd.grad(load(tmp_path)(x).sum(), x)


def test_cifar_stem_and_options_survive_saving(tmp_path: Path) -> None:
    model = build_model(
        "resnet18", num_classes=2, in_chans=1, stem="cifar", options={"zero_init_last": False}
    ).eval()
    save_weights(tmp_path, model.state_dict(), model.spec)
    assert torch.equal(load(tmp_path)(pixels()), model(pixels()))


def test_tied_tensors_are_saved(tmp_path: Path, vit: PixelModel) -> None:
    shared = torch.ones(3)
    state = {"part": shared[1:], "a": shared, "b": shared}
    save_weights(tmp_path, state, vit.spec)
    saved = load_file(tmp_path / "model.safetensors")
    assert {key: len(value) for key, value in saved.items()} == {"part": 2, "a": 3, "b": 3}


def test_a_run_folder_stands_for_its_best_then_its_latest_checkpoint(
    vit: PixelModel, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for value, name in ((1.0, "step_10"), (2.0, "best")):
        state = {**vit.state_dict(), "body.head.bias": torch.full((10,), value)}
        save_weights(checkpoints / name, state, vit.spec)
    (checkpoints / "step_10" / "state.json").write_text('{"format": 1, "step": 10}')
    (checkpoints / "latest").write_text("step_10\n")
    assert load(tmp_path).body.head.bias[0] == 2.0
    assert load(checkpoints / "step_10" / "model.safetensors").body.head.bias[0] == 1.0
    (checkpoints / "best" / "model.safetensors").unlink()
    assert load(str(tmp_path)).body.head.bias[0] == 1.0


def test_a_missing_model_is_an_error_that_lists_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Looked for") as caught:
        load(tmp_path)
    for part in ("model.safetensors", "checkpoints/best", "checkpoints/latest"):
        assert part in str(caught.value)


def test_a_description_that_is_missing_or_of_another_format_is_an_error(
    vit: PixelModel, tmp_path: Path
) -> None:
    save_weights(tmp_path, vit.state_dict(), vit.spec)
    (tmp_path / "model.json").write_text(json.dumps({"format": 9, "spec": {}}))
    with pytest.raises(ModelError, match="has format 9"):
        load(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(ModelError, match=r"model\.json' is missing"):
        load(tmp_path)


def test_weights_that_do_not_fit_the_description_are_an_error(
    vit: PixelModel, tmp_path: Path
) -> None:
    save_weights(tmp_path, vit.state_dict(), {**vit.spec, "num_classes": 3})
    with pytest.raises(ModelError, match="does not fit"):
        load(tmp_path)


def test_a_full_disk_is_reported_and_leaves_the_earlier_model(
    vit: PixelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(tmp_path, vit.state_dict(), vit.spec)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*No space.*Nothing was lost"):
        save_weights(tmp_path, {"a": torch.ones(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert torch.equal(load(tmp_path)(pixels()), vit(pixels()))


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_weights(tmp_path / "file" / "best", {"a": torch.ones(1)}, {})


@pytest.mark.parametrize("kind", ["none", "non_reentrant", "reentrant"])
def test_an_attack_in_shorter_floats_passes_through_recomputed_activations(kind: Any) -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    attack = {"steps": 2, "precision": "bf16", "threat_model": {"norm": "linf", "eps": "8/255"}}
    found = []
    for checkpointing in ("none", kind):
        model = build_model(
            "vit_tiny_patch16_224",
            num_classes=3,
            img_size=32,
            patch_size=8,
            depth=2,
            embed_dim=16,
            num_heads=2,
            activation_checkpointing=checkpointing,
            seed=0,
        )
        generator = torch.Generator().manual_seed(0)
        found.append(build_attack(attack)(model, x, y, generator))
    assert torch.equal(*found)
