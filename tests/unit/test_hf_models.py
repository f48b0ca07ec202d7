"""Claims about models of Hugging Face: the same logits, fresh heads, and files of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from dat_ds.errors import ModelError
from dat_ds.models import build_model, load, save_weights
from tests.unit.model_helpers import HEADS, pixels, write_hf_vit


def test_hf_folder_gives_the_logits_of_the_hugging_face_model(tmp_path: Path) -> None:
    write_hf_vit(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    model = build_model(f"hf:{tmp_path}", num_classes=10, img_size=8).eval()
    original = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = pixels(channels=3)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    normalized = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(model(x), original(pixel_values=normalized).logits)


@pytest.mark.parametrize(("head", "outputs"), HEADS)
def test_hf_models_pre_train_and_fine_tune(head: Any, outputs: int, tmp_path: Path) -> None:
    write_hf_vit(tmp_path / "source")
    name = f"hf:{tmp_path / 'source'}"
    before = build_model(name, num_classes=outputs, head=head, seed=0).eval()
    x = pixels(channels=3)
    assert before(x).shape == (2, outputs or 16)
    save_weights(tmp_path / "saved", before.state_dict(), before.spec)
    assert torch.equal(load(tmp_path / "saved")(x), before(x))
    after = build_model(name, num_classes=4, seed=1, pretrained=tmp_path / "saved")
    assert after(x).shape == (2, 4)
    backbone = before.body.model.vit.state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in after.body.model.vit.state_dict().items())


def test_hf_model_reloads_after_its_folder_is_gone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_hf_vit(source, weights=False)
    model = build_model(f"hf:{source}", num_classes=4, seed=0).eval()
    save_weights(tmp_path / "saved", model.state_dict(), model.spec)
    (source / "config.json").unlink()
    before = torch.get_rng_state()
    loaded = load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded(pixels(channels=3)), model(pixels(channels=3)))


def test_hf_folder_without_weights_is_built_from_its_config_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_hf_vit(tmp_path, weights=False)
    arguments: dict[str, Any] = {
        "num_classes": 3,
        "in_chans": 1,
        "img_size": 12,
        "options": {"num_hidden_layers": 1, "patch_size": 3},
        "seed": 0,
    }
    model = build_model(f"hf:{tmp_path}", **arguments)
    again = build_model(f"hf:{tmp_path}", **arguments)
    assert "has no weights" in caplog.text
    assert model(pixels(12)).shape == (2, 3)
    assert torch.equal(model(pixels(12)), again(pixels(12)))


def test_hf_head_of_another_size_is_fresh_and_reproducible(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_hf_vit(tmp_path)
    model, again = (build_model(f"hf:{tmp_path}", num_classes=3, seed=0) for _ in range(2))
    assert "classifier.bias, classifier.weight" in caplog.text
    assert torch.equal(model(pixels(channels=3)), again(pixels(channels=3)))
    assert model(pixels(channels=3)).shape == (2, 3)


def test_hf_stored_weights_can_be_overridden_by_a_checkpoint(tmp_path: Path) -> None:
    write_hf_vit(tmp_path)
    first = build_model(f"hf:{tmp_path}", num_classes=3, seed=0)
    file = tmp_path / "trained.safetensors"
    save_file(first.state_dict(), file)
    second = build_model(f"hf:{tmp_path}", num_classes=3, seed=1, pretrained=file)
    assert torch.equal(second(pixels(channels=3)), first(pixels(channels=3)))


def test_hf_position_embeddings_are_interpolated_as_timms(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_hf_vit(tmp_path)
    arguments = {"num_classes": 10, "seed": 0}
    stored = build_model(f"hf:{tmp_path}", img_size=8, **arguments)
    file = tmp_path / "trained.pt"
    torch.save(stored.state_dict(), file)
    name = "body.model.vit.embeddings.position_embeddings"
    old = stored.get_parameter(name)
    expected = resample_abs_pos_embed(old, [4, 4], [2, 2], num_prefix_tokens=1)
    for pretrained in (None, file):
        caplog.clear()
        model = build_model(f"hf:{tmp_path}", img_size=16, pretrained=pretrained, **arguments)
        assert "is interpolated" in caplog.text
        torch.testing.assert_close(model.get_parameter(name), expected)
        assert torch.equal(expected[:, 0], old[:, 0])
        other = "body.model.vit.layers.1.mlp.fc1.weight"
        assert torch.equal(model.get_parameter(other), stored.get_parameter(other))
        assert model(pixels(16, 3)).shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, r"dat\.model\.depth=3: not for the Hugging Face model"),
        ({"options": {"layers": 3}}, r"dat\.model\.options\.layers: not a field of ViTConfig"),
        ({"options": {"num_labels": 3}}, r"dat\.model\.options\.num_labels is not allowed"),
        ({"img_size": 10}, r"dat\.model\.img_size=10x10 is not a multiple of the patch size 4"),
        (
            {"img_size": (16, 8)},
            r"only the classifier may differ.*position_embeddings.*\(dat\.data\.img_size=8\)",
        ),
        ({"in_chans": 1}, "only the classifier may differ.*patch_embeddings"),
        ({"stem": "cifar"}, "dat.model.stem='cifar' does not apply"),
    ],
)
def test_a_wrong_argument_of_a_hf_model_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_hf_vit(tmp_path)
    with pytest.raises(ModelError, match=message):
        build_model(f"hf:{tmp_path}", **{"num_classes": 10, **changes})


def test_a_hf_folder_that_is_no_image_classifier_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        build_model(f"hf:{tmp_path}/absent", num_classes=2)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        build_model(f"hf:{tmp_path}", num_classes=2)
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be used as an image classifier"):
        build_model(f"hf:{tmp_path}", num_classes=2)
