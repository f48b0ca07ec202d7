"""Claims about Muon on one process: closed forms, other implementations, what it takes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.models import PixelModel
from dat_ds.optim import PADDING, Layout, Segments, build_optimizer
from dat_ds.optim.muon import Muon, muon_groups, orthogonalized

SHAPES = [(8, 12), (16, 16), (24, 6)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = 10.0**-i * randn(*p.shape, seed=100 * step + i + 1)
        optimizer.step()


# ---- Newton and Schulz


def quintic(s: Tensor) -> Tensor:
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def test_the_iteration_acts_on_singular_values_alone_as_the_quintic_does() -> None:
    # A polynomial of odd powers: U q(S) V^T, with the same vectors.
    for i, shape in enumerate([(8, 8), (5, 12), (12, 5), (2, 6, 4)]):
        matrix = randn(*shape, seed=i).double()
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.square().sum(-1, keepdim=True).sqrt()
        expected = u @ torch.diag_embed(quintic(s)) @ vh
        assert_close(orthogonalized(matrix), expected, rtol=1e-9, atol=1e-9)
        assert_close(orthogonalized(matrix.float()).double(), expected, rtol=0, atol=2e-4)


def test_singular_values_of_the_result_lie_between_0_68_and_1_21() -> None:
    s = torch.logspace(math.log10(0.002), 0, 100_001, dtype=torch.float64)
    assert 0.68 < quintic(s).min() < quintic(s).max() < 1.21
    for i, (rows, columns) in enumerate([(32, 32), (16, 64), (96, 24)]):
        rank = min(rows, columns)
        u, v = (torch.linalg.qr(randn(n, rank, seed=i)).Q for n in (rows, columns))
        found = orthogonalized(u @ torch.diag(torch.logspace(-2, 0, rank)) @ v.mT)
        values = (u.mT @ found @ v).diagonal()
        assert 0.68 < values.min() < values.max() < 1.21
        # So it differs from U V^T by at most 0.32 in the spectral norm.
        assert torch.linalg.matrix_norm(found - u @ v.mT, 2) < 0.32


def test_the_result_does_not_depend_on_scale_and_zeros_stay_zeros() -> None:
    matrix = randn(6, 9)
    for factor in (1e-6, 1e6):
        assert_close(orthogonalized(factor * matrix), orthogonalized(matrix), rtol=0, atol=1e-4)
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert_close(orthogonalized(matrix.mT), orthogonalized(matrix).mT, rtol=0, atol=1e-5)


def test_momentum_that_has_died_away_takes_no_part() -> None:
    # Products of subnormal numbers are a hundred times slower on a CPU.
    matrix = randn(20, 30)
    matrix[:, ::2] = 1e-39
    alive = matrix.clone()
    alive[:, ::2] = 0
    assert torch.equal(orthogonalized(matrix), orthogonalized(alive))


def test_blocks_are_orthogonalized_one_by_one_and_never_in_16_bits() -> None:
    blocks = torch.stack([randn(4, 6, seed=i) for i in range(3)])
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonalized(blocks)
    assert_close(found, torch.stack([orthogonalized(b) for b in blocks]), rtol=0, atol=1e-6)
    assert orthogonalized(blocks.bfloat16()).dtype == torch.float32


# ---- a step


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 2, 3, 3)])
def test_two_steps_are_the_formula(shape: tuple[int, ...], nesterov: bool) -> None:
    w = nn.Parameter(randn(*shape))
    expected, b = w.detach().flatten(1).clone(), torch.zeros(shape).flatten(1)
    optimizer = Muon([w], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    for step in range(2):
        w.grad = randn(*shape, seed=step + 1)
        g = w.grad.flatten(1)
        optimizer.step()
        b = 0.9 * b + 0.1 * g
        u = 0.1 * g + 0.9 * b if nesterov else b
        scale = 0.2 * math.sqrt(max(expected.shape))
        expected = expected - 0.02 * (0.1 * expected + scale * orthogonalized(u))
        assert_close(w.detach().flatten(1), expected, rtol=1e-5, atol=1e-6)
        assert_close(optimizer.state[w]["momentum_buffer"].flatten(1), b)


def test_a_grouped_convolution_is_one_matrix_per_group() -> None:
    conv = nn.Conv2d(8, 12, 3, groups=4)
    conv.weight.grad = randn(12, 2, 3, 3)
    start = conv.weight.detach().clone()
    group = {"params": [conv.weight], "blocks": 4}
    Muon([group], lr=1.0, weight_decay=0.0).step()
    parts = conv.weight.grad.flatten(1).split(3)
    moved = torch.cat([0.2 * math.sqrt(18) * orthogonalized(part) for part in parts])
    assert_close((start - conv.weight.detach()).flatten(1), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (32, 256), (128, 16)])
def test_the_root_mean_square_of_an_update_is_about_a_fifth_of_the_rate(
    shape: tuple[int, int],
) -> None:
    w = nn.Parameter(torch.zeros(shape))
    w.grad = randn(*shape)
    Muon([w], lr=1.0).step()
    assert w.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_to_what_bfloat16_leaves_of_it(
    monkeypatch: pytest.MonkeyPatch, nesterov: bool
) -> None:
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "nesterov": nesterov}
    scale = {"adjust_lr_fn": "match_rms_adamw"}
    ours, theirs, exact = parameters(), parameters(), parameters()
    train(Muon(ours, **options), ours, 10)
    train(torch.optim.Muon(theirs, **options, **scale), theirs, 10)
    # Theirs casts to bfloat16 first of all; without that it is ours to rounding.
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    train(torch.optim.Muon(exact, **options, **scale), exact, 10)
    for a, b, c, start in zip(ours, theirs, exact, parameters(), strict=True):
        moved = (c - start).norm()
        assert (a - c).norm() / moved < 1e-5
        assert (a - b).norm() / moved < 0.05


def test_the_rest_is_torchs_adamw_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-7}
    train(Muon([{"params": ours, "muon": False}], **options), ours, 10)
    train(torch.optim.AdamW(theirs, **options), theirs, 10)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adamws_rate_is_a_ratio_of_muons_and_a_schedule_scales_both() -> None:
    matrix, vector, own = (nn.Parameter(randn(*shape)) for shape in [(4, 4), (4,), (4,)])
    groups = [
        {"params": [matrix]},
        {"params": [vector], "muon": False},
        {"params": [own], "muon": False, "lr": 7.0},
    ]
    optimizer = Muon(groups, lr=0.1, adam_lr_ratio=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05, 7.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    assert schedule.get_last_lr() == pytest.approx([0.01, 0.005, 0.7])


def test_copies_and_loaded_states_go_on_as_the_original() -> None:
    model = small_network()
    optimizer = Muon(muon_groups(model, 0.1))
    train(optimizer, list(model.parameters()), 3)
    loaded_model = copy.deepcopy(model)
    loaded = Muon(muon_groups(loaded_model, 0.1))
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    copied_model, copied = copy.deepcopy((model, optimizer))
    for net, its in ((model, optimizer), (loaded_model, loaded), (copied_model, copied)):
        train(its, list(net.parameters()), 2)
    for a, b, c in zip(*(m.parameters() for m in (model, loaded_model, copied_model)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_channels_last_weights_move_as_contiguous_ones() -> None:
    plain = nn.Conv2d(6, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for conv in (plain, last):
        conv.weight.grad = torch.empty_like(conv.weight).copy_(randn(8, 6, 3, 3))
        Muon([conv.weight], lr=0.1).step()
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.weight, last.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be a finite number of at least 0"),
        ({"adam_lr_ratio": math.inf}, "adam_lr_ratio=inf must be a finite number"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must lie in \[0, 1\)"),
        ({"ns_steps": 0}, "ns_steps=0 must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(parameters(), **options)


def test_a_vector_among_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(5,\) is not a matrix .* put it into a group "):
        Muon([nn.Parameter(torch.zeros(5))])


# ---- layers in pieces of flat tensors


def test_matrices_in_flat_tensors_move_as_whole_ones() -> None:
    params, whole = parameters(), parameters()
    reference, optimizer = Muon(whole), Muon(params)
    optimizer.await_layout()
    train(optimizer, params, 1)
    assert not optimizer.state, "nothing moves before the layout is known"
    rubbish = torch.full((3,), math.nan)
    flats = [
        torch.cat([params[2].detach().flatten(), rubbish, params[0].detach().flatten()]),
        torch.cat([params[1].detach().flatten(), rubbish]),
    ]
    segments = [Segments((144, 3, 96), (2, PADDING, 0)), Segments((256, 3), (1, PADDING))]
    layout = Layout(
        tuple("abc"),
        {flat.requires_grad_(): own for flat, own in zip(flats, segments, strict=True)},
        deferred=True,
        shapes=tuple(map(torch.Size, SHAPES)),
    )
    optimizer.attach(layout)
    for step in range(4):
        train(reference, whole, 1)
        g = [p.grad.flatten() for p in whole]
        for flat, gradient in zip(flats, [[g[2], rubbish, g[0]], [g[1], rubbish]], strict=True):
            flat.grad = torch.cat(gradient)
            optimizer.param_groups[0]["params"] = [flat]  # as ZeRO does: one after another
            optimizer.step()
        optimizer.apply()
        found = [flats[0][147:], flats[1][:256], flats[0][:144]]
        for piece, p in zip(found, whole, strict=True):
            assert_close(piece.view_as(p), p, rtol=1e-6, atol=1e-7), step


def test_without_a_layout_flat_tensors_are_refused() -> None:
    params = parameters()
    optimizer = Muon(params)
    flat = torch.cat([p.detach().flatten() for p in params]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="Muon was given other tensors than its own"):
        optimizer.step()


# ---- which parameters are hidden matrices


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Linear(6, 1),
        nn.Linear(1, 4),
    )


def roles(model: nn.Module, **patterns: list[str]) -> tuple[set[str], set[str]]:
    """Names of the parameters that Muon takes, and of the others with two dimensions or more."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_groups(model, 0.1, **patterns)
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(names), "each parameter is in one group"
    for group in groups:
        if not group["muon"]:
            assert len({p.ndim > 1 for p in group["params"]}) == 1
            assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)
    found: tuple[set[str], set[str]] = (set(), set())
    for group in groups:
        own = {names[id(p)] for p in group["params"] if p.ndim > 1}
        found[0 if group["muon"] else 1].update(own)
    return found


