"""Claims about inner losses: the formula, its gradient, saturation, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from dat_ds.attacks import (
    FEATURE_LOSSES,
    INNER_LOSSES,
    cross_entropy,
    cw_margin,
    dlr,
    kl_divergence,
    targeted_dlr,
)
from dat_ds.attacks.losses import ascent_loss, log_odds

pytestmark = pytest.mark.fast

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
Y, TARGET = torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor([1, 0, 0, 4, 2, 3])


def logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)


def target_of(name: str) -> Tensor:
    return logits(1).softmax(1) if name == "kl" else Y


def wrong(z: Tensor, i: int) -> list[float]:
    return [float(z[i, k]) for k in range(5) if k != Y[i]]


def by_hand(name: str, z: Tensor) -> Tensor:
    """Each loss from its published formula, one sample at a time."""
    values = []
    for i, y in enumerate(Y.tolist()):
        top = sorted(z[i].tolist(), reverse=True)
        margin = max(wrong(z, i)) - float(z[i, y])
        p = z[i].softmax(0)
        q = logits(1)[i].softmax(0)
        values.append(
            {
                "ce": -float(p[y].log()),
                "cw": margin,
                "dlr": margin / (top[0] - top[2]),
                "kl": float((q * (q / p).log()).sum()),
                "dlr-targeted": (float(z[i, TARGET[i]]) - float(z[i, y]))
                / (top[0] - (top[2] + top[3]) / 2),
            }[name]
        )
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", [n for n in INNER_LOSSES if n not in FEATURE_LOSSES])
def test_a_loss_is_its_formula_per_sample(name):
    assert_close(INNER_LOSSES[name](logits(), target_of(name)), by_hand(name, logits()), **TIGHT)


def test_the_targeted_dlr_is_its_formula():
    assert_close(targeted_dlr(logits(), Y, TARGET), by_hand("dlr-targeted", logits()), **TIGHT)


@pytest.mark.parametrize("name", [n for n in INNER_LOSSES if n not in FEATURE_LOSSES])
def test_the_gradient_agrees_with_finite_differences(name):
    z = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: INNER_LOSSES[name](z, target_of(name)), [z])


@pytest.mark.parametrize("margin", [40.0, 100.0, 600.0])
def test_the_cross_entropy_of_a_confident_sample_keeps_the_true_class_in_its_gradient(margin):
    z = torch.tensor([[margin, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(z, torch.tensor([0])).sum(), z)
    assert gradient[0, 0] < 0
    assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-30)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4, 1e30])
def test_the_log_odds_climb_from_the_true_class_to_the_others_by_their_shares(scale):
    z = (scale * logits()).requires_grad_()
    (gradient,) = torch.autograd.grad(log_odds(z, Y).sum(), z)
    shares = (scale * logits()).scatter(1, Y.unsqueeze(1), float("-inf")).softmax(1)
    assert_close(gradient, shares - F.one_hot(Y, 5), **TIGHT)


def test_the_cross_entropy_climbs_as_the_log_odds_do_and_slower_by_what_is_left_to_gain():
    z = logits().requires_grad_()
    of_loss = torch.autograd.grad(cross_entropy(z, Y).sum(), z)[0]
    of_odds = torch.autograd.grad(log_odds(z, Y).sum(), z)[0]
    left = 1 - z.detach().softmax(1).gather(1, Y.unsqueeze(1))
    assert_close(of_loss, left * of_odds, **TIGHT)


def test_the_log_odds_rank_as_the_cross_entropy_does_and_where_it_rounds_to_zero():
    margin = torch.linspace(-800, 2000, 57, dtype=torch.float64)
    z, y = torch.stack([margin, 0 * margin, 0 * margin - 1], dim=1), torch.zeros(57).long()
    losses, odds = cross_entropy(z, y), log_odds(z, y)
    assert (odds.diff() < 0).all()
    assert (losses.diff() <= 0).all()
    assert not losses[-1:].any()
    assert_close(losses, F.cross_entropy(z, y, reduction="none"), rtol=0, atol=1e-12)
    assert_close(F.softplus(odds), losses, **TIGHT)


@pytest.mark.parametrize("loss", ["ce", cross_entropy])
def test_an_attack_climbs_log_odds_for_class_indices_and_cross_entropy_for_probabilities(loss):
    assert torch.equal(ascent_loss(loss)(logits(), Y), log_odds(logits(), Y))
    p = logits(1).softmax(1)
    assert torch.equal(ascent_loss(loss)(logits(), p), cross_entropy(logits(), p))


def test_an_attack_climbs_other_losses_as_they_are():
    assert ascent_loss("dlr") is dlr
    assert ascent_loss(kl_divergence) is kl_divergence


@pytest.mark.parametrize("name", [n for n in INNER_LOSSES if n not in FEATURE_LOSSES])
def test_saturated_and_tied_logits_give_finite_losses_and_gradients(name):
    for z in (1e4 * F.one_hot(Y, 5).double(), -1e4 * F.one_hot(Y, 5).double(), torch.zeros(6, 5)):
        leaf = z.double().requires_grad_()
        y = F.one_hot(Y, 5).double() if name == "kl" else Y  # probabilities that are exactly zero
        values = INNER_LOSSES[name](leaf, y)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_the_dlr_is_blind_to_shift_and_scale():
    assert_close(dlr(7 * logits() + 3, Y), dlr(logits(), Y), rtol=1e-10, atol=1e-10)


def test_the_cw_margin_is_positive_where_misclassified():
    z = logits()
    assert torch.equal(cw_margin(z, Y) > 0, z.argmax(1) != Y)


def test_the_divergence_has_the_gradient_of_the_soft_cross_entropy():
    z, p = logits().requires_grad_(), logits(1).softmax(1)
    ours = torch.autograd.grad(kl_divergence(z, p).sum(), z)[0]
    assert_close(ours, torch.autograd.grad(cross_entropy(z, p).sum(), z)[0], **TIGHT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: dlr(z[:, :2], Y % 2), "loss 'dlr' needs at least 3 classes, not 2"),
        (lambda z: targeted_dlr(z[:, :3], Y % 3, Y % 3), "needs at least 4 classes, not 3"),
        (lambda z: dlr(z, z.softmax(1)), "loss 'dlr' needs class indices, not probabilities"),
        (lambda z: cw_margin(z, z.softmax(1)), "loss 'cw' needs class indices, not probabil"),
        (lambda z: targeted_dlr(z, z.softmax(1), TARGET), "'dlr-targeted' needs class indices"),
    ],
)
def test_a_loss_that_is_not_defined_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call(logits())
