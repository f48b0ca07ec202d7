"""Cheaper passes in the attack: shorter floats, and BatchNorm folded into convolutions."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.attacks import (
    PRECISIONS,
    SampleGenerator,
    ThreatModel,
    attack_mode,
    build_attack,
    folded_batch_norm,
    gradient_speedup,
    product_speedup,
)
from dat_ds.attacks.passes.folding import conv_norm_pairs
from dat_ds.attacks.passes.quantized import multiplied, quantized_linears

THREAT = ThreatModel("linf", 8 / 255)
PGD: dict[str, Any] = {"steps": 5, "step_size": "2/255", "threat_model": THREAT}


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


def resnet(name: str = "resnet18") -> nn.Module:
    """With running statistics as training leaves them, none of them 0 or 1."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, channels=[8, 8, 16, 16])
    with_statistics(model)
    return model


def settled() -> nn.Module:
    """With the statistics of the images, so that gradients are those of a network in use."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4, channels=[8, 8, 16, 16])
    for _ in range(30):
        model.train()(images()[0])
    return model


def with_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.arange(count) % 4


@torch.no_grad()
def loss_at(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with attack_mode(model):
        return float(F.cross_entropy(model(x), y))


# ---- precision


@pytest.mark.parametrize(
    ("build", "precision"),
    [
        (vit, "bf16"),
        (vit, "fp16"),
        (vit, "int8"),
        (vit, "fp8"),
        (settled, "bf16"),
        (settled, "fp16"),
    ],
)
def test_a_shorter_float_attacks_almost_as_well_and_leaves_no_trace(
    build: Any, precision: str
) -> None:
    model, (x, y) = build(), images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[torch.dtype] = []
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    handle = head.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    found = {}
    for name in (None, precision):
        attack = build_attack({**PGD, "precision": name})
        found[name] = attack(model, x, y, SampleGenerator(0, 0))
    handle.remove()
    assert seen == [torch.float32] * 5 + [PRECISIONS[precision]] * 5
    short = found[precision]
    assert short.dtype == torch.float32
    assert float((short - x).abs().max()) <= 8 / 255 + 1e-7
    assert not torch.equal(short, found[None])
    rise = {name: loss_at(model, x_adv, y) - loss_at(model, x, y) for name, x_adv in found.items()}
    assert rise[precision] > 0.9 * rise[None] > 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"attack\.precision='int4' is not valid .*Write one of 'bf16', 'fp16'"
    ):
        build_attack({**PGD, "precision": "int4"})


def test_speedups_are_ratios_of_times() -> None:
    assert product_speedup(torch.device("cpu"), "bf16") > 0
    model, (x, _) = vit(), images(2)
    calls: list[bool] = []
    handle = model.register_forward_hook(
        lambda _m, _i, output: calls.append(output.dtype == torch.bfloat16)
    )
    with attack_mode(model):
        assert gradient_speedup(model, x, "bf16") > 0
    handle.remove()
    assert calls == [False, True] * 4


# ---- 8 bits


@pytest.mark.parametrize(("format", "error"), [("int8", 0.015), ("fp8", 0.045)])
def test_products_in_8_bits_are_close_and_their_gradients_too(format: Any, error: float) -> None:
    torch.manual_seed(0)
    rows = torch.logspace(-6, 6, 40)[:, None]  # of very different sizes: each has its own scale
    x, cotangent = torch.randn(40, 64) * rows, torch.randn(40, 32) * rows.flip(0)
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    found = []
    for context in (contextlib.nullcontext(), quantized_linears(layer, format)):
        leaf = x.clone().requires_grad_()
        with context:
            outputs = layer(leaf.reshape(4, 10, 64)).reshape(40, 32)
            (gradient,) = torch.autograd.grad(outputs, leaf, cotangent)
        found.append((outputs.detach(), gradient))
    for plain, rounded in zip(*found, strict=True):
        errors = (rounded - plain).norm(dim=1) / plain.norm(dim=1)
        assert 0 < float(errors.max()) < 1.5 * error
        assert float(errors.mean()) < error
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_zeros_and_non_finite_entries_survive_8_bits(format: Any) -> None:
    left, right = torch.ones(32, 16), torch.ones(16, 16)
    left[0], left[1, 3] = 0, float("inf")
    product = multiplied(left, right, format)
    assert torch.equal(product[0], torch.zeros(16))
    assert bool(product[1].isnan().all())
    torch.testing.assert_close(product[2:], torch.full((30, 16), 16.0), rtol=0.005, atol=0)


def test_layers_that_8_bits_do_not_fit_stay_as_they_are() -> None:
    model = vit()  # 4 classes
    changed: list[str] = []
    with attack_mode(model), quantized_linears(model, "int8"):
        changed += [name for name, m in model.named_modules() if "forward" in vars(m)]
        few = model.blocks[0].mlp.fc1(torch.ones(1, 32))
    assert len(changed) == 8
    assert "head" not in changed
    assert torch.equal(few, model.blocks[0].mlp.fc1(torch.ones(1, 32)))
    with pytest.raises(ValueError, match="multiples of 16: this model has none"):
        build_attack({**PGD, "precision": "int8"})(settled(), *images())


# ---- BatchNorm


class OddNet(nn.Module):
    """Convolutions of which only the first may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.shared_norm = nn.BatchNorm2d(4)
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.no_statistics = nn.Conv2d(4, 4, 1)
        self.batch_norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.first(x)).relu()
        x = self.shared_norm(self.twice(x))
        x = self.shared_norm(self.twice(x)).relu()
        raw = self.read_twice(x)
        x = self.norm(raw) + raw
        return self.batch_norm(self.no_statistics(x)).mean((2, 3))


