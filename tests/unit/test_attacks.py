"""Claims about attacks: they leave no trace, do what the formula says, and count their work."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dat_ds.attacks import (
    ATTACKS,
    MODEL_MODES,
    NORMS,
    InputGradient,
    SampleGenerator,
    ThreatModel,
    attack_mode,
    attack_options,
    build_attack,
    cross_entropy,
    fgsm,
    fgsm_step_size,
    parse_length,
    pgd,
)
from dat_ds.attacks.gradient import has_reentrant_checkpoint, logit_gradient
from dat_ds.attacks.modes import preserved_rng

STEPS: dict[str, Any] = {"steps": 3, "step_size": "2/255"}
OPTIONS: dict[str, dict[str, Any]] = {
    "pgd": STEPS,
    "fgsm": {},
    "fgsm_rs": {},
    "n_fgsm": {},
    "mim": STEPS,
    "apgd": {"steps": 3},
    "fat": STEPS,
    "multi_norm": STEPS,
}
EPS = {"linf": "8/255", "l2": 0.5, "l1": 4.0}
NORMS_OF = {"n_fgsm": ("linf",), "fgsm": ("linf", "l2"), "fgsm_rs": ("linf", "l2")}
DEFINED = [(name, norm) for name in ATTACKS for norm in NORMS_OF.get(name, NORMS)]


def attack_named(name: str, norm: str, model_mode: str = "eval", **options: Any) -> Any:
    threat = {"norm": norm, "eps": EPS[norm]}
    if name == "multi_norm":
        options["other_norms"] = {other: EPS[other] for other in NORMS if other != norm}
    taken = attack_options(name)
    options = {k: v for k, v in {**OPTIONS[name], **options}.items() if k in taken}
    return build_attack({"name": name, "threat_model": threat, "model_mode": model_mode, **options})


class Net(nn.Module):
    """Conv, BatchNorm, dropout and a module that replaces its buffer; forwards are counted."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen_norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 4, 3)
        self.register_buffer("calls_in_training", torch.zeros((), dtype=torch.int64))
        self.fail_at, self.num_forwards = fail_at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise RuntimeError("boom")
        if self.training:
            self.calls_in_training = self.calls_in_training + 1  # a new tensor, not in place
        h = self.frozen_norm(self.norm(self.conv(x)).relu())
        return self.head(self.drop(h.flatten(1)))


