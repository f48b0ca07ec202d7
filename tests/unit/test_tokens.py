"""Attacks on a vision transformer that sees part of its patches."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dat_ds.attacks import SampleGenerator, ThreatModel, build_attack, dropped_tokens, patch_tokens

pytestmark = pytest.mark.fast

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
SMALL |= {"patch_size": 4, "intermediate_size": 32}


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **(sizes | options)).eval()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


MODELS = {
    "timm": (vit, 1),
    "timm with registers": (lambda: vit(reg_tokens=3), 4),
    "hf vit": (lambda: Logits(ViTForImageClassification(ViTConfig(**SMALL)).eval()), 1),
    "hf deit": (lambda: Logits(DeiTForImageClassification(DeiTConfig(**SMALL)).eval()), 2),
}


def lengths_seen(model: nn.Module) -> list[int]:
    """Length of the sequence in the attention's first linear layer, forward after forward."""
    seen: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == 16)
    layer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_see_the_prefix_and_part_of_the_patches(name: str) -> None:
    build, prefix = MODELS[name]
    model, x = build(), torch.rand(3, 3, 16, 16)
    seen = lengths_seen(model)
    before = model(x)
    with dropped_tokens(model, 0.25, SampleGenerator(0, 0)):
        model(x)
    assert torch.equal(model(x), before), "no trace is left"
    assert seen == [16 + prefix, 4 + prefix, 16 + prefix]
    assert patch_tokens(model)[1] == prefix


def test_keeping_all_is_a_reordering_that_changes_nothing() -> None:
    model, x = vit(), torch.rand(3, 3, 16, 16)
    expected = model(x)
    with dropped_tokens(model, 1.0, SampleGenerator(0, 0)):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_the_choice_is_a_function_of_the_sample_and_new_in_every_forward() -> None:
    model, x = vit(), torch.rand(4, 3, 16, 16)

    def outputs(x: Tensor, first: int) -> list[Tensor]:
        with dropped_tokens(model, 0.5, SampleGenerator(0, 0, first)):
            return [model(x), model(x)]

    whole, part = outputs(x, 0), outputs(x[2:], 2)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[2:], b, rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1])


def test_an_attack_moves_pixels_of_all_patches_in_few_steps() -> None:
    model, x, y = vit(), torch.full((2, 3, 16, 16), 0.5), torch.tensor([0, 1])
    threat = {"norm": "linf", "eps": 0.1}
    config = {"steps": 12, "step_size": 0.02, "keep_tokens": 0.5, "threat_model": threat}
    attack = build_attack({**config, "random_start": False})
    moved = (attack(model, x, y, SampleGenerator(0, 0)) - x).abs()
    patches = moved.unfold(2, 4, 4).unfold(3, 4, 4).amax(dim=(1, 4, 5))
    assert bool((patches > 0).all())
    assert float(moved.max()) <= 0.1 + 1e-6
    assert ThreatModel("linf", 0.1).distance(x + moved, x).max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"]
)
def test_models_without_such_tokens_are_told(name: str) -> None:
    model = timm.create_model(name, num_classes=4)
    assert patch_tokens(model) is None
    with pytest.raises(ValueError, match="keep_tokens needs a timm VisionTransformer"):
        build_attack(
            {
                "steps": 1,
                "step_size": 1,
                "keep_tokens": 0.5,
                "threat_model": {"norm": "l2", "eps": 1},
            }
        )(model, torch.rand(1, 3, 8, 8), torch.tensor([0]))
