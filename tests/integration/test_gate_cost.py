"""Claim: checking every batch costs at most 1 % of a training step.

``python -m tests.integration.test_gate_cost`` prints both times, measured alternately.
"""

from __future__ import annotations

import time

import timm
import torch

import dat_ds
from dat_ds.engine import AdversarialEngine
from dat_ds.minmax import Moment
from tests.distributed import tiny

BATCH, SIDE, ROUNDS = 64, 8, 12


def seconds_of_step_and_check() -> tuple[float, float]:
    """The shortest of several rounds each, of the main job's network and batch."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIDE,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=tiny.CLASSES,
    )
    config = tiny.config(0, train_micro_batch_size_per_gpu=BATCH)
    engine: AdversarialEngine = dat_ds.initialize(model=model, config=config)[0]
    x, y = tiny.images(BATCH)
    reader, moment = engine._reader, Moment(seed=0, step=0)  # one part of a step, timed alone
    steps, checks = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        middle = time.perf_counter()
        for _ in range(20):
            reader.check(x, y, moment)
        steps.append(middle - begin)
        checks.append((time.perf_counter() - middle) / 20)
    engine.close()
    return min(steps), min(checks)


def test_checking_a_batch_costs_at_most_a_hundredth_of_a_step():
    step, check = seconds_of_step_and_check()
    assert check <= 0.01 * step


if __name__ == "__main__":
    step, check = seconds_of_step_and_check()
    print(f"step {1e3 * step:.2f} ms, check {1e6 * check:.0f} us: {check / step:.2%} of the step")