def model_in_training(fail_at: int | None = None) -> Net:
    """A training model with a frozen part, mixed modes, and gradients here but not there."""
    model = Net(fail_at).train()
    model.frozen_norm.eval().requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def batch(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(size, 1, 4, 4, generator=generator, dtype=dtype)
    return x, torch.arange(size) % 3


def trace(model: Net, x: Tensor) -> dict[str, Any]:
    """Everything an attack must leave as it was."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "no_grad_yet": [name for name, p in model.named_parameters() if p.grad is None],
        "enabled": torch.is_grad_enabled(),
        "x_requires_grad": x.requires_grad,
        "tensors": [
            *(t.clone() for t in model.state_dict().values()),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            torch.get_rng_state(),
            x.detach().clone(),
        ],
    }


def assert_no_trace(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors, left = before.pop("tensors"), after.pop("tensors")
    assert after == before
    assert len(left) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(left, tensors, strict=True))


every_attack = pytest.mark.parametrize("name", ATTACKS)
every_norm = pytest.mark.parametrize("norm", NORMS)
every_attack_and_norm = pytest.mark.parametrize(("name", "norm"), DEFINED)
every_mode = pytest.mark.parametrize("model_mode", MODEL_MODES)


# ---- leave no trace


@every_attack_and_norm
@every_mode
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("restarts", [1, 2])
def test_an_attack_leaves_no_trace(name, norm, model_mode, random_start, restarts):
    model, (x, y) = model_in_training(), batch()
    attack = attack_named(name, norm, model_mode, random_start=random_start, restarts=restarts)
    buffer = model.calls_in_training
    before = trace(model, x)
    x_adv = attack(model, x, y)
    assert_no_trace(before, trace(model, x))
    assert model.calls_in_training is buffer
    assert model.num_forwards > 0
    assert x_adv.dtype == torch.float32
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    assert x_adv.data_ptr() != x.data_ptr()
    assert not torch.equal(x_adv, x)


@every_attack_and_norm
@every_mode
def test_an_attack_that_fails_on_its_last_forward_leaves_no_trace(name, norm, model_mode):
    healthy, (x, y) = model_in_training(), batch()
    attack_named(name, norm, model_mode, restarts=2)(healthy, x, y, SampleGenerator(0, 0))
    model = model_in_training(fail_at=healthy.num_forwards)
    before = trace(model, x)
    with pytest.raises(RuntimeError, match="boom"):
        attack_named(name, norm, model_mode, restarts=2)(model, x, y, SampleGenerator(0, 0))
    assert model.num_forwards == healthy.num_forwards
    assert_no_trace(before, trace(model, x))


@every_attack
def test_an_attack_works_under_no_grad_and_on_x_that_requires_gradients(name):
    model, (x, y) = model_in_training(), batch()
    expected = attack_named(name, "linf")(model, x, y, SampleGenerator(0, 0))
    x.requires_grad_()
    with torch.no_grad():
        x_adv = attack_named(name, "linf")(model, x, y, SampleGenerator(0, 0))
        assert not torch.is_grad_enabled()
    assert torch.equal(x_adv, expected)
    assert not x_adv.requires_grad
    assert x.grad is None


@every_attack
@every_mode
def test_no_parameter_gradient_is_computed(name, model_mode):
    model, (x, y) = model_in_training(), batch()
    fired: list[Tensor] = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(fired.append)
    attack_named(name, "linf", model_mode, restarts=2)(model, x, y)
    assert fired == []
    model(x).sum().backward()
    assert fired, "the hooks do fire in an ordinary backward"


def test_the_inside_of_attack_mode_is_frozen_and_in_the_mode_asked_for():
    for model_mode in MODEL_MODES:
        model = model_in_training()
        with torch.no_grad(), attack_mode(model, model_mode):
            assert {m.training for m in model.modules()} == {model_mode == "train"}
            assert not any(p.requires_grad for p in model.parameters())
            assert torch.is_grad_enabled()


def test_model_mode_train_uses_batch_statistics_and_dropout_and_eval_does_not():
    model, (x, y) = model_in_training(), batch()
    seen: dict[str, set[bool]] = {"eval": set(), "train": set()}
    for model_mode, flags in seen.items():
        hook = model.drop.register_forward_hook(lambda m, i, o, f=flags: f.add(m.training))
        attack_named("pgd", "linf", model_mode)(model, x, y)
        hook.remove()
    assert seen == {"eval": {False}, "train": {True}}


def test_preserved_rng_restores_the_generator_after_an_exception():
    state = torch.get_rng_state()
    with contextlib.suppress(ZeroDivisionError), preserved_rng(torch.device("cpu")):
        torch.rand(3)
        assert not torch.equal(torch.get_rng_state(), state)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


# ---- closed forms on linear models


def linear(classes: int = 2, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Linear(16, classes, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(scale)
    return nn.Sequential(nn.Flatten(), layer)


def mid_range(dtype: torch.dtype = torch.float64, size: int = 6) -> tuple[Tensor, Tensor]:
    """Pixels in [0.4, 0.6], so that a ball of radius 0.1 is never clipped."""
    x, _ = batch(size, dtype)
    return 0.4 + 0.2 * x, torch.arange(size) % 2


def worst_direction(model: nn.Module, y: Tensor) -> Tensor:
    """``w_other - w_y`` of each sample of a two-class linear model."""
    weight = model[1].weight.detach()
    return (weight[1 - y] - weight[y]).view(-1, 1, 4, 4)


CLOSED_FORM = {torch.float64: {"rtol": 0, "atol": 1e-15}, torch.float32: {"rtol": 0, "atol": 2e-7}}
"""A few roundings of a pixel below 1, per step: 2^-53 and 2^-24 each."""


@pytest.mark.parametrize("dtype", CLOSED_FORM)
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_on_a_linear_model_is_x_plus_eps_times_the_sign_of_the_weights(dtype, targeted):
    model, (x, y) = linear(dtype=dtype), mid_range(dtype)
    sign = -1 if targeted else 1
    expected = x + sign * 0.05 * worst_direction(model, y).sign()
    x_adv = fgsm(model, x, y, threat=ThreatModel("linf", 0.05), targeted=targeted)
    assert_close(x_adv, expected, **CLOSED_FORM[dtype])


@pytest.mark.parametrize("dtype", CLOSED_FORM)
@pytest.mark.parametrize("random_start", [False, True])
def test_linf_pgd_on_a_linear_model_reaches_the_corner_of_the_ball(dtype, random_start):
    model, (x, y) = linear(dtype=dtype), mid_range(dtype)
    x_adv = pgd(
        model,
        x,
        y,
        threat=ThreatModel("linf", 0.05),
        steps=11,  # 10 steps of 0.01 cross the ball from any start
        step_size=0.01,
        random_start=random_start,
    )
    expected = x + 0.05 * worst_direction(model, y).sign()
    assert_close(x_adv, expected, **CLOSED_FORM[dtype])


@pytest.mark.parametrize("dtype", CLOSED_FORM)
@pytest.mark.parametrize("steps", [1, 5])
def test_l2_pgd_on_a_linear_model_goes_straight_to_the_sphere(dtype, steps):
    model, (x, y) = linear(dtype=dtype), mid_range(dtype)
    direction = worst_direction(model, y)
    direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x_adv = pgd(
        model,
        x,
        y,
        threat=ThreatModel("l2", 0.1),
        steps=steps,
        step_size=0.1,
        random_start=False,
    )
    tolerance = {k: 4 * v for k, v in CLOSED_FORM[dtype].items()}  # norms of 16 entries, per step
    assert_close(x_adv, x + 0.1 * direction, **tolerance)


def test_each_step_moves_by_the_step_size_until_the_ball_ends():
    model, (x, y) = linear(), mid_range()
    sign = worst_direction(model, y).sign()
    for steps, length in [(0, 0.0), (1, 0.02), (2, 0.04), (3, 0.05)]:
        x_adv = pgd(
            model,
            x,
            y,
            threat=ThreatModel("linf", 0.05),
            steps=steps,
            step_size=0.02,
            random_start=False,
        )
        assert_close(x_adv, x + length * sign, **CLOSED_FORM[torch.float64])


def test_the_pixel_range_is_respected_at_its_ends():
    model, y = linear(), torch.tensor([0, 1])
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    x_adv = fgsm(model, x, y, threat=ThreatModel("linf", 0.05))
    assert torch.equal(x_adv, (x + 0.05 * worst_direction(model, y).sign()).clamp(0, 1))


@every_attack_and_norm
@pytest.mark.parametrize("random_start", [False, True])
def test_a_zero_radius_gives_x(name, norm, random_start):
    (x, y), options = batch(), {**OPTIONS[name], "random_start": random_start}
    if name == "multi_norm":
        options["other_norms"] = {other: 0 for other in NORMS if other != norm}
    taken = attack_options(name)
    options = {k: v for k, v in options.items() if k in taken}
    attack = build_attack({"name": name, "threat_model": {"norm": norm, "eps": 0}, **options})
    assert torch.equal(attack(linear(3, torch.float32), x, y), x)


@every_attack_and_norm
def test_an_empty_batch_gives_an_empty_batch_without_a_forward(name, norm):
    model, (x, y) = model_in_training(), batch()
    x_adv = attack_named(name, norm, random_start=True)(model, x[:0], y[:0], SampleGenerator(0, 0))
    assert x_adv.shape == (0, 1, 4, 4)
    assert model.num_forwards == 0


def test_the_fgsm_step_is_eps_and_from_a_random_start_a_quarter_longer():
    threat = ThreatModel("linf", 0.04)
    assert fgsm_step_size(threat, False) == 0.04
    assert fgsm_step_size(threat, True) == pytest.approx(0.05, rel=1e-15)


def test_fgsm_is_one_step_of_pgd():
    model, (x, y) = linear(3, torch.float32), batch()
    threat = ThreatModel("linf", 0.1)
    one = pgd(model, x, y, threat=threat, steps=1, step_size=0.125, generator=SampleGenerator(0, 0))
    fast = fgsm(model, x, y, threat=threat, random_start=True, generator=SampleGenerator(0, 0))
    assert torch.equal(fast, one)


# ---- strength


@functools.cache
def blobs() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on three overlapping classes of images."""
    torch.manual_seed(0)
    centres = torch.rand(3, 1, 4, 4)
    y = torch.arange(240) % 3
    x = (centres[y] + 0.15 * torch.randn(240, 1, 4, 4)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def robust(eps: float, steps: int = 20, norm: str = "linf", **options: Any) -> Tensor:
    """Which samples stay correct under PGD."""
    model, x, y = blobs()
    x_adv = pgd(
        model,
        x,
        y,
        threat=ThreatModel(norm, eps),
        steps=steps,
        step_size=2.5 * eps / max(1, steps),
        generator=SampleGenerator(0, 0),
        **options,
    )
    return model(x_adv).argmax(1) == y


@every_norm
def test_robust_accuracy_falls_as_the_ball_grows(norm):
    scale = {"linf": 1, "l2": 3, "l1": 20}[norm]
    radii = [r * scale for r in (0, 0.02, 0.05, 0.1, 0.2, 0.4)]
    accuracies = [robust(eps, norm=norm).double().mean().item() for eps in radii]
    assert accuracies[0] > 0.95, "the model is trained"
    # 240 samples: one of them may go the other way by chance of its start.
    assert all(b <= a + 1 / 240 for a, b in itertools.pairwise(accuracies))
    assert accuracies[-1] < 0.1, "the attack is strong enough to be measured"


def test_robust_accuracy_falls_with_the_number_of_steps():
    accuracies = [robust(0.1, steps).double().mean().item() for steps in (1, 2, 5, 20)]
    assert all(b <= a + 1 / 240 for a, b in itertools.pairwise(accuracies))
    # From a random start one step of 2.5 eps is nearly enough on so small a model.
    start_only = robust(0.1, steps=0).double().mean().item()
    assert accuracies[-1] < start_only - 0.1


def test_restarts_never_help_the_defender_of_any_sample():
    model, x, y = blobs()
    attack = functools.partial(
        pgd, model, x, y, threat=ThreatModel("linf", 0.05), steps=2, step_size=0.02
    )
    once = attack(generator=SampleGenerator(0, 0))
    often = attack(generator=SampleGenerator(0, 0), restarts=5)
    correct_once = model(once).argmax(1) == y
    correct_often = model(often).argmax(1) == y
    assert not (correct_often & ~correct_once).any()
    loss_once = cross_entropy(model(once), y)
    loss_often = cross_entropy(model(often), y)
    same = correct_often == correct_once
    assert (loss_often >= loss_once)[same].all()
    assert (loss_often > loss_once).any(), "later restarts are used"


def test_restarts_prefer_a_misclassified_image_to_one_with_a_larger_loss():
    # An upside-down loss: what a run maximises is the logit of the true class.
    model, x, y = blobs()
    loss = lambda logits, y: logits.gather(1, y[:, None])[:, 0]  # noqa: E731
    attack = functools.partial(
        pgd, model, x, y, threat=ThreatModel("linf", 0.3), steps=0, step_size=0.1, loss=loss
    )
    generator = SampleGenerator(0, 0)
    runs = [attack(generator=generator) for _ in range(4)]
    hits = torch.stack([model(run).argmax(1) != y for run in runs])
    kept = attack(generator=SampleGenerator(0, 0), restarts=4)
    assert torch.equal(model(kept).argmax(1) != y, hits.any(0))
    assert hits.any(0).double().mean() > hits[0].double().mean()


def test_restarts_keep_the_best_run_of_each_sample_with_soft_labels_too():
    model, x, y = blobs()
    soft = F.one_hot(y, 3).float()
    attack = functools.partial(
        pgd, model, x, threat=ThreatModel("linf", 0.05), steps=2, step_size=0.02, restarts=3
    )
    hard_adv = attack(y, generator=SampleGenerator(0, 0))
    assert torch.equal(attack(soft, generator=SampleGenerator(0, 0)), hard_adv)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 1.0)])
