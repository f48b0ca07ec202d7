"""Claims about the outer losses: the formula, its gradient, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from dat_ds.objectives import (
    OBJECTIVES,
    AdversarialTraining,
    build_objective,
    helper_images,
)

pytestmark = pytest.mark.fast

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # float32 roundings of numbers near 10
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
Y = torch.tensor([0, 1, 2, 3, 0, 2])
Y_HELPER = torch.tensor([1, 1, 0, 3, 2, 2])
CLASSIFYING = [
    name
    for name, kind in OBJECTIVES.items()
    if kind.classifies and not kind.needs_start_logits and not kind.compares_samples
]
"""Objectives whose loss is a mean over samples of natural, adversarial and helper logits."""
every_objective = pytest.mark.parametrize("name", CLASSIFYING)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)).to(dtype)


def call(name: str, z_adv: Tensor, z: Tensor, z_helper: Tensor, y: Any = Y, **options: Any) -> Any:
    helper = {"logits_helper": z_helper, "y_helper": Y_HELPER[: len(z)]} if name == "hat" else {}
    weights = {"weights": options.pop("weights")} if "weights" in options else {}
    return build_objective({"name": name, **options})(z_adv, y, z, **helper, **weights)


# ---- the published formulas, in probabilities and float64


def ce(z: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    one_hot = F.one_hot(y, z.shape[1]).double()
    target = (1 - smoothing) * one_hot + smoothing / z.shape[1]
    return -(target * (z.exp() / z.exp().sum(1, keepdim=True)).log()).sum(1)


def kl(z: Tensor, z_adv: Tensor) -> Tensor:
    p, q = z.softmax(1), z_adv.softmax(1)
    return (p * (p / q).log()).sum(1)


def mart(a: Tensor, z: Tensor, h: Tensor) -> Tensor:
    p, p_adv = z.softmax(1), a.softmax(1)
    wrong = torch.stack([p_adv[i, [k for k in range(4) if k != Y[i]]].max() for i in range(6)])
    bce = -p_adv[range(6), Y].log() - (1 - wrong).log()
    return (bce + 5 * kl(z, a) * (1 - p[range(6), Y])).mean()


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "at": lambda a, z, h: ce(a, Y).mean(),
    "dat": lambda a, z, h: (ce(z, Y) + ce(a, Y)).mean(),
    "trades": lambda a, z, h: (ce(z, Y) + 6 * kl(z, a)).mean(),
    "mart": mart,
    "alp": lambda a, z, h: (ce(z, Y) + ce(a, Y)).mean() / 2 + 0.5 * ((z - a) ** 2).sum() / (6 * 4),
    "hat": lambda a, z, h: (ce(z, Y) + 2.5 * kl(z, a) + 0.5 * ce(h, Y_HELPER)).mean(),
    "rotation": lambda a, z, h: ce(a, Y).mean(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_published_formula(name):
    z = logits(0), logits(1), logits(2)
    assert_close(call(name, *z)["loss"], FORMULAS[name](*z), **FLOAT64)


@every_objective
def test_the_gradient_agrees_with_finite_differences_for_every_logits(name):
    z = [logits(seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(
        lambda *args: call(name, *args)["loss"], z, eps=1e-6, atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_precision_are_taken_in_float32(name, dtype):
    z = [logits(seed, dtype).requires_grad_() for seed in range(3)]
    loss = call(name, *z)["loss"]
    exact = FORMULAS[name](*(t.detach().double() for t in z))
    assert loss.dtype == torch.float32
    assert_close(loss, exact.float(), **FLOAT32)
    assert torch.autograd.grad(loss, z[0])[0].dtype == dtype


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_saturated_and_equal_logits_give_finite_losses_and_gradients(name, dtype):
    one_hot = F.one_hot(Y, 4).to(dtype) * 1e4
    for adversarial in (one_hot, one_hot.roll(1, 1), -one_hot, torch.zeros_like(one_hot)):
        z = [t.clone().requires_grad_() for t in (adversarial, one_hot, one_hot.roll(2, 1))]
        loss = call(name, *z)["loss"]
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, z, allow_unused=True)
        assert all(g.isfinite().all() for g in gradients if g is not None)


@every_objective
def test_only_the_loss_carries_a_gradient_and_terms_are_scalars(name):
    terms = call(name, *(logits(seed).requires_grad_() for seed in range(3)))
    assert {k for k, v in terms.items() if v.requires_grad} == {"loss"}
    assert all(v.ndim == 0 for v in terms.values())


@every_objective
def test_two_halves_of_a_batch_average_to_the_whole(name):
    z = logits(0), logits(1), logits(2)
    helper = {"logits_helper": z[2], "y_helper": Y_HELPER} if name == "hat" else {}
    halves = [
        build_objective({"name": name})(
            z[0][part], Y[part], z[1][part], **{k: v[part] for k, v in helper.items()}
        )["loss"]
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert_close(sum(halves) / 2, call(name, *z)["loss"], **FLOAT64)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_unlabelled_sample_keeps_the_terms_that_need_no_label(name):
    z = logits(0), logits(1), logits(2)
    y = torch.where(torch.arange(6) < 4, Y, -1)
    helper = {"logits_helper": z[2], "y_helper": Y_HELPER} if name == "hat" else {}
    loss = build_objective({"name": name})(z[0], y, z[1], **helper)["loss"]
    rest = {k: v[4:] for k, v in helper.items()}
    labelled = call(name, *(t[:4] for t in z), y=Y[:4])["loss"]
    unlabelled = {
        "trades": 6 * kl(z[1], z[0])[4:].mean(),
        "alp": 0.5 * ((z[1] - z[0]) ** 2)[4:].mean(),
        "hat": 2.5 * kl(z[1], z[0])[4:].mean() + 0.5 * ce(z[2], Y_HELPER)[4:].mean(),
    }.get(name, torch.zeros((), dtype=torch.float64))
    assert rest.keys() == helper.keys()
    assert_close(loss, (4 * labelled + 2 * unlabelled) / 6, **FLOAT64)


@pytest.mark.parametrize("name", ["at", "dat", "trades", "alp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_probabilities_give_the_loss_of_the_labels(name, dtype):
    soft = F.one_hot(Y, 4).to(dtype)
    z = logits(0), logits(1), logits(2)
    assert_close(call(name, *z, y=soft)["loss"], call(name, *z)["loss"], **FLOAT64)


SMOOTHED = [name for name, kind in OBJECTIVES.items() if "label_smoothing" in kind.known_keys()]


def test_every_objective_of_class_labels_smooths_them_but_for_mart():
    # mart compares with the true class's own probability; the others have no class labels.
    assert set(OBJECTIVES) - set(SMOOTHED) == {"mart", "contrastive", "fare"}


@pytest.mark.parametrize("name", sorted(set(CLASSIFYING) & set(SMOOTHED)))
def test_smoothed_labels_are_those_probabilities(name):
    z_adv, z, z_helper = logits(0), logits(1), logits(2)
    target = 0.7 * F.one_hot(Y, 4).double() + 0.3 / 4
    smoothed = call(name, z_adv, z, z_helper, label_smoothing=0.3)["loss"]
    assert_close(smoothed, call(name, z_adv, z, z_helper, y=target)["loss"], **FLOAT64)
    # Of labels that are probabilities already, such as those of mixup, the same share is spread.
    mixed = (target + target.roll(1, dims=0)) / 2
    both = call(name, z_adv, z, z_helper, y=mixed, label_smoothing=0.3)["loss"]
    spread = call(name, z_adv, z, z_helper, y=0.7 * mixed + 0.3 / 4)["loss"]
    assert_close(both, spread, **FLOAT64)
    assert not torch.equal(both, smoothed)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_torchs(smoothing):
    z = logits(0)
    loss = build_objective({"label_smoothing": smoothing})(z, Y)["loss"]
    assert_close(loss, F.cross_entropy(z, Y, label_smoothing=smoothing), **FLOAT64)
    assert_close(loss, ce(z, Y, smoothing).mean(), **FLOAT64)


@pytest.mark.parametrize("weight", [0.5, 6.0])
def test_the_natural_term_of_at_and_dat_differs_in_its_default_weight_alone(weight):
    z = logits(0), logits(1), logits(2)
    at, dat = (call(name, *z, natural_weight=weight)["loss"] for name in ("at", "dat"))
    assert torch.equal(at, dat)
    assert_close(at, (weight * ce(z[1], Y) + ce(z[0], Y)).mean(), **FLOAT64)
    assert not build_objective({}).needs_natural_logits
    assert build_objective({"name": "dat"}).needs_natural_logits


@every_objective
def test_a_weight_of_none_is_the_default(name):
    options = OBJECTIVES[name]().to_dict()
    default = build_objective({"name": name})
    assert (
        build_objective({"name": name, **dict.fromkeys(OBJECTIVES[name].known_keys())}) == default
    )
    assert build_objective(options) == default


def test_objectives_that_compare_predictions_are_attacked_through_the_divergence():
    kl_attacked = {n for n, kind in OBJECTIVES.items() if kind.default_attack_loss == "kl"}
    assert kl_attacked == {"trades", "hat"}


def test_helper_images_lie_twice_as_far_within_the_pixel_range():
    x, x_adv = torch.tensor([0.5, 0.9]), torch.tensor([0.4, 1.0])
    assert_close(helper_images(x, x_adv), torch.tensor([0.3, 1.0]))


@pytest.mark.parametrize("name", [name for name in CLASSIFYING if name not in ("at", "rotation")])
def test_natural_logits_that_are_needed_are_asked_for(name):
    with pytest.raises(ValueError, match=rf"objective '{name}' needs outputs: natural is missing"):
        build_objective({"name": name})(logits(0), Y)


def test_mart_refuses_probabilities():
    with pytest.raises(ValueError, match="'mart' needs class indices, not probabilities"):
        call("mart", logits(0), logits(1), logits(2), y=F.one_hot(Y, 4).double())


def test_hat_asks_for_labels_of_its_helper_images():
    with pytest.raises(ValueError, match="'hat' needs outputs: y_helper is missing"):
        build_objective({"name": "hat"})(logits(0), Y, logits(1), logits_helper=logits(2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "trade"},
            r"objective\.name='trade' is not valid \(did you mean 'trades'\?\)\. Write one of 'at'",
        ),
        (
            {"beta": 6, "alpha": 1},
            r"objective\.beta=6 is not a setting of the objective 'at': (?s:.)*"
            r"Unknown key in the run config: objective\.alpha",
        ),
        (
            {"natural_weight": -1},
            r"objective\.natural_weight=-1\.0 is not valid: write a number of at least 0",
        ),
        ({"natural_weight": float("inf")}, r"natural_weight=inf must be a finite number"),
        (
            {"label_smoothing": 1.0},
            r"label_smoothing=1\.0 is not valid: write a number in \[0, 1\)",
        ),
        (
            {"name": "trades", "label_smoothing": -0.1},
            r"label_smoothing=-0\.1 is not valid: write a number in \[0, 1\)",
        ),
        (
            {"name": "mart", "label_smoothing": 0.1},
            r"objective\.label_smoothing=0\.1 is not a setting of the objective 'mart': ",
        ),
    ],
)
def test_build_objective_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        build_objective(config)


def test_the_default_objective_is_adversarial_training():
    assert build_objective({}) == AdversarialTraining(natural_weight=0.0, label_smoothing=0.0)


# ---- weights


@every_objective
def test_a_weight_multiplies_a_samples_share_of_every_term(name: str) -> None:
    z_adv, z, z_helper = logits(0), logits(1), logits(2)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25], dtype=torch.float64)
    found = call(name, z_adv, z, z_helper, weights=weights)
    for term, value in found.items():
        # Alone in its batch, a sample's term is its share.
        expected = sum(
            w * single(name, z_adv, z, z_helper, i)[term] for i, w in enumerate(weights.tolist())
        )
        assert_close(value, expected / 6, **FLOAT64)
    unweighted = call(name, z_adv, z, z_helper, weights=torch.ones(6, dtype=torch.float64))
    assert_close(unweighted, call(name, z_adv, z, z_helper), **FLOAT64)


def single(name: str, z_adv: Tensor, z: Tensor, z_helper: Tensor, i: int) -> dict[str, Tensor]:
    row = slice(i, i + 1)
    helper = {"logits_helper": z_helper[row], "y_helper": Y_HELPER[row]} if name == "hat" else {}
    return build_objective({"name": name})(z_adv[row], Y[row], z[row], **helper)
