"""ZeRO is invisible: the engine equals plain single-process PyTorch, written out below by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.harness import run_ranks

STEPS, MICRO_BATCH, LR, MOMENTUM = 3, 4, 0.1, 0.9
EPS, STEP_SIZE, ATTACK_STEPS, SEED = 0.1, 0.04, 3, 0
CASES = list(itertools.product(["vit", "cnn"], [0, 1, 2, 3], [1, 2], [0.0, 1.0]))


def weights_of(engine: Any) -> dict[str, Tensor]:
    from dat_ds.engine import hooks

    return hooks.full_state_dict(engine.deepspeed)


def train_with_engine(name: str, stage: int, accumulation: int, natural_weight: float) -> Any:
    import dat_ds

    config = tiny.config(
        stage,
        gradient_accumulation_steps=accumulation,
        dat={"objective": {"natural_weight": natural_weight}},
    )
    engine, *_ = dat_ds.initialize(model=tiny.MODELS[name](), config=config)
    slots = accumulation * engine.ranks.count
    x, y = tiny.images(STEPS * slots * MICRO_BATCH)
    batches = list(zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True))
    for step in range(STEPS):
        for micro in range(accumulation):
            slot = step * slots + micro * engine.ranks.count + engine.ranks.rank
            loss = engine(*batches[slot])
            engine.backward(loss)
            engine.step()
    state = weights_of(engine)
    engine.close()
    return state


def train_cases() -> list[Any]:
    return [train_with_engine(*case) for case in CASES]


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    model.eval()
    x_adv = (x + noise).clamp(0, 1)
    for _ in range(ATTACK_STEPS):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPS), x + EPS), 0, 1)
    model.train()
    return x_adv


def plain_training(
    name: str, ranks: int, accumulation: int, natural_weight: float
) -> dict[str, Tensor]:
    """One process, one model; BatchNorm statistics are kept per rank, as every rank does."""
    from dat_ds.attacks import SampleGenerator
    from dat_ds.attacks.noise import rand_like

    model = tiny.MODELS[name]()
    buffers = [copy.deepcopy(dict(model.named_buffers())) for _ in range(ranks)]
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    slots = accumulation * ranks
    x_all, y_all = tiny.images(STEPS * slots * MICRO_BATCH)
    for step in range(STEPS):
        gradients = [torch.zeros_like(p) for p in model.parameters()]
        for slot in range(slots):
            rank, first = slot % ranks, (step * slots + slot) * MICRO_BATCH
            x, y = x_all[first : first + MICRO_BATCH], y_all[first : first + MICRO_BATCH]
            model.load_state_dict(buffers[rank], strict=False)
            noise = rand_like(x, SampleGenerator(SEED, step, slot * MICRO_BATCH))
            x_adv = plain_pgd(model, x, y, noise * 2 * EPS - EPS)
            if natural_weight:
                logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)
                loss = natural_weight * F.cross_entropy(logits, y) + F.cross_entropy(logits_adv, y)
            else:
                loss = F.cross_entropy(model(x_adv), y)
            for total, g in zip(
                gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                total += g / slots
            buffers[rank] = {k: v.clone() for k, v in model.named_buffers()}
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    model.load_state_dict(buffers[0], strict=False)
    return model.state_dict()


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def trained(request: pytest.FixtureRequest) -> tuple[int, list[Any]]:
    return request.param, run_ranks(train_cases, request.param)[0]


def test_three_steps_equal_plain_pytorch(trained: tuple[int, list[Any]]) -> None:
    ranks, states = trained
    errors = {}
    for case, state in zip(CASES, states, strict=True):
        name, _, accumulation, natural_weight = case
        reference = plain_training(name, ranks, accumulation, natural_weight)
        assert state.keys() == reference.keys()
        errors[case] = max(
            (state[key].double() - reference[key].double()).abs().max().item() for key in reference
        )
    assert max(errors.values()) <= 1e-6, errors


def test_training_moves_the_weights() -> None:
    start, end = tiny.vit().state_dict(), plain_training("vit", 1, 1, 0.0)
    assert max((start[k] - end[k]).abs().max().item() for k in start) > 1e-3