def test_a_targeted_attack_brings_every_image_nearer_to_its_target(norm, eps):
    model, x, y = blobs()
    target = (y + 1) % 3
    x_adv = pgd(
        model,
        x,
        target,
        threat=ThreatModel(norm, eps),
        steps=10,
        step_size=eps / 4,
        random_start=False,
        targeted=True,
        restarts=2,
    )
    before, after = cross_entropy(model(x), target), cross_entropy(model(x_adv), target)
    assert (after < before).all()
    assert (model(x_adv).argmax(1) == target).double().mean() > 0.5


def test_a_callable_inner_loss_is_maximised():
    model, (x, y) = linear(3), mid_range()
    x_adv = fgsm(
        model, x, y, threat=ThreatModel("linf", 0.05), loss=lambda logits, y: -logits[:, 2]
    )
    weight = model[1].weight.detach()[2].view(1, 1, 4, 4)
    assert_close(x_adv, x - 0.05 * weight.sign(), **CLOSED_FORM[torch.float64])


def test_a_model_may_be_any_callable():
    model, (x, y) = linear(), mid_range()
    threat = ThreatModel("linf", 0.05)
    assert torch.equal(
        fgsm(lambda t: model(t), x, y, threat=threat), fgsm(model, x, y, threat=threat)
    )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("restarts", "scored"), [(1, 0), (3, 3)])
