"""1-bit Adam, 1-bit LAMB and 0/1 Adam in the engine: equal on ranks, few bytes, exact resume."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks
from tests.parity.record_one_bit_reference import CASES, RECORD, RECORDED_EVERY, train_ours

RANKS, BATCH, FREEZE, STEPS, SAVED = 2, 4, 3, 10, 7
LR, DECAY = 0.01, 0.01
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "OneBitAdam": {"freeze_step": FREEZE},
    "OneBitLamb": {"freeze_step": FREEZE},
    # Ranks agree after steps 4, 5, 6, 8 and 12: the state is saved, and the run ends, in between.
    "ZeroOneAdam": {"var_freeze_step": FREEZE, "local_step_scaler": 2, "local_step_clipper": 4},
}
AGREED = {"ZeroOneAdam": (4, 5, 6, 8)}
PRECISIONS: dict[str, dict[str, Any]] = {
    **{name: tiny.PRECISIONS[name] for name in ("float32", "bf16", "autocast")},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "awp": {"dat": {"weight_perturbation": {"name": "awp", "scope": "local"}}},
    "accumulated and clipped": {"gradient_accumulation_steps": 2, "gradient_clipping": 0.1},
}
RUNS = list(itertools.product(OPTIMIZERS, PRECISIONS))


def section(name: str, **params: Any) -> dict[str, Any]:
    params = {"lr": LR, "weight_decay": DECAY, **OPTIMIZERS.get(name, {}), **params}
    return {"optimizer": {"type": name, "params": params}}


def start(seed: int = 0, **sections: Any) -> Any:
    import dat_ds

    return dat_ds.initialize(model=tiny.vit(seed), config=tiny.config(0, **sections))[0]


def step_on(engine: Any, step: int, *, factor: float = 1.0) -> None:
    for micro in range(engine.accumulation):
        slot = (step * engine.accumulation + micro) * engine.ranks.count + engine.ranks.rank
        loss = engine(*tiny.images(BATCH, seed=slot))
        engine.backward(loss * factor)
        engine.step()


def weights_of(engine: Any) -> Tensor:
    from dat_ds.engine import hooks

    held = hooks.held_weights(engine.deepspeed)
    return torch.cat([w.detach().reshape(-1).clone() for w in held])


def train_and_resume(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """A run past the freeze, and its end again in a new engine that loads what was saved."""

    def averages_of(engine: Any) -> list[Tensor]:
        return [average.clone() for average in engine.ema.state_dict()["averages"]]

    sections = {**section(name), **PRECISIONS[precision]}
    sections["dat"] = {**sections.get("dat", {}), "ema": {"decay": 0.5}}
    engine = start(**sections)
    weights, sent, reduces = [weights_of(engine)], [], []
    for step in range(STEPS):
        if step == SAVED:
            engine.save_checkpoint(folder)
        step_on(engine, step)
        weights.append(weights_of(engine))
        sent.append(dict(engine.metrics["bytes_sent"]))
        reduces.append(engine.deepspeed.enable_backward_allreduce)
    # In a new engine, and in the used one, as the guard's roll-back does.
    resumed = {"new": start(seed=1, **sections), "used": engine}
    ends, averages = {}, [averages_of(engine)]
    for place, again in resumed.items():
        again.load_checkpoint(folder)
        for step in range(SAVED, STEPS):
            step_on(again, step)
        ends[place] = weights_of(again)
        averages.append(averages_of(again))
    report = {
        "weights": weights,
        "sent": sent,
        "reduces": reduces,
        "ends": ends,
        "averages": averages,
        "skipped": engine.metrics["skipped_steps"],
        "events": engine.averaging_optimizer.events,
        "differ": engine.replicas_differ,
    }
    for again in resumed.values():
        again.close()
    return report


def train_adamw(steps: int) -> Tensor:
    params = {"lr": LR, "weight_decay": DECAY, "torch_adam": True}
    engine = start(optimizer={"type": "AdamW", "params": params})
    for step in range(steps):
        step_on(engine, step)
    end = weights_of(engine)
    engine.close()
    return end


def train_with_one_bad_gradient(name: str, precision: str, factor: float) -> dict[str, Any]:
    """The last rank's gradient is bad in a step before the freeze and in one after it."""
    params = {"local_step_clipper": 1} if name == "ZeroOneAdam" else {}
    engine = start(**section(name, **params), **PRECISIONS[precision])
    weights = [weights_of(engine)]
    for step in range(STEPS):
        is_bad = step in (1, SAVED) and engine.ranks.rank == engine.ranks.count - 1
        step_on(engine, step, factor=factor if is_bad else 1.0)
        weights.append(weights_of(engine))
    skipped = engine.metrics["skipped_steps"]
    engine.close()
    return {"weights": weights, "skipped": skipped}


