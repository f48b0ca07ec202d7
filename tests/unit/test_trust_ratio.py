"""Claims about LAMB and LARS on one process: closed forms, other implementations, faults."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.optim import OPTIMIZERS, PADDING, Lamb, Lars, LayerwiseOptimizer, Layout, Segments

pytestmark = pytest.mark.fast

SHAPES = [(8, 3, 3, 3), (8,), (5, 7), (1,), (64, 33)]
KINDS = {"lamb": Lamb, "lars": Lars}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    scales = [1.0, 20.0, 1e-3, 1.0, 0.1]
    pairs = zip(scales, SHAPES, strict=True)
    return [nn.Parameter(scale * torch.randn(shape, generator=generator)) for scale, shape in pairs]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [10.0**i / 100 * torch.randn(s, generator=generator) for i, s in enumerate(SHAPES)]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()


def paper(name: str) -> dict[str, object]:
    """Keyword arguments of the preset; what is left out concerns parameter groups."""
    return {k: v for k, v in OPTIMIZERS[name].presets["paper"].items() if k != "adapt_vectors"}


def assert_same_updates(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert ((a - b).norm() / (b - start).norm()).item() <= 2e-6


# ---- other implementations


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_lamb_equals_timms(weight_decay: float, bias_correction: bool) -> None:
    # timm clips gradients by default, and adapts undecayed groups only if told to.
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": weight_decay, "bias_correction": bias_correction}
    reference = timm.optim.Lamb(theirs, max_grad_norm=None, always_adapt=True, **options)
    train(Lamb(ours, **options), ours, 20)
    train(reference, theirs, 20)
    assert_same_updates(ours, theirs)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_lars_equals_timms(momentum: float, nesterov: bool) -> None:
    ours, theirs = parameters(), parameters()
    options = {"lr": 2.0, "weight_decay": 1e-3, "momentum": momentum, "nesterov": nesterov}
    train(Lars(ours, **options), ours, 20)
    train(timm.optim.Lars(theirs, **options), theirs, 20)
    assert_same_updates(ours, theirs)


def test_without_trust_ratios_lamb_is_adam_and_lars_is_sgd() -> None:
    for ours, theirs in [
        (
            lambda p: Lamb([{"params": p, "adapt": False}], lr=0.1, weight_decay=0.0, eps=1e-8),
            lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-8),
        ),
        (
            lambda p: Lars([{"params": p, "adapt": False}], lr=0.1, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9),
        ),
    ]:
        first, second = parameters(), parameters()
        train(ours(first), first, 10)
        train(theirs(second), second, 10)
        assert_same_updates(first, second)


# ---- closed forms


def test_the_first_step_of_lamb_is_the_sign_of_the_gradient_at_the_weights_length() -> None:
    w = nn.Parameter(torch.tensor([3.0, 0.0, 0.0, 4.0]))  # of length 5
    w.grad = torch.tensor([2.0, -1e-2, 5.0, -7.0])
    Lamb([w], lr=0.1, weight_decay=0.0, eps=0.0).step()
    # u = m / sqrt(v) after bias correction: four entries of one, of length 2.
    assert_close(w.detach(), torch.tensor([3.0, 0.0, 0.0, 4.0]) - 0.25 * w.grad.sign())


def test_weight_decay_is_part_of_lambs_direction() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.tensor([1.0, 1.0])
    optimizer = Lamb([w], lr=0.1, weight_decay=0.5, eps=0.0)
    optimizer.step()
    u = torch.tensor([1.0, 1.0]) + 0.5 * torch.tensor([3.0, 4.0])
    assert optimizer.trust_ratios["0"] == pytest.approx(5 / u.norm().item(), rel=1e-6)
    assert_close(w.detach(), torch.tensor([3.0, 4.0]) - 0.1 * 5 * u / u.norm())


def test_lars_of_two_steps_by_hand() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lars([w], lr=2.0, weight_decay=0.1, momentum=0.5, trust_coefficient=0.2, eps=0.0)
    expected, b = torch.tensor([3.0, 4.0]), torch.zeros(2)
    for g in (torch.tensor([0.6, -0.8]), torch.tensor([6.0, 8.0])):
        w.grad = g
        optimizer.step()
        ratio = 0.2 * expected.norm() / (g.norm() + 0.1 * expected.norm())
        b = 0.5 * b + ratio * (g + 0.1 * expected)
        expected = expected - 2 * b
    assert_close(w.detach(), expected)


@pytest.mark.parametrize("name", KINDS)
def test_by_the_papers_rule_every_layer_moves_by_the_rate_times_its_bounded_norm(name: str) -> None:
    params = parameters()
    optimizer = KINDS[name](params, **{**paper(name), "lr": 0.03, "lower": 0.5})
    for step in range(5):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        for p, start in zip(params, before, strict=True):
            tau = min(max(start.norm().item(), 0.5), 10.0)
            assert (p - start).norm().item() == pytest.approx(0.03 * tau, rel=1e-4)
    lengths = [start.norm().item() for start in before]
    assert min(lengths) < 0.5
    assert max(lengths) > 10


@pytest.mark.parametrize("name", KINDS)
def test_the_length_of_the_gradient_does_not_matter_to_the_papers_rule(name: str) -> None:
    ends = []
    for scale in (1.0, 1000.0):
        params = parameters()
        optimizer = KINDS[name](params, **{**paper(name), "weight_decay": 0.0, "eps": 1e-20})
        for step in range(3):
            for p, g in zip(params, gradients(step), strict=True):
                p.grad = scale * g
            optimizer.step()
        ends.append(params)
    assert_same_updates(*ends)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("preset", ["modern", "paper"])
def test_where_a_norm_is_zero_the_ratio_is_one(name: str, preset: str) -> None:
    options = paper(name) if preset == "paper" else {}
    zero, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    empty = nn.Parameter(torch.zeros(0))
    optimizer = KINDS[name]([zero, still, empty], **{**options, "weight_decay": 0.0})
    zero.grad, still.grad, empty.grad = torch.ones(3), torch.zeros(3), torch.zeros(0)
    optimizer.step()
    assert set(optimizer.trust_ratios.values()) == {1.0}
    assert bool((zero < 0).all()), "a layer of zeros can leave them"
    assert torch.equal(still.detach(), torch.ones(3))


def test_a_lower_bound_moves_a_layer_of_zeros_by_it() -> None:
    w = nn.Parameter(torch.zeros(4))
    w.grad = torch.ones(4)
    Lamb([w], lr=0.1, weight_decay=0.0, eps=0.0, lower=3.0).step()
    assert_close(w.detach(), torch.full((4,), -0.1 * 3 / 2))


def test_norms_of_large_layers_are_exact() -> None:
    w = nn.Parameter(torch.rand(3_000_000, generator=torch.Generator().manual_seed(0)) + 0.5)
    w.grad = torch.ones_like(w)
    optimizer = Lamb([w], weight_decay=0.0, eps=0.0)
    expected = w.detach().double().norm().item() / math.sqrt(w.numel())
    assert abs(w.detach().norm().item() / math.sqrt(w.numel()) / expected - 1) > 1e-6
    optimizer.step()
    assert optimizer.trust_ratios["0"] == pytest.approx(expected, rel=2e-7)


# ---- an ordinary torch optimizer


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_without_gradient_is_left_alone_and_has_its_own_step_counter(name: str) -> None:
    both, alone = parameters(), parameters()
    optimizer = KINDS[name](both)
    for step in range(4):
        for i, (p, g) in enumerate(zip(both, gradients(step), strict=True)):
            p.grad = g if i != 2 or step >= 2 else None
        optimizer.step()
        if step == 1:
            assert torch.equal(both[2], alone[2])
    late = KINDS[name]([alone[2]])
    for step in (2, 3):
        alone[2].grad = gradients(step)[2]
        late.step()
    assert torch.equal(both[2], alone[2])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str, way: str) -> None:
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:], "adapt": False, "lr": 0.3}]
    optimizer = KINDS[name](groups, **paper(name))
    train(optimizer, params, 3)
    if way == "state_dict":
        twins = copy.deepcopy(params)
        groups = [{"params": twins[:3]}, {"params": twins[3:]}]
        twin = KINDS[name](groups, **paper(name))
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        copies = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}
        twins, twin = copies[way]((params, optimizer))
    train(optimizer, params, 3)
    train(twin, twins, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_closure_and_a_scheduler_work_as_with_torchs() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = Lamb([w], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert_close(w.detach(), torch.full((3,), 0.9))
    scheduler.step()


def test_a_group_that_is_added_later_is_one_more_layer() -> None:
    first, second = parameters()[:2]
    optimizer = Lamb([first])
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert set(optimizer.trust_ratios) == {"0", "1"}
    assert 1.0 not in optimizer.trust_ratios.values()


def test_other_tensors_in_the_groups_are_refused_not_taken_for_layers() -> None:
    optimizer = Lamb(parameters())
    flat = torch.zeros(10, requires_grad=True)
    flat.grad = torch.ones(10)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"Lamb was given other tensors .*dat_ds\.initialize"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Lamb, {"lr": -1.0}, "lr=-1.0 must be a finite number of at least 0"),
        (Lamb, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must lie in \[0, 1\)"),
        (Lamb, {"lower": 2.0, "upper": 1.0}, "upper=1.0 must be above 0 and at least lower=2.0"),
        (Lars, {"upper": 0.0}, "upper=0.0 must be above 0 and at least lower=0.0"),
        (Lars, {"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        (Lars, {"momentum": 0.0, "nesterov": True}, "nesterov=True needs a momentum above 0"),
        (Lars, {"scaled": "weights"}, "scaled='weights' is not one of gradient, momentum"),
    ],
)
def test_options_out_of_range_are_refused(
    kind: type[LayerwiseOptimizer], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **options)  # type: ignore[arg-type, call-arg]


# ---- layers in pieces of flat tensors


def flattened(params: list[nn.Parameter]) -> tuple[list[Tensor], Layout]:
    """Two flat tensors: whole layers out of order, with padding of garbage in between."""
    rubbish = torch.full((3,), math.nan)
    flats = [
        torch.cat([params[2].detach().flatten(), rubbish, params[0].detach().flatten()]),
        torch.cat([p.detach().flatten() for p in (params[1], params[4], params[3])] + [rubbish]),
    ]
    sizes = [[35, 3, 216], [8, 64 * 33, 1, 3]]
    layers = [[2, PADDING, 0], [1, 4, 3, PADDING]]
    segments = {
        flat.requires_grad_(): Segments(tuple(size), tuple(layer))
        for flat, size, layer in zip(flats, sizes, layers, strict=True)
    }
    return flats, Layout(tuple("abcde"), segments, deferred=True)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("preset", ["modern", "paper"])
def test_layers_in_flat_tensors_move_as_whole_ones(name: str, preset: str) -> None:
    options = paper(name) if preset == "paper" else {}
    params, whole = parameters(), parameters()
    reference = KINDS[name](whole, **options)
    optimizer = KINDS[name](params, **options)
    optimizer.await_layout()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], parameters()[0]), "nothing moves before the layout is known"
    assert not optimizer.state
    flats, layout = flattened(params)
    optimizer.attach(layout)
    for step in range(4):
        g = [gradient.flatten() for gradient in gradients(step)]
        rubbish = torch.full((3,), math.nan)
        flats[0].grad = torch.cat([g[2], rubbish, g[0]])
        flats[1].grad = torch.cat([g[1], g[4], g[3], rubbish])
        before = [flat.detach().clone() for flat in flats]
        for flat in flats:  # as ZeRO does: one after another, in the same group
            optimizer.param_groups[0]["params"] = [flat]
            optimizer.step()
        assert all(f[:3].equal(b[:3]) for f, b in zip(flats, before, strict=True))
        optimizer.apply()
        for p, gradient in zip(whole, gradients(step), strict=True):
            p.grad = gradient
        reference.step()
        expected = list(reference.trust_ratios.values())
        assert list(optimizer.trust_ratios.values()) == pytest.approx(expected, rel=1e-6)
    assert list(optimizer.trust_ratios) == list("abcde")
    found = [flats[0][38:], flats[1][:8], flats[0][:35], flats[1][-4:-3], flats[1][8:-4]]
    for piece, p in zip(found, whole, strict=True):
        assert_close(piece.view_as(p), p.detach(), rtol=1e-6, atol=1e-8)