def test_the_number_of_forwards_is_steps_per_restart_and_one_to_score_each(steps, restarts, scored):
    model, (x, y) = model_in_training(), batch()
    pgd(
        model,
        x,
        y,
        threat=ThreatModel("linf", 0.1),
        steps=steps,
        step_size=0.1,
        restarts=restarts,
    )
    assert model.num_forwards == restarts * steps + scored


@every_attack
def test_the_same_generator_gives_the_same_images_and_another_seed_others(name):
    model, (x, y) = linear(3, torch.float32), batch()
    # Within l2 an attack does not end in the same corner from every start.
    norm = "l2" if (name, "l2") in DEFINED else "linf"
    attack = attack_named(name, norm, random_start=True)
    first = attack(model, x, y, SampleGenerator(0, 1))
    assert torch.equal(attack(model, x, y, SampleGenerator(0, 1)), first)
    assert not torch.equal(attack(model, x, y, SampleGenerator(1, 1)), first)
    seeded = [attack(model, x, y, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*seeded)


# ---- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "pdg"}, r"attack\.name='pdg' is not one of pgd, fgsm, fgsm_rs"),
        ({"name": "pgd"}, r"threat_model is missing: give \{'norm': 'linf', 'eps': '8/255'\}"),
        ({"threat_model": {"nrom": "l2"}}, r"unknown keys \['nrom'\] and lacks \['eps', 'norm'\]"),
        ({"threat_model": {"norm": "linf", "eps": None}}, r"None is not a length"),
        ({"threat_model": {"norm": "linf", "eps": 8}}, r"write '8/255'"),
        ({"threat_model": ThreatModel("l2", 1), "stpes": 3}, r"'pgd' has no option stpes: \["),
        ({"threat_model": ThreatModel("l2", 1), "generator": 3}, r"has no option generator"),
        ({"name": "fgsm", "threat_model": ThreatModel("l2", 1), "steps": 2}, r"no option steps"),
        ({"threat_model": ThreatModel("l2", 1), "steps": 3}, r"'pgd' needs step_size"),
        ({"threat_model": ThreatModel("l2", 1), "step_size": "a/b"}, r"'a/b' is not a length"),
    ],
)
def test_build_attack_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        build_attack(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"steps=-1 must be at least 0"),
        ({"restarts": 0}, r"restarts=0 at least 1"),
        (
            {"loss": "cee"},
            r"loss='cee' is not one of ce, cw, dlr, kl, feature_distance, nt",
        ),
        ({"model_mode": "test"}, r"model_mode='test' is not one of eval, train"),
    ],
)
def test_pgd_says_what_is_wrong_and_leaves_no_trace(options, message):
    model, (x, y) = model_in_training(), batch()
    before = trace(model, x)
    arguments = {"threat": ThreatModel("linf", 0.1), "steps": 1, "step_size": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        pgd(model, x, y, **arguments)
    assert_no_trace(before, trace(model, x))


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), (2, 2.0), ("1e-3", 1e-3)]
)
def test_a_length_is_a_number_or_a_fraction(text, value):
    assert parse_length(text) == value


@pytest.mark.parametrize("text", ["8/", "/255", "8/0", "eight", "8/255/2", "", [1]])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a length: write 0\.03 or '8/255'"):
        parse_length(text)


# ---- InputGradient


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