class ExactMean:
    """In the place of the compressed exchange: the mean itself."""

    def __call__(self, flat: Tensor, step: int) -> Tensor:
        mean = flat.clone()
        dist.all_reduce(mean)
        return mean.div_(dist.get_world_size())


def train_without_quantisation() -> dict[str, Any]:
    """Uneven batches, which the engine weights, and an exact mean of momenta."""
    import dat_ds

    config = tiny.config(0, **section("OneBitAdam"), dat={"attack": {"name": "none"}})
    data = TensorDataset(*tiny.images(11))
    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.vit(), config={**config, "dat": config["dat"]}, training_data=data
    )
    engine.averaging_optimizer._exchange = ExactMean()
    batches = []
    for _ in range(4):
        for x, y in loader:
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            batches.append((x, y))
    report = {"batches": batches, "end": weights_of(engine)}
    engine.close()
    return report


def export_between_agreements() -> dict[str, Tensor]:
    """0/1 Adam's weights where replicas differ: its own, while exported, and afterwards."""
    import dat_ds
    from dat_ds.engine.exported import exported_weights

    schedule = {"name": "constant", "max_steps": STEPS}
    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.vit(),
        config=tiny.config(0, **section("ZeroOneAdam"), dat={"schedule": schedule}),
        training_data=TensorDataset(*tiny.images(RANKS * BATCH)),
    )
    for _ in range(SAVED):
        for x, y in loader:
            engine.backward(engine(x, y))
            engine.step()
    report = {"own": weights_of(engine)}
    with exported_weights(engine):
        report["exported"] = weights_of(engine)
    report["after"] = weights_of(engine)
    engine.close()
    return report


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    sizes = [3 * tiny.SIZE**2, 64, 64, tiny.CLASSES]
    layers = [nn.Flatten()]
    for width, next_width in itertools.pairwise(sizes):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def learnable(step: int) -> tuple[Tensor, Tensor]:
    """Images labelled by a linear teacher, this rank's share of a step."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.rand(16, 3, tiny.SIZE, tiny.SIZE, generator=generator)
    teacher = torch.randn(
        3 * tiny.SIZE**2, tiny.CLASSES, generator=torch.Generator().manual_seed(0)
    )
    return x, (x.flatten(1) @ teacher).argmax(dim=1)


def final_loss(model: nn.Module, build: Any, steps: int = 100) -> float:
    """Mean loss of the last 20 steps without an engine, learning from :func:`learnable`."""
    params, losses = list(model.parameters()), []
    optimizer = build(params)
    for step in range(steps):
        x, y = learnable(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if getattr(optimizer, "needs_averaged_gradients", True):
            for p in params:
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-20:]).mean())


def learn() -> dict[str, float]:
    from dat_ds.optim import OneBitAdam, OneBitLamb, ZeroOneAdam

    local = {"local_step_scaler": 20, "local_step_clipper": 4}
    theirs = {"preconditioned": False, "block_size": 0, "scale": "rms"}
    return {
        "vit, AdamW": final_loss(tiny.vit(), lambda p: torch.optim.AdamW(p, 0.003)),
        "vit, OneBitAdam": final_loss(tiny.vit(), lambda p: OneBitAdam(p, 0.003, 40)),
        "vit, LAMB": final_loss(tiny.vit(), lambda p: OneBitLamb(p, 0.02, 1000)),
        "vit, OneBitLamb": final_loss(tiny.vit(), lambda p: OneBitLamb(p, 0.02, 40)),
        "vit, ZeroOneAdam": final_loss(
            tiny.vit(), lambda p: ZeroOneAdam(p, 0.003, var_freeze_step=40, **local)
        ),
        "perceptron, AdamW": final_loss(perceptron(), lambda p: torch.optim.AdamW(p, 0.003)),
        "perceptron, early": final_loss(perceptron(), lambda p: OneBitAdam(p, 0.003, 5)),
        "perceptron, early, as DeepSpeed": final_loss(
            perceptron(), lambda p: OneBitAdam(p, 0.003, 5, **theirs)
        ),
    }


def freeze_by_the_rule() -> dict[str, Any]:
    engine = start(**section("OneBitAdam", freeze_step="auto", betas=[0.9, 0.9]))
    optimizer = engine.averaging_optimizer
    optimizer._stability.threshold = 0.5
    for step in range(20):
        step_on(engine, step)
    report = {"events": optimizer.events, "weights": weights_of(engine)}
    engine.close()
    return report


def on_two_ranks(folder: str) -> dict[Any, Any]:
    from dat_ds.engine.launch import setup_ranks

    setup_ranks()
    allow_fp16()
    reports: dict[Any, Any] = {
        run: train_and_resume(*run, Path(folder) / "-".join(run)) for run in RUNS
    }
    reports["AdamW"] = train_adamw(FREEZE)
    for name in OPTIMIZERS:
        reports["bad", name] = train_with_one_bad_gradient(name, "float32", math.nan)
    # Finite in bf16, but its norm is not in float32.
    reports["huge"] = train_with_one_bad_gradient("OneBitAdam", "bf16", 1e30)
    reports["exact"] = train_without_quantisation()
    reports["export"] = export_between_agreements()
    reports["rule"] = freeze_by_the_rule()
    reports["losses"] = learn()
    reports["reference"] = train_ours()
    return reports


@pytest.fixture(scope="module")
def by_rank() -> list[dict[Any, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(on_two_ranks, RANKS, folder)


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_replicas_are_equal_bit_for_bit(by_rank: list[dict[Any, Any]], run: Any) -> None:
    mine, other = (reports[run]["weights"] for reports in by_rank)
    equal = [step for step in range(STEPS + 1) if torch.equal(mine[step], other[step])]
    agreed = [s for s in range(STEPS + 1) if s <= FREEZE or s in AGREED.get(run[0], (s,))]
    assert equal == agreed
    moves = [float((b - a).float().abs().max()) for a, b in itertools.pairwise(mine)]
    assert min(moves) > 0
    assert all(bool(w.isfinite().all()) for w in mine)
    assert {r[run]["differ"] for r in by_rank} == {run[0] == "ZeroOneAdam"}


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_a_resume_past_the_freeze_is_bit_exact_on_every_rank(
    by_rank: list[dict[Any, Any]], run: Any
) -> None:
    for reports in by_rank:
        for end in reports[run]["ends"].values():
            assert torch.equal(end, reports[run]["weights"][-1])
        expected, *averages = reports[run]["averages"]
        for average in averages:
            assert all(torch.equal(a, b) for a, b in zip(average, expected, strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_gradients_travel_up_to_the_freeze_and_a_thirtieth_of_their_bytes_after_it(
    by_rank: list[dict[Any, Any]], run: Any
) -> None:
    report = by_rank[0][run]
    numel = report["weights"][0].numel()
    all_reduce = 2 * 4 * numel * (RANKS - 1) / RANKS
    assert report["reduces"] == [step < FREEZE for step in range(STEPS)]
    for step, sent in enumerate(report["sent"]):
        is_warm_up = step < FREEZE
        assert ("gradients" in sent) == is_warm_up
        if not is_warm_up and step > FREEZE:  # ranks compare their settings once
            assert sum(sent.values()) <= 0.035 * all_reduce
        if run[0] == "ZeroOneAdam" and not is_warm_up:
            assert ("momentum" in sent) == (step + 1 in AGREED["ZeroOneAdam"])
        elif not is_warm_up:
            assert sent["momentum"] > 0.03 * all_reduce


def test_before_the_freeze_the_engine_trains_as_with_adamw(by_rank: list[dict[Any, Any]]) -> None:
    reports = by_rank[0]
    for name in ("OneBitAdam", "ZeroOneAdam"):
        mine = reports[name, "float32"]["weights"]
        # Where a gradient is as small as eps, its rounding shows.
        assert (mine[FREEZE] - reports["AdamW"]).abs().max() < 0.01 * LR
        assert (mine[FREEZE] - mine[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_ranks_bad_gradient_is_skipped_by_all_and_poisons_nothing(
    by_rank: list[dict[Any, Any]], name: str
) -> None:
    mine, other = (reports["bad", name] for reports in by_rank)
    assert all(torch.equal(a, b) for a, b in zip(mine["weights"], other["weights"], strict=True))
    assert all(bool(w.isfinite().all()) for w in mine["weights"])
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(mine["weights"])]
    # (0/1 Adam's ranks step by themselves after the freeze: the other one's gradient counts.)
    stays = (1,) if name == "ZeroOneAdam" else (1, SAVED)
    assert moved == [step not in stays for step in range(STEPS)]
    assert other["skipped"] == 2
    assert mine["skipped"] == len(stays)


def test_one_ranks_huge_gradient_in_bf16_is_skipped_by_all(by_rank: list[dict[Any, Any]]) -> None:
    mine, other = (reports["huge"] for reports in by_rank)
    assert all(torch.equal(a, b) for a, b in zip(mine["weights"], other["weights"], strict=True))
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(mine["weights"])]
    assert moved == [step not in (1, SAVED) for step in range(STEPS)]
    assert mine["skipped"] == other["skipped"] == 2


def test_without_quantisation_it_is_preconditioned_momentum_of_the_global_batch(
    by_rank: list[dict[Any, Any]],
) -> None:
    mine, other = (reports["exact"] for reports in by_rank)
    assert torch.equal(mine["end"], other["end"])
    model = tiny.vit()
    params = list(model.parameters())
    adamw = torch.optim.AdamW(params, LR, weight_decay=DECAY)
    sizes = set()
    for step, pair in enumerate(zip(mine["batches"], other["batches"], strict=True)):
        x, y = (torch.cat(parts) for parts in zip(*pair, strict=True))
        sizes.add(tuple(len(y) for _, y in pair))
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        if step >= FREEZE:
            for p in params:  # makes torch's update keep the variance
                state = adamw.state[p]
                frozen = state.setdefault("frozen", state["exp_avg_sq"] / (1 - 0.999**FREEZE))
                state["exp_avg"].lerp_(p.grad, 0.1)
                corrected = state["exp_avg"] / (1 - 0.9 ** (step + 1))
                with torch.no_grad():
                    p.sub_(LR * (corrected / (frozen.sqrt() + 1e-8) + DECAY * p))
        else:
            adamw.step()
    assert len(sizes) > 1, "batches are uneven"
    end = torch.cat([p.detach().reshape(-1) for p in params])
    assert step > FREEZE
    # Where a gradient is as small as eps, its rounding shows.
    way = end - torch.cat([p.reshape(-1) for p in tiny.vit().parameters()]).detach()
    assert (mine["end"] - end).abs().max() < 0.1 * LR
    assert (mine["end"] - end).norm() < 1e-3 * way.norm()


def test_what_is_exported_of_replicas_that_differ_is_their_mean(
    by_rank: list[dict[Any, Any]],
) -> None:
    mine, other = (reports["export"] for reports in by_rank)
    assert not torch.equal(mine["own"], other["own"])
    assert torch.equal(mine["exported"], (mine["own"] + other["own"]) / 2)
    assert torch.equal(mine["exported"], other["exported"])
    assert torch.equal(mine["after"], mine["own"])


def test_a_stable_variance_is_frozen_by_the_rule_on_all_ranks_together(
    by_rank: list[dict[Any, Any]],
) -> None:
    mine, other = (reports["rule"] for reports in by_rank)
    (event,) = mine["events"]
    assert event["chosen_by"] == "rule"
    assert 10 < event["step"] < 20
    assert 0.5 <= event["stability"] <= 1
    assert mine["events"] == other["events"]
    assert torch.equal(mine["weights"], other["weights"])


def test_they_learn_what_adamw_and_lamb_learn_past_their_freeze(
    by_rank: list[dict[Any, Any]],
) -> None:
    losses = by_rank[0]["losses"]
    start_loss = math.log(tiny.CLASSES)
    for name in OPTIMIZERS:
        reference = losses["vit, LAMB" if name == "OneBitLamb" else "vit, AdamW"]
        assert reference < 0.65 * start_loss
        assert losses[f"vit, {name}"] < 1.1 * reference, name


def test_an_early_freeze_needs_the_preconditioned_momentum(by_rank: list[dict[Any, Any]]) -> None:
    losses = by_rank[0]["losses"]
    assert losses["perceptron, early"] < 1.25 * losses["perceptron, AdamW"]
    assert not losses["perceptron, early, as DeepSpeed"] < 10


@pytest.mark.parametrize("name", CASES)
def test_with_one_scale_they_follow_deepspeed_0_19_6_to_rounding(
    by_rank: list[dict[Any, Any]], name: str
) -> None:
    theirs = load_file(RECORD)[name]
    ours = by_rank[0]["reference"][name][::RECORDED_EVERY]
    assert (theirs[-1] - theirs[0]).abs().max() > 0.5
    assert (ours - theirs).abs().max() < 5e-6


def on_three_ranks(folder: str) -> dict[Any, Any]:
    return {name: train_and_resume(name, "float32", Path(folder) / name) for name in OPTIMIZERS}


def test_three_ranks_and_a_size_that_is_no_multiple_of_them_work_too() -> None:
    assert sum(p.numel() for p in tiny.vit().parameters()) % (3 * 8)
    with tempfile.TemporaryDirectory() as folder:
        by_rank = run_ranks(on_three_ranks, 3, folder)
    for name in OPTIMIZERS:
        first, *others = (reports[name] for reports in by_rank)
        agreed = max(s for s in range(STEPS + 1) if s in AGREED.get(name, (s,)))
        for other in others:
            assert torch.equal(first["weights"][agreed], other["weights"][agreed])
        for report in (first, *others):
            assert torch.equal(report["ends"]["new"], report["weights"][-1])
            assert bool(report["weights"][-1].isfinite().all())