def test_only_what_one_normalisation_alone_reads_is_folded() -> None:
    model = OddNet().eval()
    with attack_mode(model):
        pairs = conv_norm_pairs(model, model, torch.rand(1, 3, 8, 8))
    assert pairs == [(model.first, model.first_norm)]


@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("resnet50", 53)])
def test_every_convolution_of_a_resnet_is_folded(name: str, count: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    with attack_mode(model):
        assert len(conv_norm_pairs(model, model, torch.rand(1, 3, 32, 32))) == count


def activated() -> nn.Module:
    """An EfficientNet, whose normalisation and activation are one module of timm's."""
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", num_classes=4)
    with_statistics(model)
    return model


@pytest.mark.parametrize("build", [resnet, activated, OddNet])
def test_a_folded_network_computes_the_same(build: Any) -> None:
    model, (x, _) = build().double().eval(), images()
    x = x.double().requires_grad_()
    with attack_mode(model):
        outputs = model(x)
        (gradient,) = torch.autograd.grad(outputs.square().sum(), x)
        with folded_batch_norm(model, x):
            folded = model(x)
            (folded_gradient,) = torch.autograd.grad(folded.square().sum(), x)
    for found, expected in ((folded, outputs), (folded_gradient, gradient)):
        tolerance = 1e-11 * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=tolerance)
    after = model(x)
    assert torch.equal(after, outputs)


def test_an_attack_on_a_folded_network_finds_the_same_images() -> None:
    model, (x, y) = resnet(), images()
    model.train()
    plain = build_attack(PGD)(model, x, y, SampleGenerator(0, 0))
    folded = build_attack({**PGD, "fold_batch_norm": True})(model, x, y, SampleGenerator(0, 0))
    assert float((folded == plain).float().mean()) > 0.99
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


def test_weights_are_folded_anew_in_every_attack() -> None:
    model, (x, y) = resnet(), images()
    attack = build_attack({**PGD, "fold_batch_norm": True})
    attack(model, x, y, SampleGenerator(0, 0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    plain = build_attack(PGD)(model, x, y, SampleGenerator(0, 0))
    folded = attack(model, x, y, SampleGenerator(0, 0))
    assert float((folded == plain).float().mean()) > 0.99


def test_a_replaced_layer_is_folded_too() -> None:
    model, (x, y) = resnet(), images()
    attack = build_attack({**PGD, "fold_batch_norm": True})
    attack(model, x, y, SampleGenerator(0, 0))
    model.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    plain = build_attack(PGD)(model, x, y, SampleGenerator(0, 0))
    assert float((attack(model, x, y, SampleGenerator(0, 0)) == plain).float().mean()) > 0.99


def test_another_librarys_forward_stays_in_place() -> None:
    model, (x, y) = vit(), images()
    layer, calls = model.blocks[0].mlp.fc1, []

    def wrapped(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        return F.linear(inputs, layer.weight, layer.bias)

    layer.forward = wrapped
    build_attack({**PGD, "precision": "int8"})(model, x, y)
    assert calls == [6] * 5
    assert vars(layer)["forward"] is wrapped


def test_folding_in_training_mode_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"attack\.fold_batch_norm=true with .*Write dat\.attack\.model_mode='eval'",
    ):
        build_attack({**PGD, "fold_batch_norm": True, "model_mode": "train"})


def test_a_network_with_nothing_to_fold_is_refused() -> None:
    x, y = images()
    with pytest.raises(ValueError, match="no BatchNorm of this model follows"):
        build_attack({**PGD, "fold_batch_norm": True})(vit(), x, y)
    with pytest.raises(ValueError, match="needs a torch module"):
        build_attack({**PGD, "fold_batch_norm": True})(lambda x: x.mean((2, 3)), x, y)
