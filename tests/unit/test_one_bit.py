"""Claims about 1-bit Adam, 1-bit LAMB and 0/1 Adam that one process can check."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.compression.sign import WholeSign
from dat_ds.optim import (
    CompressedOptimizer,
    Lamb,
    OneBitAdam,
    OneBitLamb,
    VarianceStability,
    ZeroOneAdam,
)

pytestmark = pytest.mark.fast

STEPS, LR, DECAY, BETAS, EPS = 12, 0.02, 0.1, (0.8, 0.95), 1e-6
KINDS: dict[str, tuple[type[CompressedOptimizer], dict[str, Any]]] = {
    "one_bit_adam": (OneBitAdam, {"freeze_step": 4}),
    "one_bit_lamb": (OneBitLamb, {"freeze_step": 4, "adapt_vectors": True}),
    "zero_one_adam": (ZeroOneAdam, {"var_freeze_step": 4}),
}


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 1)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups with their own rate and decay."""
    return [
        {"params": params[::2], "weight_decay": DECAY},
        {"params": params[1:2], "weight_decay": 0.0, "lr": 3 * LR},
    ]


def gradients(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(p.shape, generator=generator) for p in params]


def train(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int, stop: int
) -> None:
    for step in range(first, stop):
        for p, gradient in zip(params, gradients(step, params), strict=True):
            p.grad = gradient
        optimizer.step()


def build(name: str, params: list[nn.Parameter], **options: Any) -> CompressedOptimizer:
    kind, defaults = KINDS[name]
    return kind(groups(params), lr=LR, betas=BETAS, eps=EPS, **{**defaults, **options})


# ---- before the freeze


@pytest.mark.parametrize(
    ("name", "options"),
    [("one_bit_adam", {"freeze_step": 100}), ("zero_one_adam", {"var_freeze_step": 100})],
)
def test_before_the_freeze_they_are_torchs_adamw(name: str, options: dict[str, Any]) -> None:
    mine, theirs = weights(), weights()
    train(build(name, mine, **options), mine, 0, STEPS)
    adamw = torch.optim.AdamW(groups(theirs), lr=LR, betas=BETAS, eps=EPS)
    train(adamw, theirs, 0, STEPS)
    for p, q in zip(mine, theirs, strict=True):
        assert_close(p, q, rtol=0, atol=1e-6)


def plain_lamb(params: list[nn.Parameter], steps: int, bounds: tuple[float, float]) -> list[float]:
    """LAMB as its paper writes it, with a clamped ratio; the ratios of the last step."""
    beta1, beta2 = BETAS
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    ratios: list[float] = []
    for step in range(steps):
        ratios = []
        for i, (p, g) in enumerate(zip(params, gradients(step, params), strict=True)):
            m, v = states[i]
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            corrected = m / (1 - beta1 ** (step + 1))
            u = corrected / ((v / (1 - beta2 ** (step + 1))).sqrt() + EPS)
            decay, rate = (0.0, 3 * LR) if i == 1 else (DECAY, LR)
            u = u + decay * p.detach()
            ratio = min(max(float(p.detach().norm() / u.norm()), bounds[0]), bounds[1])
            with torch.no_grad():
                p.sub_(rate * ratio * u)
            ratios.append(ratio)
    return ratios


