"""Claims about ``InputGradient``: the textbook gradient, of ordinary size at any confidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dat_ds.attacks import InputGradient, SampleGenerator, ThreatModel, cross_entropy
from dat_ds.attacks.gradient import has_reentrant_checkpoint, logit_gradient
from tests.unit.attack_helpers import (
    attack_named,
    batch,
    every_mode,
    linear,
    mid_range,
    worst_direction,
)

pytestmark = pytest.mark.fast


def small_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return net.to(dtype).requires_grad_(False)


def mean_loss_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, double: bool
) -> Any:
    """What a textbook attack uses: the gradient of the batch mean of the cross-entropy."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    return torch.autograd.grad(F.cross_entropy(logits.double() if double else logits, y), leaf)[0]


def test_the_gradient_is_the_textbook_one_times_a_power_of_two_per_sample():
    # The batch of 4 divides the mean exactly; logits enter the loss in float64 in both.
    model, (x, y) = small_net(), batch(4)
    plain = mean_loss_gradient(model, x, y, double=True)
    ours = InputGradient()(model, x, y, cross_entropy)
    assert torch.equal(ours.sign(), plain.sign())
    ratio = (ours.double() / plain.double()).flatten(1)
    assert torch.equal(ratio, ratio[:, :1].expand_as(ratio))
    mantissa, _ = torch.frexp(ratio[:, 0])
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))


def test_the_direction_agrees_with_a_float32_mean_loss_to_float32_rounding():
    model, (x, y) = small_net(), batch(4)
    threat = ThreatModel("l2", 1)
    plain = threat.steepest(mean_loss_gradient(model, x, y, double=False))
    ours = threat.steepest(InputGradient()(model, x, y, cross_entropy))
    assert_close(ours, plain, rtol=0, atol=2e-6)  # softmax in float32: a few 2^-24 relative


def test_the_largest_entry_of_each_logit_gradient_lies_between_32_and_64():
    logits = torch.tensor([[0.0, 1.0], [30.0, 0.0], [0.0, 90.0], [-600.0, 0.0]])
    gradient, values = logit_gradient(logits, torch.tensor([0, 0, 1, 1]), cross_entropy)
    largest = gradient.abs().amax(1)
    assert gradient.dtype == values.dtype == torch.float64
    assert (largest >= 32).all()
    assert (largest < 64).all()


def test_a_flat_loss_has_a_zero_gradient():
    gradient, _ = logit_gradient(
        torch.zeros(2, 3), torch.tensor([0, 1]), lambda logits, y: 0 * logits.sum(1)
    )
    assert not gradient.any()


