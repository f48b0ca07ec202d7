"""Claims about attacks: they leave no trace, do what the formula says, and name mistakes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dat_ds.attacks import (
    ATTACKS,
    MODEL_MODES,
    NORMS,
    SampleGenerator,
    ThreatModel,
    attack_mode,
    build_attack,
    fgsm,
    fgsm_step_size,
    parse_length,
    pgd,
)
from dat_ds.attacks.modes import preserved_rng
from dat_ds.length import OfEps
from tests.settings import IMAGE_ATTACKS
from tests.unit.attack_helpers import (
    CLOSED_FORM,
    OPTIONS,
    assert_no_trace,
    attack_named,
    batch,
    every_attack,
    every_attack_and_norm,
    every_mode,
    linear,
    mid_range,
    model_in_training,
    trace,
    worst_direction,
)

pytestmark = pytest.mark.fast

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
    (x, y), options = batch(), {**OPTIONS.get(name, {}), "random_start": random_start}
    if name == "multi_norm":
        options["other_norms"] = {other: 0 for other in NORMS if other != norm}
    taken = ATTACKS[name].known_keys()
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


# ---- step sizes


@pytest.mark.parametrize(
    "name", [n for n in IMAGE_ATTACKS if "step_size" in ATTACKS[n].known_keys()]
)
def test_a_step_may_be_text_and_is_by_default_the_attacks_share_of_eps(name):
    model, (x, y) = linear(3, torch.float32), batch()
    threat = ThreatModel("linf", "0.5/4")
    function, share = ATTACKS[name].function, ATTACKS[name]().default_step_share
    more = {"other_norms": {"l2": 0.5}} if name == "multi_norm" else {}
    if "steps" in ATTACKS[name].known_keys():
        more["steps"] = 2

    def run(**options):
        return function(
            model, x, y, threat=threat, generator=SampleGenerator(0, 0), **more, **options
        )

    by_number = run(step_size=share * threat.eps)
    assert torch.equal(run(), by_number)
    assert torch.equal(run(step_size=f"{share} eps"), by_number)
    assert torch.equal(run(step_size=f"{share / 2}/4"), by_number)
    assert not torch.equal(run(step_size="eps/16"), by_number)


@pytest.mark.parametrize(
    ("text", "share"),
    [("eps", 1), ("eps/4", 0.25), ("1.25 eps", 1.25), ("1.25*eps", 1.25), ("2.5 eps / 20", 0.125)],
)
def test_a_multiple_of_eps_follows_the_ball(text, share):
    assert OfEps(text).share == share
    attack = build_attack({"step_size": text, "threat_model": {"norm": "linf", "eps": "8/255"}})
    assert attack.step == pytest.approx(share * 8 / 255, rel=1e-12)
    made = type(attack)(step_size=text, threat=ThreatModel("l2", 0.5), eps_warmup=0.5)
    assert made.step == pytest.approx(share * 0.5, rel=1e-12)
    halfway = made.at(0.25)
    assert halfway.ball.eps == 0.25
    assert halfway.step == pytest.approx(share * 0.25, rel=1e-12)


@pytest.mark.parametrize("text", ["eps/0", "-eps", "epsilon", "eps eps", "eps*", "1.2.3 eps"])
def test_what_is_no_multiple_of_eps_is_refused(text):
    with pytest.raises(ValueError, match="is not a multiple of eps: write 'eps/4'"):
        OfEps(text)


# ---- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "pdg", "threat_model": ThreatModel("l2", 1)},
            r"attack\.name='pdg' is not valid \(did you mean 'pgd'\?\)\. Write one of 'pgd', 'fg",
        ),
        ({"name": "pgd"}, r"threat_model is missing: give \{'norm': 'linf', 'eps': '8/255'\}"),
        ({"threat_model": {"nrom": "l2"}}, r"unknown keys \['nrom'\] and lacks \['eps', 'norm'\]"),
        ({"threat_model": {"norm": "linf", "eps": None}}, r"None is not a length"),
        ({"threat_model": {"norm": "linf", "eps": 8}}, r"write '8/255'"),
        (
            {"threat_model": ThreatModel("l2", 1), "stpes": 3},
            r"attack\.stpes \(did you mean 'steps'\?\)\. Valid keys of the attack 'pgd': ",
        ),
        (
            {"threat_model": ThreatModel("l2", 1), "generator": 3},
            r"Unknown key in the run config: attack\.generator",
        ),
        (
            {"name": "fgsm", "threat_model": ThreatModel("l2", 1), "steps": 2},
            r"attack\.steps=2 is not a setting of the attack 'fgsm': remove it",
        ),
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