@pytest.mark.parametrize("bounds", [(0.0, 1e6), (0.9, 1.1)])
def test_before_the_freeze_one_bit_lamb_is_lamb(bounds: tuple[float, float]) -> None:
    mine, theirs = weights(), weights()
    low, high = bounds
    optimizer = build("one_bit_lamb", mine, freeze_step=100, min_coeff=low, max_coeff=high)
    assert isinstance(optimizer, OneBitLamb)
    train(optimizer, mine, 0, STEPS)
    ratios = plain_lamb(theirs, STEPS, bounds)
    for p, q in zip(mine, theirs, strict=True):
        assert_close(p, q, rtol=0, atol=2e-6)
    # The optimizer's order is by group.
    expected = torch.tensor([ratios[0], ratios[2], ratios[1]])
    assert_close(optimizer.trust_ratios, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("adapt_vectors", [True, False])
def test_before_the_freeze_one_bit_lamb_is_our_lamb(adapt_vectors: bool) -> None:
    mine, theirs = weights(), weights()
    unbounded = {"freeze_step": 100, "min_coeff": 0.0, "max_coeff": 1e9}
    optimizer = build("one_bit_lamb", mine, adapt_vectors=adapt_vectors, **unbounded)
    train(optimizer, mine, 0, STEPS)
    matrices, vectors = groups(theirs)
    vectors["adapt"] = adapt_vectors
    train(Lamb([matrices, vectors], lr=LR, betas=BETAS, eps=EPS), theirs, 0, STEPS)
    for p, q in zip(mine, theirs, strict=True):
        assert_close(p, q, rtol=0, atol=2e-6)


# ---- after it, without a quantisation error (one rank sends nothing)


@pytest.mark.parametrize("name", ["one_bit_adam", "zero_one_adam"])
def test_after_the_freeze_they_are_preconditioned_momentum(name: str) -> None:
    mine, theirs = weights(), weights()
    train(build(name, mine), mine, 0, STEPS)
    adamw = torch.optim.AdamW(groups(theirs), lr=LR, betas=BETAS, eps=EPS)
    train(adamw, theirs, 0, 4)
    beta1, beta2 = BETAS
    for i, p in enumerate(theirs):
        state = adamw.state[p]
        denominator = (state["exp_avg_sq"] / (1 - beta2**4)).sqrt() + EPS
        momentum = state["exp_avg"]
        decay, rate = (0.0, 3 * LR) if i == 1 else (DECAY, LR)
        for step in range(4, STEPS):
            momentum = beta1 * momentum + (1 - beta1) * gradients(step, theirs)[i]
            u = momentum / (1 - beta1 ** (step + 1)) / denominator + decay * p.detach()
            with torch.no_grad():
                p.sub_(rate * u)
        assert_close(mine[i], p, rtol=0, atol=3e-6)


def test_after_the_freeze_one_bit_lamb_scales_by_the_frozen_ratio_times_its_factor() -> None:
    params = weights()
    optimizer = build("one_bit_lamb", params)
    assert isinstance(optimizer, OneBitLamb)
    averages, last = torch.zeros(3), torch.ones(3)
    for step in range(4):
        train(optimizer, params, step, step + 1)
        averages = 0.9 * averages + 0.1 * optimizer.trust_ratios
    for step in range(4, STEPS):
        train(optimizer, params, step, step + 1)
        factor = optimizer.trust_ratios / averages
        assert ((factor >= 0.5 - 1e-6) & (factor <= 4 + 1e-6)).all()
        change = (factor / last - 1).abs()
        assert (change <= 0.1 + 1e-5).all()
        last = factor
    assert float((last - 1).abs().max()) > 0.05, "the factors move"


def test_what_is_not_adapted_keeps_the_ratio_1_past_the_freeze() -> None:
    params = weights()
    optimizer = build("one_bit_lamb", params, adapt_vectors=False)
    assert isinstance(optimizer, OneBitLamb)
    for step in range(STEPS):
        train(optimizer, params, step, step + 1)
        assert optimizer.trust_ratios[2] == 1  # the vector's, in the order of the groups
        assert (optimizer.trust_ratios[:2] != 1).all()


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_0_1_adam_on_one_rank_replaces_momentum_by_its_mean_over_the_interval(
    interval: int,
) -> None:
    # Constant gradients, no decay, frozen at the fixed point: m = g, whatever the interval.
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    gradient = torch.tensor([0.5, -0.25])
    optimizer = ZeroOneAdam(
        [p],
        lr=LR,
        betas=(0.0, 0.0),
        eps=EPS,
        var_freeze_step=1,
        local_step_scaler=1,
        local_step_clipper=interval,
    )
    for step in range(1, 10):
        p.grad = gradient.clone()
        optimizer.step()
        expected = torch.tensor([1.0, -2.0]) - step * LR * gradient / (gradient.abs() + EPS)
        assert_close(p.detach(), expected, rtol=0, atol=1e-6)


# ---- what all share


@pytest.mark.parametrize("name", KINDS)
def test_a_coordinate_that_never_had_a_gradient_stays_where_it_is(name: str) -> None:
    params = weights()
    start = params[0].detach()[1, 2].clone()
    optimizer = build(name, params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(STEPS):
        for p, gradient in zip(params, gradients(step, params), strict=True):
            p.grad = gradient
        if step < 8:
            params[0].grad[1, 2] = 0.0  # type: ignore[index]
        optimizer.step()
    assert torch.equal(params[0].detach()[1, 2], start)
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [1, 7])
@pytest.mark.parametrize("name", KINDS)
def test_a_non_finite_gradient_costs_its_step_and_nothing_else(
    name: str, when: int, value: float
) -> None:
    params = weights()
    optimizer = build(name, params)
    for step in range(STEPS):
        before = [p.detach().clone() for p in params]
        for p, gradient in zip(params, gradients(step, params), strict=True):
            p.grad = gradient
        if step == when:
            params[1].grad[2] = value  # type: ignore[index]
        optimizer.step()
        unmoved = [torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        # (0/1 Adam's local steps go on along the momentum.)
        skips = step == when and not (name == "zero_one_adam" and optimizer.is_frozen)
        assert all(unmoved) if skips else not any(unmoved)
    assert optimizer.num_skipped == 1
    assert optimizer.num_steps == STEPS
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_gradient_counts_as_zero_and_paused_steps_not_at_all(name: str) -> None:
    one, other = weights(), weights()
    mine, theirs = build(name, one), build(name, other)
    with mine.paused():
        train(mine, one, 0, 3)
    for step in range(STEPS):
        for optimizer, params in ((mine, one), (theirs, other)):
            for p, gradient in zip(params, gradients(step, params), strict=True):
                p.grad = gradient
            params[2].grad = None if optimizer is mine else torch.zeros_like(params[2])
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("stop", [2, 4, 7])
@pytest.mark.parametrize("name", KINDS)
def test_state_makes_another_go_on_bit_for_bit(name: str, stop: int) -> None:
    params = weights()
    optimizer = build(name, params)
    train(optimizer, params, 0, stop)
    copies = weights()
    other = build(name, copies)
    train(other, copies, 0, STEPS)  # a roll-back loads into a used optimizer
    with torch.no_grad():
        torch._foreach_copy_(copies, params)
    other.load_state_dict(optimizer.state_dict())
    other.load_rank_state_dict(optimizer.rank_state_dict())
    assert other.is_frozen == optimizer.is_frozen == (stop >= 4)
    for each, own in ((optimizer, params), (other, copies)):
        train(each, own, stop, STEPS)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert other.events == optimizer.events
    assert other.num_steps == STEPS


def test_the_state_of_another_optimizer_or_other_parameters_is_refused() -> None:
    params = weights()
    optimizer = build("one_bit_adam", params)
    train(optimizer, params, 0, 1)
    with pytest.raises(ValueError, match="not a state of OneBitAdam"):
        optimizer.load_state_dict(torch.optim.AdamW(weights()).state_dict())
    other = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"of 23 parameters, not of 6"):
        build("one_bit_adam", other).load_state_dict(optimizer.state_dict())


def test_errors_of_other_ranks_start_from_zero_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = weights()
    optimizer = build("one_bit_adam", params)
    train(optimizer, params, 0, 6)
    with caplog.at_level(logging.WARNING, "dat_ds"):
        optimizer.load_rank_state_dict({"ranks": 2, "exchange": {"ranks": 2}})
    assert "Compression errors of 2 ranks do not fit 1" in caplog.text
    train(optimizer, params, 6, 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one_bit_adam", {"lr": -1}, r"lr=-1 must be a number of at least 0"),
        ("one_bit_adam", {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers in"),
        ("one_bit_adam", {"eps": 0.0}, r"eps=0.0 must be a number above 0"),
        ("one_bit_adam", {"freeze_step": 0}, r"freeze_step=0 must be at least 1, or None"),
        ("one_bit_adam", {"stability_threshold": 2}, r"stability_threshold=2 must lie in"),
        ("one_bit_lamb", {"min_coeff": 20}, r"min_coeff=20 must lie in \[0, max_coeff=10.0\]"),
        ("one_bit_lamb", {"factor_min": 5}, r"factor_min=5 must lie in \(0, factor_max=4.0\]"),
        ("one_bit_lamb", {"coeff_beta": 1}, r"coeff_beta=1 must lie in \[0, 1\)"),
        ("one_bit_lamb", {"factor_threshold": -1}, r"factor_threshold=-1 must be at least 0"),
        ("zero_one_adam", {"local_step_clipper": 0}, r"local_step_clipper=0 must be at least 1"),
        (
            "zero_one_adam",
            {"block_size": -1},
            r"block_size=-1 is not valid: write a number of at least 0",
        ),
        (
            "zero_one_adam",
            {"scale": "max"},
            r"scale='max' is not valid\. Write one of 'mean', 'rms'",
        ),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[name][0](weights(), **options)


# ---- the stability rule


def observe(rule: VarianceStability, norms: list[float], rate: float = 0.1) -> None:
    for norm in norms:
        rule.observe(torch.tensor(norm), rate)


@pytest.mark.parametrize("factor", [0.99, 1.0, 1.02])
def test_the_ratio_of_a_geometric_norm_is_its_factor_to_the_lag(factor: float) -> None:
    rule = VarianceStability(beta2=0.9, threshold=0.96)
    assert rule.lag == 10
    observe(rule, [factor**t for t in range(35)])
    expected = min(factor**10, factor**-10)
    assert rule.ratio() == pytest.approx(expected, rel=1e-5)


def test_before_the_lag_the_ratio_is_over_half_of_the_steps() -> None:
    rule = VarianceStability(beta2=0.99, threshold=0.96)
    assert rule.ratio() is None
    observe(rule, [1.0])
    assert rule.ratio() is None
    observe(rule, [0.5**t for t in range(1, 8)])
    assert rule.ratio() == pytest.approx(0.5**4)


def test_the_rule_looks_every_tenth_of_the_lag_and_not_while_the_rate_rises() -> None:
    rule = VarianceStability(beta2=0.95, threshold=0.96)  # a lag of 20
    looks = []
    for step in range(1, 61):
        observe(rule, [1.0], rate=min(step, 41))
        looks.append(rule.looks)
    assert [step for step, look in enumerate(looks, 1) if look] == list(range(42, 61, 2))
    constant = VarianceStability(beta2=0.95, threshold=0.96)
    observe(constant, [1.0] * 20)
    assert not constant.looks, "there is no norm yet that is as old as the lag"
    observe(constant, [1.0] * 2)
    assert constant.looks


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_norm_that_says_nothing_gives_no_ratio(bad: float) -> None:
    rule = VarianceStability(beta2=0.9, threshold=0.96)
    observe(rule, [1.0] * 20)
    observe(rule, [bad])
    assert rule.ratio() is None


def test_the_rule_freezes_a_stationary_variance_and_not_one_that_moves() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = OneBitAdam([p], lr=0.01, betas=(0.9, 0.95))
    scale, frozen_at = 1.0, None
    for step in range(1, 200):
        scale = max(0.3, scale * 0.9)  # falls until step 12
        p.grad = scale * torch.tensor([1.0, -1.0, 1.0, -1.0])
        optimizer.step()
        if optimizer.is_frozen and frozen_at is None:
            frozen_at = step
    # v is then c + d 0.95^t: within 4 % of itself 20 steps before once the second term is small.
    assert frozen_at is not None
    assert 40 < frozen_at < 120
    (event,) = optimizer.events
    assert event["step"] == frozen_at
    assert event["event"] == "variance_frozen"
    assert event["chosen_by"] == "rule"
    assert event["stability"] >= 0.96


def test_a_freeze_while_the_variance_moves_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = OneBitAdam([p], lr=0.01, freeze_step=20)
    with caplog.at_level(logging.INFO, "dat_ds"):
        for step in range(30):
            p.grad = torch.full((4,), 0.5**step)
            optimizer.step()
    assert "variance frozen after step 20 (by freeze_step" in caplog.text
    assert "freeze_step=20 may be too early" in caplog.text
    assert caplog.text.count("variance frozen") == 1


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        (OneBitAdam(weights(), freeze_step=7), 7),
        (OneBitLamb(weights(), betas=(0.9, 0.99)), 101),
        (ZeroOneAdam(weights(), var_freeze_step=5), 5),
    ],
    ids=["given", "rule", "0/1"],
)
def test_a_run_that_ends_before_the_freeze_is_warned_of(
    optimizer: CompressedOptimizer, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    from dat_ds.engine.build import _warn_of_late_freeze

    assert optimizer.earliest_freeze == step
    _warn_of_late_freeze(optimizer, total_steps=step + 1)
    assert not caplog.text
    _warn_of_late_freeze(optimizer, total_steps=step)
    assert f"frozen after step {step} at the earliest, and the run has {step}" in caplog.text


# ---- one scale for all


@pytest.mark.parametrize("numel", [12, 10])
@pytest.mark.parametrize("scale", ["mean", "rms"])
def test_one_scale_is_of_all_rows_without_their_padding(scale: str, numel: int) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.pad(tensor, (0, 12 - numel)).view(3, 4)
    codec = WholeSign(scale=scale)  # type: ignore[arg-type]
    valid = codec.valid_counts(torch.arange(12).view(3, 4) < numel)
    decoded = codec.decode_rows(codec.encode_rows(rows, valid=valid), 4)
    magnitude = tensor.abs().mean() if scale == "mean" else tensor.norm() / math.sqrt(numel)
    assert_close(decoded.flatten()[:numel], magnitude * tensor.sign(), rtol=1e-6, atol=0)
