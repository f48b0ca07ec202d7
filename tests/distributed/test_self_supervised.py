"""Self-supervised training on two ranks: parity with plain PyTorch, cost, precisions, resume."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.attacks import SampleGenerator
from dat_ds.data import BatchPlan
from dat_ds.objectives import build_objective
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks
from tests.distributed.test_every_combination import train_and_resume, weights_of

RANKS, MICRO_BATCH, ACCUMULATION = 2, 3, 2
STAGES = [0, 1, 2, 3]
NAMES = ["rotation", "contrastive", "fare"]
PRECISIONS = [
    (name, precision, stage)
    for name, precision, stage in itertools.product(NAMES, ["bf16", "autocast", "fp16"], (2, 3))
]
# Images of each rank in each micro-step: full batches, then what an epoch's end may leave.
STEPS = [[(3, 3), (3, 3)], [(3, 3), (3, 3)], [(2, 1), (2, 0)]]


def settings(name: str, stage: int, **sections: Any) -> dict[str, Any]:
    attack = {"steps": 3, "step_size": 0.04}
    dat = {"objective": {"name": name}, "attack": attack, **sections.pop("dat", {})}
    return tiny.config(stage, dat=dat, **sections)


def plans(step: list[tuple[int, int]]) -> list[tuple[int, list[tuple[int, float]]]]:
    """Of each micro-step: its first image, and each rank's number of images and weight."""
    total = sum(map(sum, step))
    first, found = 0, []
    for counts in step:
        weights = [(n, n * RANKS * ACCUMULATION / total) for n in counts]
        found.append((first, weights))
        first += sum(counts)
    return found


def natural_contrastive(stage: int) -> dict[str, Tensor]:
    import dat_ds

    config = settings(
        "contrastive",
        stage,
        dat={"attack": {"name": "none"}},
        train_micro_batch_size_per_gpu=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
    )
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    rank = engine.ranks.rank
    for number, step in enumerate(STEPS):
        x, y = tiny.images(sum(map(sum, step)), seed=number)
        for micro_step, (first, parts) in enumerate(plans(step)):
            first += sum(n for n, _ in parts[:rank])
            count, weight = parts[rank]
            indices = tuple(range(first, first + count))
            plan = BatchPlan(0, number, micro_step, indices, first, weight)
            engine.backward(engine(x[list(indices)], y[list(indices)], plan=plan))
            engine.step()
    weights = weights_of(engine)
    engine.close()
    return weights


def plain_contrastive() -> dict[str, Tensor]:
    model = tiny.vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = build_objective({"name": "contrastive"})
    for number, step in enumerate(STEPS):
        total = sum(map(sum, step))
        x, y = tiny.images(total, seed=number)
        for first, parts in plans(step):
            last = first + sum(n for n, _ in parts)
            generator = SampleGenerator(0, number, first, stream="views")
            views, _ = objective.inputs(x[first:last], y[first:last], generator=generator)
            z = F.normalize(model(views), dim=1)
            s = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
            loss = F.cross_entropy(s, torch.arange(len(z)) ^ 1)
            (loss * (last - first) / total).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def attack_once(name: str) -> dict[str, Any]:
    """What the attack of one engine call did: forwards, traffic, and to the loss."""
    import dat_ds

    torch.manual_seed(0)
    # An untrained transformer's outputs hardly differ between images.
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4))
    engine, *_ = dat_ds.initialize(model=model, config=settings(name, 2))
    x, y = tiny.images(4, seed=engine.ranks.rank)
    part = engine.micro_batch(x, y)
    images, target = part.x, part.y
    loss = engine.attack_in_use.own_options()["loss"]
    loss = nn.CrossEntropyLoss(reduction="none") if isinstance(loss, str) else loss
    calls: list[int] = []
    hook = engine.module.register_forward_hook(lambda *_: calls.append(1))
    with engine.traffic.counting("features"):
        x_adv = engine.attack(images, target)
    in_attack, collectives = len(calls), dict(engine.traffic.take()[1])
    with torch.no_grad(), engine.frozen() as frozen:
        before, after = (loss(frozen(z), target).mean().item() for z in (images, x_adv))
    calls.clear()
    engine.backward(engine(x, y))
    engine.step()
    hook.remove()
    found = {
        "forwards": (in_attack, len(calls)),
        "collectives": collectives,
        "losses": (before, after),
        "bytes": engine.metrics["bytes_sent"],
        "metrics": {k: engine.metrics[k] for k in ("natural_acc", "robust_acc")},
    }
    engine.close()
    return found


