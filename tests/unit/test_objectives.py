"""Claims about the outer losses: the formula, its gradient, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from dat_ds.objectives import OBJECTIVES, Objective, build_objective

FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}  # a few float32 roundings of numbers near 1


def logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)).to(dtype)


Y = torch.tensor([0, 1, 2, 3, 0, 2])


def formula(z: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in float64, from its definition."""
    target = (1 - smoothing) * F.one_hot(y, z.shape[1]).double() + smoothing / z.shape[1]
    log_p = z.double() - z.double().exp().sum(1, keepdim=True).log()
    return -(target * log_p).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_at_is_the_cross_entropy_of_the_adversarial_logits(smoothing):
    objective = build_objective({"name": "at", "label_smoothing": smoothing})
    terms = objective(logits(0), Y)
    expected = formula(logits(0), Y, smoothing).float()
    assert not objective.needs_natural_logits
    assert set(terms) == {"loss", "robust_loss"}
    assert_close(terms["loss"], expected, **FLOAT32)
    assert torch.equal(terms["robust_loss"], terms["loss"])


@pytest.mark.parametrize("weight", [None, 0.5, 6.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dat_adds_the_weighted_natural_cross_entropy_of_weight_one_by_default(weight, smoothing):
    objective = build_objective(
        {"name": "dat", "natural_weight": weight, "label_smoothing": smoothing}
    )
    terms = objective(logits(0), Y, logits(1))
    robust, natural = formula(logits(0), Y, smoothing), formula(logits(1), Y, smoothing)
    expected = (1.0 if weight is None else weight) * natural + robust
    assert objective.needs_natural_logits
    assert set(terms) == {"loss", "robust_loss", "natural_loss"}
    assert_close(terms["loss"], expected.float(), **FLOAT32)
    assert_close(terms["robust_loss"], robust.float(), **FLOAT32)
    assert_close(terms["natural_loss"], natural.float(), **FLOAT32)


def test_the_two_names_differ_in_the_default_weight_alone():
    weighted = [build_objective({"name": name, "natural_weight": 2}) for name in OBJECTIVES]
    losses = [objective(logits(0), Y, logits(1))["loss"] for objective in weighted]
    assert torch.equal(*losses)
    assert build_objective({}) == Objective("at", 0.0, 0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_torchs(smoothing):
    loss = build_objective({"label_smoothing": smoothing})(logits(0), Y)["loss"]
    assert torch.equal(loss, F.cross_entropy(logits(0), Y, label_smoothing=smoothing))


def test_the_gradient_agrees_with_central_differences_of_the_formula():
    adversarial, natural = logits(0).requires_grad_(), logits(1).requires_grad_()
    objective = build_objective({"name": "dat", "natural_weight": 0.7, "label_smoothing": 0.1})
    loss = objective(adversarial, Y, natural)["loss"]
    gradients = torch.autograd.grad(loss, [adversarial, natural])
    step = 1e-5  # error of central differences in float64: step^2 + 2^-53 / step, below 1e-9
    for weight, leaf, gradient in zip((1, 0.7), (adversarial, natural), gradients, strict=True):
        point, numeric = leaf.detach().double(), torch.zeros(6, 4)
        for i in range(point.numel()):
            shift = torch.zeros_like(point)
            shift.view(-1)[i] = step
            rise = formula(point + shift, Y, 0.1) - formula(point - shift, Y, 0.1)
            numeric.view(-1)[i] = weight * rise / (2 * step)
        assert_close(gradient, numeric, rtol=0, atol=1e-6)  # float32 rounding of the gradient


def test_only_the_loss_carries_a_gradient():
    terms = build_objective({"name": "dat"})(logits(0).requires_grad_(), Y, logits(1))
    assert {name: term.requires_grad for name, term in terms.items()} == {
        "loss": True,
        "robust_loss": False,
        "natural_loss": False,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_of_any_precision_of_logits_is_taken_in_float32(dtype):
    z = logits(0, dtype).requires_grad_()
    loss = build_objective({})(z, Y)["loss"]
    assert loss.dtype == torch.float32
    assert_close(loss, formula(z.detach(), Y).float(), **FLOAT32)
    assert torch.autograd.grad(loss, z)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_probabilities_give_the_loss_of_the_labels(dtype):
    soft = F.one_hot(Y, 4).to(dtype)
    loss, expected = (build_objective({})(logits(0), y)["loss"] for y in (soft, Y))
    assert_close(loss, expected, **FLOAT32)


def test_natural_logits_that_are_needed_are_asked_for():
    with pytest.raises(ValueError, match=r"objective 'dat' with natural_weight > 0 needs logits"):
        build_objective({"name": "dat"})(logits(0), Y)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "trades"}, r"objective\.name='trades' is not one of at, dat"),
        ({"beta": 6, "alpha": 1}, r"'at' has no option alpha, beta: natural_weight, label_smooth"),
        ({"natural_weight": -1}, r"natural_weight=-1\.0 must be a finite number of at least 0"),
        ({"natural_weight": float("inf")}, r"natural_weight=inf must be a finite number"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 must lie in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1 must lie in \[0, 1\)"),
    ],
)
def test_build_objective_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        build_objective(config)