def timm_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config)


SMALL_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
BLOCK = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
HF = "vit.embeddings."
EXPECTED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "vit": (
        lambda: timm_model("vit_tiny_patch16_224", **SMALL_VIT),
        {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"},
    ),
    "deit with distillation": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", **SMALL_VIT),
        {"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight"}
        | {"head.weight", "head_dist.weight"},
    ),
    "swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(2, 2),
        ),
        {"patch_embed.proj.weight", "head.fc.weight"}
        | {f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(2)},
    ),
    "convnext": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        {"stem.0.weight", "head.fc.weight"}
        | {f"stages.{i}.blocks.0.conv_dw.weight" for i in range(4)},
    ),
    "resnet18": (lambda: timm_model("resnet18"), {"conv1.weight", "fc.weight"}),
    "resnext": (lambda: timm_model("resnext50_32x4d"), {"conv1.weight", "fc.weight"}),
    "features only": (
        lambda: timm_model("vit_tiny_patch16_224", **SMALL_VIT, num_classes=0),
        {"cls_token", "pos_embed", "patch_embed.proj.weight"},
    ),
    "hf vit": (
        hf_vit,
        {f"{HF}cls_token", f"{HF}position_embeddings", "classifier.weight"}
        | {f"{HF}patch_embeddings.projection.weight"},
    ),
    "by hand": (
        small_network,
        # What reads pixels, depthwise, one output, and the last.
        {"0.weight", "1.weight", "6.weight", "7.weight"},
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 4)),
        {"0.weight", "2.weight"},
    ),
    "a head on features": (
        lambda: nn.Sequential(
            timm_model("vit_tiny_patch16_224", **SMALL_VIT, num_classes=0), nn.Linear(16, 4)
        ),
        {"0.cls_token", "0.pos_embed", "0.patch_embed.proj.weight", "1.weight"},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_matrix_is_muons_but_for_inputs_outputs_and_what_is_none(name: str) -> None:
    build, expected = EXPECTED[name]
    model = build()
    matrices, rest = roles(model)
    assert rest == expected
    assert matrices == {n for n, p in model.named_parameters() if p.ndim > 1} - expected
    assert matrices


def test_a_vits_matrices_are_those_of_its_blocks() -> None:
    matrices, _ = roles(EXPECTED["vit"][0]())
    assert matrices == {f"blocks.{i}.{name}" for i in range(2) for name in BLOCK}


@pytest.mark.parametrize("name", ["vit", "resnet18", "hf vit"])
def test_a_wrapper_changes_nothing(name: str) -> None:
    build, expected = EXPECTED[name]
    wrapped = PixelModel(build(), num_classes=4, mean=[0.5] * 3, std=[0.5] * 3)
    assert roles(wrapped)[1] == {f"body.{other}" for other in expected}


def test_grouped_convolutions_have_as_many_blocks_as_groups() -> None:
    groups = muon_groups(small_network(), 0.1)
    assert [(g["muon"], g.get("blocks")) for g in groups] == [
        (True, 1),
        (True, 2),
        (False, None),
        (False, None),
    ]
    assert [tuple(p.shape) for p in groups[1]["params"]] == [(8, 4, 3, 3)]


def test_names_override_the_rules() -> None:
    model = EXPECTED["vit"][0]()
    patterns = {"muon_parameters": ["patch_embed.*"], "adam_parameters": ["blocks.0.*", "*.bias"]}
    with pytest.raises(ValueError, match=r"shape \(16,\) is not a matrix"):
        Muon(muon_groups(model, 0.1, muon_parameters=["patch_embed.*"]))
    matrices, rest = roles(model, **patterns)
    assert matrices == {"patch_embed.proj.weight", *(f"blocks.1.{name}" for name in BLOCK)}
    assert "blocks.0.attn.qkv.weight" in rest
    with pytest.raises(ValueError, match="adam_parameters: the model has no parameter 'qkv'"):
        muon_groups(model, 0.1, adam_parameters=["qkv"])


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = small_network()
    for layer in (0, 2, 3, 5, 6, 7):
        model[layer].requires_grad_(False)
    (only, bias) = muon_groups(model, 0.1)
    assert only["params"] == [model[1].weight]
    assert bias["params"] == [model[1].bias]


def test_the_config_builds_it() -> None:
    model = small_network()
    optimizer = build_optimizer(
        model,
        {"name": "muon", "lr": 0.1, "adam_lr_ratio": 0.5, "adam_parameters": ["5.weight"]},
    )
    assert isinstance(optimizer, Muon)
    grouped, decayed, plain = optimizer.param_groups
    assert (grouped["lr"], decayed["lr"], plain["lr"]) == (0.1, 0.05, 0.05)
    assert (grouped["weight_decay"], decayed["weight_decay"], plain["weight_decay"]) == (
        0.1,
        0.1,
        0,
    )
    assert model[5].weight in set(decayed["params"])
    assert grouped["betas"] == (0.9, 0.95)


def test_it_trains_a_network() -> None:
    model = timm_model("vit_tiny_patch16_224", **SMALL_VIT, num_classes=4)
    x, y = randn(16, 3, 8, 8), torch.arange(16) % 4
    optimizer = build_optimizer(model, {"name": "muon", "lr": 0.01})
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
