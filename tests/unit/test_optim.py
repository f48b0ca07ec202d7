"""Claims about schedules, weight averages and parameter groups."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dat_ds.config import load_config
from dat_ds.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Constant,
    Cosine,
    Lamb,
    Lars,
    Linear,
    Schedule,
    Step,
    WeightEma,
    build_optimizer,
    lr_scale,
    parameter_groups,
    usual_scaling,
)

pytestmark = pytest.mark.fast

# ---- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_linearly_to_the_peak_and_the_step_after_it_is_at_the_peak(name):
    schedule = Schedule(SCHEDULES[name](), total_steps=100, warmup_steps=4)
    assert [schedule.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_constant_schedule_stays_at_the_peak():
    assert {Schedule(Constant(), 10).factor(step) for step in range(20)} == {1.0}


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (10, 0.1)])
def test_the_cosine_goes_from_the_peak_through_the_middle_to_the_final_ratio(warmup, final):
    schedule = Schedule(Cosine(final_ratio=final), 110, warmup_steps=warmup)
    span = 110 - warmup
    assert schedule.factor(warmup) == 1.0
    assert schedule.factor(110) == pytest.approx(final, abs=1e-15)
    assert schedule.factor(500) == schedule.factor(110)
    for step in (warmup + span // 4, warmup + span // 2, 109):
        progress = (step - warmup) / span
        expected = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        assert schedule.factor(step) == pytest.approx(expected, rel=1e-12)
    assert schedule.factor(warmup + span // 2) == pytest.approx((1 + final) / 2, rel=1e-12)
    factors = [schedule.factor(step) for step in range(warmup, 111)]
    assert factors == sorted(factors, reverse=True)


def test_a_line_after_a_warm_up_is_the_triangle_of_cyclic_rates():
    schedule = Schedule(Linear(final_ratio=0.1), 100, warmup_steps=40)
    # The warm-up reaches the peak in its last step, so the way down starts one step later.
    expected = np.interp(range(40, 101), [40, 100], [1, 0.1])
    assert [schedule.factor(step) for step in range(40, 101)] == pytest.approx(expected, rel=1e-12)
    assert schedule.factor(500) == pytest.approx(0.1, rel=1e-12)


def test_the_step_schedule_drops_at_each_milestone():
    schedule = Schedule(Step(milestones=[0.5, 0.75], decay_factor=0.1), 100)
    factors = [schedule.factor(step) for step in (0, 49, 50, 74, 75, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)


def test_the_linear_schedule_is_a_triangle_after_a_warm_up():
    schedule = Schedule(Linear(), 10, warmup_steps=4)
    factors = [schedule.factor(step) for step in range(10)]
    rising, falling = [1 / 4, 2 / 4, 3 / 4, 1], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors == pytest.approx([*rising, *falling], rel=1e-12)
    ends = Schedule(Linear(final_ratio=0.1), 10)
    assert [ends.factor(0), ends.factor(5), ends.factor(10)] == pytest.approx([1, 0.55, 0.1])


@pytest.mark.parametrize("total", [100, 1000, 20 * 391])
def test_every_milestone_of_whole_steps_drops_in_exactly_that_step(total):
    # 0.55 * 100 is 55.00000000000001 in floating point.
    for percent in range(5, 100, 5):
        schedule = Schedule(Step(milestones=[percent / 100]), total)
        step = percent * total // 100
        assert (schedule.factor(step - 1), schedule.factor(step)) == (1.0, 0.1), percent


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_is_made_at_the_peak(name):
    assert Schedule(SCHEDULES[name](), total_steps=1).factor(0) == 1.0


def test_an_unknown_schedule_is_refused():
    words = r"dat\.schedule\.name='cosin' is not valid \(did you mean 'cosine'\?\)\. Write one of "
    with pytest.raises(ValueError, match=words + "'cosine', 'constant', 'linear', 'step'"):
        load_config({"optimizer": {"type": "AdamW"}, "dat": {"schedule": {"name": "cosin"}}})


def test_the_torch_scheduler_sets_the_factor_of_every_step_and_group():
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule(Cosine(), 6, warmup_steps=2)
    scheduler = schedule.scheduler(optimizer)
    for step in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        expected = [0.5 * schedule.factor(step), 0.1 * schedule.factor(step)]
        assert rates == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()


# ---- scaling to the global batch


def test_the_learning_rate_scales_with_the_batch_or_its_root():
    assert lr_scale("linear", 1024, 256) == 4.0
    assert lr_scale("sqrt", 1024, 256) == 2.0
    assert lr_scale("linear", 64, 256) == 0.25
    assert lr_scale("sqrt", 64, 256) == 0.5
    with pytest.raises(ValueError, match="scaling='log' is not one of linear, sqrt"):
        lr_scale("log", 1, 1)


def test_every_optimizer_of_ours_has_a_usual_scaling():
    rules = {name: usual_scaling(name) for name in OPTIMIZERS}
    assert None not in rules.values()
    assert (rules["sgd"], rules["lars"], rules["adamw"], rules["lamb"]) == (
        "linear",
        "linear",
        "sqrt",
        "sqrt",
    )
    assert [usual_scaling(n) for n in ("OneBitAdam", "SGD", "Muon")] == ["sqrt", "linear", None]


# ---- weight averages


def weights(*values: float, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2, 3), value, dtype=dtype)) for value in values]


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_follows_its_recursion_with_the_warmed_up_decay(decay):
    (w,) = weights(1.0)
    ema, expected = WeightEma(lambda: [w], decay), 1.0
    for t in range(5):
        with torch.no_grad():
            w.fill_(float(t * t))
        ema.update()
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * t * t
        with ema.swapped_in():
            assert_close(w.detach(), torch.full((2, 3), expected), rtol=1e-6, atol=1e-6)
    assert ema.num_updates == 5


def test_the_average_of_constant_weights_is_those_weights():
    parameters = weights(0.7, -3.0)
    ema = WeightEma(lambda: parameters, 0.9)
    before = [p.detach().clone() for p in parameters]
    for _ in range(10):
        ema.update()
    with ema.swapped_in():
        for p, value in zip(parameters, before, strict=True):
            assert torch.equal(p.detach(), value)


def test_swapping_in_restores_the_weights_bit_for_bit_even_after_an_exception():
    parameters = weights(1 / 3, dtype=torch.bfloat16) + weights(math.pi)
    ema = WeightEma(lambda: parameters, 0.9)
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.37)
    ema.update()
    before = [p.detach().clone() for p in parameters]
    pointers = [p.data_ptr() for p in parameters]
    with contextlib.suppress(ZeroDivisionError), ema.swapped_in():
        assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert [p.data_ptr() for p in parameters] == pointers
    assert all(p.requires_grad and p.grad is None for p in parameters)


def test_averages_are_kept_in_float32_for_16_bit_weights():
    (w,) = weights(1.0, dtype=torch.bfloat16)
    ema = WeightEma(lambda: [w], 0.999)
    with torch.no_grad():
        w.fill_(1.0078125)  # the next bfloat16
    for _ in range(3):
        ema.update()
    (average,) = ema.state_dict()["averages"]
    assert average.dtype == torch.float32
    # Left of the distance after decays 1/10, 2/11, 3/12: 1/220.
    assert_close(average, torch.full((2, 3), 1.0078125 - 0.0078125 / 220), rtol=0, atol=2e-7)


def test_the_state_makes_another_average_go_on_exactly_where_this_one_stopped():
    (w,) = weights(1.0)
    ema = WeightEma(lambda: [w], 0.9)
    for value in (2.0, 5.0):
        with torch.no_grad():
            w.fill_(value)
        ema.update()
    other = WeightEma(lambda: [w], 0.9)
    other.load_state_dict(ema.state_dict())
    with torch.no_grad():
        w.fill_(-1.0)
    for average in (ema, other):
        average.update()
    assert other.num_updates == ema.num_updates == 3
    assert torch.equal(*(e.state_dict()["averages"][0] for e in (ema, other)))


def test_loading_a_state_of_other_weights_fails():
    first, second = WeightEma(lambda: weights(1.0), 0.9), WeightEma(lambda: weights(1.0, 2.0), 0.9)
    with pytest.raises(ValueError, match="shorter"):
        second.load_state_dict(first.state_dict())


def test_a_rank_without_weights_has_nothing_to_average():
    ema = WeightEma(lambda: [], 0.9)
    ema.update()
    with ema.swapped_in():
        pass
    assert ema.state_dict() == {"num_updates": 1, "averages": []}


# ---- parameter groups and optimizers


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_matrices_decay_and_vectors_do_not_and_nothing_is_lost():
    network = model()
    decayed, plain = parameter_groups(network, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in plain["params"]} == {1}
    grouped = [id(p) for p in [*decayed["params"], *plain["params"]]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


def test_frozen_parameters_and_empty_groups_are_left_out():
    network = model()
    network[0].requires_grad_(False)
    network[3].weight.requires_grad_(False)
    (only,) = parameter_groups(network, 0.05)
    assert only["weight_decay"] == 0.0
    assert {id(p) for p in only["params"]} == {
        id(p) for p in (network[1].weight, network[1].bias, network[3].bias)
    }


def test_the_optimizer_is_torchs_with_the_configs_numbers():
    adamw = build_optimizer(
        model(),
        {"name": "adamw", "lr": 0.1, "weight_decay": 0.2, "betas": [0.5, 0.6], "eps": 1e-3},
    )
    assert isinstance(adamw, torch.optim.AdamW)
    for group, decay in zip(adamw.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.5, 0.6), 1e-3)
        assert group["weight_decay"] == decay
    sgd = build_optimizer(
        model(),
        {"name": "sgd", "lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True},
    )
    assert isinstance(sgd, torch.optim.SGD)
    for group, decay in zip(sgd.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, True)
        assert group["weight_decay"] == decay


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("lars", Lars)])
def test_presets_decide_what_is_left_out_and_whether_vectors_are_adapted(name, kind):
    method = OPTIMIZERS[name]
    for preset in method.presets:
        optimizer = build_optimizer(model(), {"name": name, "preset": preset, "momentum": None})
        assert isinstance(optimizer, kind)
        matrices, vectors = optimizer.param_groups
        written = method(preset=preset, **method.presets[preset]).to_dict()
        assert (matrices["adapt"], vectors["adapt"]) == (True, written["adapt_vectors"])
        assert written["adapt_vectors"] is (preset == "paper")
        assert vectors["weight_decay"] == 0.0
        for key in written.keys() - {"name", "preset", "adapt_vectors", "betas"}:
            assert matrices[key] == written[key], key
    assert method() == method(preset="modern", **method.presets["modern"])
    own = {"name": name, "preset": "paper", "upper": 3.0, "adapt_vectors": False}
    matrices, vectors = build_optimizer(model(), own).param_groups
    assert (matrices["upper"], vectors["adapt"]) == (3.0, False)


def test_a_key_that_is_left_out_or_none_has_the_optimizers_default():
    optimizer = build_optimizer(model(), {"name": "sgd", "lr": None, "momentum": 0.5})
    (decayed, plain) = optimizer.param_groups
    assert (decayed["lr"], decayed["momentum"], decayed["weight_decay"]) == (0.1, 0.5, 5e-4)
    assert plain["weight_decay"] == 0.0


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(
        ValueError, match=r"optimizer\.name='adma' is not valid \(.*'adamw', 'sgd', 'lamb"
    ):
        build_optimizer(model(), {"name": "adma", "lr": 0.1, "weight_decay": 0.0})


def test_an_option_that_the_optimizer_does_not_take_is_refused():
    with pytest.raises(
        ValueError,
        match=r"optimizer\.betas=.* is not a setting of the optimizer 'sgd': remove it",
    ):
        build_optimizer(model(), {"name": "sgd", "betas": [0.9, 0.999]})