def original_weights() -> bool:
    """Whether every rank measures against rank 0's model, whatever its own was."""
    import dat_ds
    from dat_ds.engine.launch import setup_ranks

    model = tiny.vit(seed=setup_ranks().rank)
    engine, *_ = dat_ds.initialize(model=model, config=settings("fare", 3))
    reference = engine.reference.state_dict()
    same = all(torch.equal(reference[k], v) for k, v in tiny.vit(seed=0).state_dict().items())
    engine.close()
    return same


def every_case(folder: str) -> dict[Any, Any]:
    allow_fp16()
    found: dict[Any, Any] = {stage: natural_contrastive(stage) for stage in STAGES}
    found |= {name: attack_once(name) for name in NAMES}
    found["original"] = original_weights()
    for case in PRECISIONS:
        name, precision, stage = case
        sections = dict(tiny.PRECISIONS[precision])
        if precision == "fp16":
            sections["fp16"] = {"enabled": True, "initial_scale_power": 8}  # no step is skipped
        config = settings(name, stage, **sections)
        found[case] = train_and_resume(config, "vit", Path(folder) / "-".join(map(str, case)))
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(every_case, RANKS, folder)


@pytest.mark.parametrize("stage", STAGES)
def test_contrastive_on_two_ranks_equals_plain_pytorch_on_the_whole_batch(
    outcomes: list[dict[Any, Any]], stage: int
) -> None:
    weights, plain = outcomes[0][stage], plain_contrastive()
    start = tiny.vit().state_dict()
    assert max(float((plain[k] - start[k]).abs().max()) for k in plain) > 0.01
    for name, value in plain.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_of_three_steps_is_three_forwards_and_no_message(
    outcomes: list[dict[Any, Any]], name: str
) -> None:
    for outcome in outcomes:
        assert outcome[name]["forwards"] == (3, 4)  # alone, and with the outer forward
        assert outcome[name]["collectives"] == {}
        before, after = outcome[name]["losses"]
        assert after > before + 1e-3


def test_features_are_counted_as_their_own_kind(outcomes: list[dict[Any, Any]]) -> None:
    assert outcomes[0]["contrastive"]["bytes"]["features"] > 0
    assert outcomes[0]["fare"]["bytes"].get("features", 0) == 0


def test_accuracies_are_told_where_they_mean_something(outcomes: list[dict[Any, Any]]) -> None:
    assert 0 <= outcomes[0]["rotation"]["metrics"]["robust_acc"] <= 1
    for name in ("contrastive", "fare"):
        assert set(outcomes[0][name]["metrics"].values()) == {None}


def test_features_stay_close_to_those_of_rank_0s_model(outcomes: list[dict[Any, Any]]) -> None:
    assert all(outcome["original"] for outcome in outcomes)


@pytest.mark.parametrize("case", PRECISIONS, ids=["-".join(map(str, case)) for case in PRECISIONS])
def test_16_bit_runs_train_and_resume_bit_for_bit(
    outcomes: list[dict[Any, Any]], case: tuple[str, str, int]
) -> None:
    outcome = outcomes[0][case]
    assert outcome["finite"]
    assert outcome["same"]
    assert outcome["losses"][0] == outcome["losses"][1]
    assert outcome["moved"] > 0
