"""The exported weight average equals the closed form at every ZeRO stage, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.distributed import tiny
from tests.distributed.harness import run_ranks

DECAY, STEPS = 0.6, 4


def average_and_trace(stage: int, threshold: int) -> dict[str, Any]:
    import dat_ds
    from dat_ds.engine import hooks
    from dat_ds.engine.exported import exported_weights

    config = tiny.config(stage, dat={"ema": {"decay": DECAY}})
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    data = TensorDataset(*tiny.images(8 * STEPS))
    engine, _, loader, _ = dat_ds.initialize(model=tiny.vit(), config=config, training_data=data)
    assert loader is not None
    expected = {k: v.clone() for k, v in tiny.vit().state_dict().items()}
    errors, restored = [], []
    for step, (x, y) in enumerate(loader):
        engine.backward(engine(x, y))
        engine.step()
        before = hooks.full_state_dict(engine.deepspeed)
        decay = min(DECAY, (1 + step) / (10 + step))
        for key, value in before.items():
            expected[key] = decay * expected[key] + (1 - decay) * value
        with exported_weights(engine):
            exported = hooks.full_state_dict(engine.deepspeed)
            with engine.frozen() as model:  # what an evaluation sees
                logits = model(tiny.images(4)[0])
        reference = tiny.vit()
        if exported:  # the main rank holds the gathered state
            reference.load_state_dict(exported)
            logits_error = (reference.eval()(tiny.images(4)[0]) - logits).abs().max().item()
            errors.append(max((exported[k] - expected[k]).abs().max().item() for k in expected))
            errors.append(logits_error)
        after = hooks.full_state_dict(engine.deepspeed)
        restored.append(all(torch.equal(before[k], after[k]) for k in before))
    engine.close()
    return {"errors": errors, "restored": all(restored)}


CASES = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 100)]


def all_cases() -> list[dict[str, Any]]:
    return [average_and_trace(*case) for case in CASES]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return run_ranks(all_cases, 2)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"zero{s}-{t}" for s, t in CASES])
def test_exported_average_is_the_closed_form(outcomes: list[dict[str, Any]], case: int) -> None:
    assert len(outcomes[case]["errors"]) == 2 * STEPS
    assert max(outcomes[case]["errors"]) < 1e-6
    assert outcomes[case]["restored"]
