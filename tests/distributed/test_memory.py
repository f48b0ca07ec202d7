"""What ranks really keep between two steps is what is predicted, byte by byte."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dat_ds.bench.memory.moments import ATTACK, Setting, memory_of
from dat_ds.bench.memory.state import OptimizerBytes
from dat_ds.bench.memory.trace import Passes
from tests.distributed import tiny
from tests.distributed.harness import run_ranks

RANKS, STAGES = 2, (0, 1, 2, 3)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    *itertools.product(STAGES, ("float32", "bf16", "autocast"), (False,)),
    *itertools.product((1, 2, 3), ("float32", "bf16"), (True,)),
]


def keep(stage: int, precision: str, offloads: bool) -> dict[str, Any]:
    import dat_ds
    from dat_ds.engine import hooks

    model = tiny.vit()
    sizes = [p.numel() for p in model.parameters()]
    engine, *_ = dat_ds.initialize(
        model=model,
        config=tiny.config(
            stage,
            optimizer={"type": "AdamW", "params": {"lr": 0.001}},
            zero_optimization=OFFLOAD if offloads else {},
            **tiny.PRECISIONS[precision],
        ),
    )
    x, y = tiny.images(4, seed=engine.ranks.rank)
    engine.train_step([(x, y)])
    found = hooks.accounted_bytes(engine.deepspeed)
    engine.close()
    return {"sizes": sizes, "found": found}


def keep_cases() -> dict[Any, Any]:
    return {case: keep(*case) for case in CASES}


@pytest.fixture(scope="module")
def kept() -> list[dict[Any, Any]]:
    return run_ranks(keep_cases, RANKS)


@pytest.mark.parametrize("case", CASES)
def test_kept_bytes_are_the_predicted_ones(kept: list[dict[Any, Any]], case: Any) -> None:
    stage, precision, offloads = case
    width = 2 if precision == "bf16" else 4
    for rank in range(RANKS):
        sizes, found = kept[rank][case]["sizes"], kept[rank][case]["found"]
        setting = Setting(
            trainable=tuple(sizes),
            stage=stage,
            ranks=RANKS,
            width=width,
            gradient_width=width,
            optimizer=OptimizerBytes(8.0, 8.0, whole=False),
            persistence=0,
            offloads_optimizer=offloads,
            on_cpu=True,
        )
        nothing = Passes(0, ((0, 0),))
        terms = memory_of(setting, nothing, nothing, 0).device[ATTACK]
        assert found["parameters"] == terms["parameters"]
        assert found["master"] == terms.get("master weights", 0)
        assert found["optimizer"] == terms["optimizer"]
        assert found["gradients"] == terms.get("gradients", 0)