def saturated(margin: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model and one image with logits ``(margin, 0)`` and label 0."""
    model, (x, y) = linear(2, torch.float32), batch(1)
    with torch.no_grad():
        model[1].bias.add_(torch.tensor([margin, 0.0]) - model(x)[0])
    return model.requires_grad_(False), x, y


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def test_with_1_minus_p_of_1e_12_the_direction_survives_where_a_float32_loss_loses_it():
    model, x, y = saturated(-math.log(1e-12))
    ours = InputGradient()(model, x, y, cross_entropy)
    assert cosine(ours, worst_direction(model, y)) > 1 - 1e-12
    # In float32 p is 1 and the true class drops out of the direction.
    plain = mean_loss_gradient(model, x, y, double=False)
    assert cosine(plain, worst_direction(model, y)) < 0.9


@pytest.mark.parametrize("margin", [60.0, 100.0, 150.0, 600.0])
def test_a_sample_of_any_confidence_keeps_a_gradient_of_ordinary_size(margin):
    model, x, y = saturated(margin)
    ours = InputGradient()(model, x, y, cross_entropy)
    assert ours.isfinite().all()
    assert cosine(ours, worst_direction(model, y)) > 1 - 1e-12
    assert 32 <= (ours / worst_direction(model, y)).mean() < 64
    if margin > 110:
        assert not mean_loss_gradient(model, x, y, double=False).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_body_gets_a_float32_gradient_even_where_it_is_confident(dtype):
    body = linear(2, torch.float32).requires_grad_(False)
    half = linear(2, torch.float32).to(dtype).requires_grad_(False)
    with torch.no_grad():
        half[1].bias.copy_(torch.tensor([20.0, 0.0]))
    x, y = mid_range(torch.float32)
    y = torch.zeros_like(y)
    model = lambda t: half(t.to(dtype))  # noqa: E731
    gradient = InputGradient()(model, x, y, cross_entropy)
    assert gradient.dtype == torch.float32
    expected = worst_direction(body, y)
    angles = F.cosine_similarity(gradient.flatten(1), expected.flatten(1))
    assert (angles > 1 - 1e-4).all()  # weights rounded to 8 bits: angle below 2^-8
    if dtype is torch.float16:  # p = 2e-9 over a batch of 6 is below float16's smallest number
        assert not mean_loss_gradient(model, x, y, double=True).any()


class Overflowing(nn.Module):
    """Its input gradient is infinite for sample 0 unless the cotangent is below ``limit``."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.num_forwards, self.largest = limit, 0, []
        self.body = small_net()

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        logits = self.body(x)
        if logits.requires_grad:
            logits.register_hook(self._overflow)
        return logits

    def _overflow(self, gradient: Tensor) -> Tensor:
        self.largest.append(gradient[0].abs().max().item())
        gradient = gradient.clone()
        if self.largest[-1] >= self.limit:
            gradient[0, 0] = math.inf
        return gradient


def test_a_non_finite_gradient_is_set_to_zero_and_counted_without_a_retry():
    model, (x, y), take = Overflowing(1.0), batch(4), InputGradient()
    expected = InputGradient()(model.body, x, y, cross_entropy)
    for calls in (1, 2):
        gradient = take(model, x, y, cross_entropy)
        assert not gradient[0].any()
        assert torch.equal(gradient[1:], expected[1:])
        assert take.num_non_finite == calls
        assert take.num_samples == 4 * calls
        assert take.num_entries == x.numel() * calls
        assert take.num_zero == x[0].numel() * calls
    assert take.num_retries == 0
    assert model.num_forwards == 2


def test_a_retry_with_a_smaller_scale_saves_the_gradient():
    model, (x, y) = Overflowing(1.0), batch(4)
    take = InputGradient(retry_non_finite=True)
    gradient = take(model, x, y, cross_entropy)
    expected = InputGradient()(model.body, x, y, cross_entropy)
    assert torch.equal(gradient, expected * 2.0**-6)  # powers of two: exact
    assert take.num_retries == 1
    assert take.num_non_finite == 0
    assert model.largest[1] == model.largest[0] / 64


def test_after_three_retries_the_sample_is_zeroed_and_the_others_kept():
    model, (x, y) = Overflowing(0.0), batch(4)
    take = InputGradient(retry_non_finite=True)
    gradient = take(model, x, y, cross_entropy)
    assert model.num_forwards == 4
    assert take.num_retries == 3
    assert take.num_non_finite == 1
    assert not gradient[0].any()
    assert gradient[1:].any()


def test_all_ranks_are_asked_after_every_gradient_and_their_word_decides():
    asked: list[bool] = []

    def agree(mine: Tensor) -> bool:
        assert mine.shape == ()
        assert mine.dtype == torch.bool
        asked.append(bool(mine))
        return len(asked) < 3  # another rank is not finite in the first two attempts

    model, (x, y) = Overflowing(math.inf), batch(4)
    take = InputGradient(retry_non_finite=True, agree=agree)
    gradient = take(model, x, y, cross_entropy)
    assert asked == [False, False, False]
    assert model.num_forwards == 3
    assert take.num_retries == 2
    assert torch.equal(gradient, InputGradient()(model.body, x, y, cross_entropy) * 2.0**-12)


def test_without_retries_nobody_is_asked():
    def agree(mine: Tensor) -> bool:
        raise AssertionError("asked")

    (x, y) = batch(4)
    InputGradient(agree=agree)(Overflowing(1.0), x, y, cross_entropy)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.reentrant = reentrant
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.3), nn.Tanh())
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.second(self.first(x))
        return self.second(checkpoint(self.first, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@every_mode
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # while scoring
def test_activation_checkpointing_changes_nothing(reentrant, model_mode):
    (x, y), model = batch(), Checkpointed(reentrant)
    attack = attack_named("pgd", "linf", model_mode, restarts=2)
    fired: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
    plain = Checkpointed(None)
    torch.manual_seed(5)  # for dropout in model_mode train
    x_adv = attack(model, x, y, SampleGenerator(0, 0))
    torch.manual_seed(5)
    expected = attack(plain, x, y, SampleGenerator(0, 0))
    assert torch.equal(x_adv, expected)
    assert fired == []
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_only_a_reentrant_checkpoint_is_found_in_a_graph():
    x = batch()[0].requires_grad_()
    found = {r: has_reentrant_checkpoint(Checkpointed(r)(x)) for r in (None, False, True)}
    assert found == {None: False, False: False, True: True}
    assert not has_reentrant_checkpoint(torch.zeros(2))


def test_attack_statistics_are_counted_through_a_built_attack():
    model, (x, y), take = linear(3, torch.float32), batch(), InputGradient()
    attack_named("pgd", "linf")(model, x, y, SampleGenerator(0, 0), gradient=take)
    assert take.num_samples == 3 * len(x)
    assert take.num_entries == 3 * x.numel()
    assert take.num_non_finite == 0
