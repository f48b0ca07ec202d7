"""Free adversarial training equals plain PyTorch, replay for replay, under every ZeRO stage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from dat_ds.attacks import SampleGenerator, ThreatModel
from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import weights_of

RANKS, MICRO_BATCH, REPLAYS, EPS, STEP_SIZE, LR, MOMENTUM = 2, 4, 3, 0.1, 0.06, 0.1, 0.9
NUM_IMAGES = 2 * RANKS * MICRO_BATCH  # two global batches
CASES = list(itertools.product(["linf", "l2"], [0, 1, 2, 3]))


def data() -> TensorDataset:
    return TensorDataset(*tiny.images(NUM_IMAGES))


def config_of(norm: str, stage: int) -> dict[str, Any]:
    return tiny.config(
        stage,
        dat={
            "threat_model": {"norm": norm, "eps": EPS},
            "attack": {"name": "free", "replays": REPLAYS, "step_size": STEP_SIZE},
            "schedule": {"name": "constant", "epochs": 2},
        },
    )


def train(norm: str, stage: int) -> dict[str, Any]:
    import dat_ds

    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.vit(), config=config_of(norm, stage), training_data=data()
    )
    order, reductions = [], []
    for _ in range(2):
        for x, y in loader:
            order.append(list(loader.plan.indices))
            engine.backward(engine(x, y))
            engine.step()
            reductions.append(engine.metrics["attack_nonfinite_share"])
    state = weights_of(engine)
    collectives = engine.collectives
    engine.close()
    return {"weights": state, "order": order, "collectives": collectives, "bad": reductions}


def train_in_whole_steps(norm: str, stage: int) -> dict[str, Any]:
    """The same by ``train_step``; and what a checkpoint of before ``train_step`` gives back."""
    import dat_ds
    from dat_ds.engine.rank_state import rank_state, restore_rank_state

    config = config_of(norm, stage)
    engine, _, loader, _ = dat_ds.initialize(model=tiny.vit(), config=config, training_data=data())
    for _ in range(2):
        for batches in loader.steps():
            engine.train_step(batches)
    carried = engine.inner.strategy.state_dict()
    thrown_away = engine.attack(*tiny.images(MICRO_BATCH))
    state, weights = rank_state(engine), weights_of(engine)
    engine.close()
    state["free"] = state.pop("strategy")
    again, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    restore_rank_state(state, again)
    found = again.inner.strategy.state_dict()
    again.close()
    same = [torch.equal(carried[slot], delta) for slot, delta in found.items()]
    return {"weights": weights, "same": same, "needs gradient": thrown_away.requires_grad}


def everything() -> list[dict[str, Any]]:
    return [*(train(*case) for case in CASES), train_in_whole_steps("linf", 2)]


@pytest.fixture(scope="module")
def outcomes() -> list[list[dict[str, Any]]]:
    return run_ranks(everything, RANKS)


def plain(norm: str, orders: list[list[list[int]]]) -> dict[str, Tensor]:
    """Algorithm 1 on the concatenated batch, with the engine's first perturbation."""
    model, threat = tiny.vit(), ThreatModel(norm, EPS)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    delta: list[Tensor | None] = [None] * RANKS
    for step in range(len(orders[0])):
        optimizer.zero_grad()
        for rank in range(RANKS):
            x, y = data()[orders[rank][step]]
            if delta[rank] is None:
                generator = SampleGenerator(0, 0, rank * MICRO_BATCH)
                delta[rank] = threat.random_start(x, generator) - x
            x_adv = threat.project(x + delta[rank], x).requires_grad_()
            (F.cross_entropy(model(x_adv), y) / RANKS).backward()
            g = x_adv.grad
            unit = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta[rank] = threat.project(x_adv.detach() + STEP_SIZE * unit, x) - x
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("stage", range(4))
def test_it_equals_plain_pytorch(
    outcomes: list[list[dict[str, Any]]], norm: str, stage: int
) -> None:
    case = CASES.index((norm, stage))
    found = outcomes[0][case]["weights"]
    expected = plain(norm, [rank[case]["order"] for rank in outcomes])
    start = tiny.vit().state_dict()
    assert max(float((expected[k] - start[k]).abs().max()) for k in expected) > 1e-2
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5)


def test_each_batch_comes_replays_times_in_a_row(outcomes: list[list[dict[str, Any]]]) -> None:
    order = outcomes[0][0]["order"]
    assert len(order) == 2 * 2 * REPLAYS
    runs = [len(list(group)) for _, group in itertools.groupby(order)]
    assert runs == [REPLAYS] * 4


def test_a_step_costs_one_reduction_and_no_attack_passes(
    outcomes: list[list[dict[str, Any]]],
) -> None:
    for outcome, (_, stage) in zip(outcomes[0], CASES, strict=False):
        assert outcome["bad"] == [0.0] * 12
        if stage == 0:
            assert outcome["collectives"].get("gradients") == 1


def test_whole_steps_are_the_same_and_older_checkpoints_go_on(
    outcomes: list[list[dict[str, Any]]],
) -> None:
    for found in outcomes:
        whole = found[len(CASES)]
        expected = found[CASES.index(("linf", 2))]["weights"]
        assert all(torch.equal(whole["weights"][k], w) for k, w in expected.items())
        assert whole["same"] == [True]
        assert not whole["needs gradient"]
