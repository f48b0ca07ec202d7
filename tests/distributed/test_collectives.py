"""One gradient reduction per optimizer step, whatever the attack costs; counted twice.

The engine counts at the process group; the tests count once more where torch dispatches its
``c10d`` operators, below anything that DeepSpeed or the engine could bypass.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import tiny
from tests.distributed.harness import run_ranks

STEPS, MICRO_BATCH, RANKS = 2, 4, 2
NUMEL = sum(p.numel() for p in tiny.vit().parameters())
STAGES = (0, 1, 2, 3)
GATHERS = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_")
REDUCTIONS = ("allreduce_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_")
COUNTED = (*GATHERS, *REDUCTIONS, "allreduce_coalesced_", "broadcast_", "alltoall_base_")


class Collectives(TorchDispatchMode):
    """Counts ``c10d`` operators by the phase they ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.phase = "attack"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self.calls[self.phase, name] += 1
        return func(*args, **(kwargs or {}))

    def count(self, phase: str, names: tuple[str, ...] = COUNTED) -> int:
        return sum(n for (p, name), n in self.calls.items() if p == phase and name in names)


def measure(stage: int, attack_steps: int, accumulation: int, resident_gib: float) -> Any:
    """What the last of two optimizer steps communicated; the first one warms ZeRO-3 up."""
    import dat_ds

    engine, *_ = dat_ds.initialize(
        model=tiny.vit(),
        config=tiny.config(
            stage,
            gradient_accumulation_steps=accumulation,
            dat={
                "attack": {"steps": attack_steps, "step_size": 0.04},
                "engine": {"resident_parameters_gib": resident_gib},
            },
        ),
    )
    x, y = tiny.images(MICRO_BATCH, seed=engine.ranks.rank)
    maximise = engine.inner.maximise
    for _ in range(STEPS):
        seen = Collectives()

        def attack_apart(*args: Any, seen: Collectives = seen, **options: Any) -> Any:
            seen.phase = "attack"
            found = maximise(*args, **options)
            seen.phase = "forward"
            return found

        engine.inner.maximise = attack_apart  # type: ignore[method-assign]
        with seen:
            for _ in range(accumulation):
                loss = engine(x, y)
                seen.phase = "backward"
                engine.backward(loss)
                seen.phase = "step"
                engine.step()
    phases = ("attack", "forward", "backward", "step")
    report = {
        "seen": {phase: seen.count(phase) for phase in phases},
        "reductions": seen.count("backward", REDUCTIONS),
        "gathers": sum(seen.count(phase, GATHERS) for phase in phases),
        "attack gathers": seen.count("attack", GATHERS),
        "unknown": sorted({name for _, name in seen.calls} - set(COUNTED)),
        "engine": engine.collectives,
        "metrics": engine.metrics,
    }
    engine.close()
    return report


CASES = [
    *((stage, steps, 1, 4.0) for stage in STAGES for steps in (1, 10)),
    *((stage, 1, 2, 4.0) for stage in STAGES),
    *((3, steps, 1, 0.0) for steps in (1, 10)),
]


def measure_cases() -> dict[Any, Any]:
    return {case: measure(*case) for case in CASES}


def measure_alone() -> dict[Any, Any]:
    return {stage: measure(stage, 1, 1, 4.0) for stage in (0, 2, 3)}


@pytest.fixture(scope="module")
def reports() -> dict[Any, Any]:
    first, second = run_ranks(measure_cases, RANKS)
    for case in CASES:
        assert first[case]["seen"] == second[case]["seen"]
    return first


def of(
    reports: dict[Any, Any], stage: int, steps: int = 1, micro: int = 1, gib: float = 4.0
) -> Any:
    return reports[stage, steps, micro, gib]


@pytest.mark.parametrize("stage", STAGES)
def test_reductions_do_not_depend_on_attack_steps(reports: dict[Any, Any], stage: int) -> None:
    short, long = of(reports, stage, 1), of(reports, stage, 10)
    assert short["reductions"] == long["reductions"] >= 1
    for phase in ("forward", "backward", "step"):
        assert short["seen"][phase] == long["seen"][phase]


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_0_and_1_reduce_once_per_optimizer_step(reports: dict[Any, Any], stage: int) -> None:
    # This model fits into one of DeepSpeed's buckets, so "once" is literal.
    assert of(reports, stage, micro=1)["reductions"] == 1
    assert of(reports, stage, micro=2)["reductions"] == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_2_and_3_reduce_in_every_micro_step(reports: dict[Any, Any], stage: int) -> None:
    # They keep only their shard of the gradients between micro-steps, so they reduce in each.
    once = of(reports, stage, micro=1)["reductions"]
    assert once >= 1
    assert of(reports, stage, micro=2)["reductions"] == 2 * once


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("steps", [1, 10])
def test_attack_does_not_communicate_below_stage_3(
    reports: dict[Any, Any], stage: int, steps: int
) -> None:
    report = of(reports, stage, steps)
    assert report["seen"]["attack"] == 0
    assert report["metrics"]["attack_parameter_gathers"] == 0


def test_resident_attack_gathers_do_not_grow_with_attack_steps(reports: dict[Any, Any]) -> None:
    short, long = of(reports, 3, 1), of(reports, 3, 10)
    assert short["attack gathers"] == long["attack gathers"] >= 1
    gathers = [r["metrics"]["attack_parameter_gathers"] for r in (short, long)]
    assert gathers[0] == gathers[1]


def test_attack_gathers_grow_with_attack_steps_when_not_resident(reports: dict[Any, Any]) -> None:
    short, long = of(reports, 3, 1, gib=0.0), of(reports, 3, 10, gib=0.0)
    assert long["attack gathers"] >= 5 * short["attack gathers"] > 0


def test_engine_counts_what_torch_dispatches(reports: dict[Any, Any]) -> None:
    for case, report in reports.items():
        assert report["unknown"] == [], case
        assert report["engine"].get("gradients", 0) == report["reductions"], case
        assert report["engine"].get("parameters", 0) == report["gathers"], case
        metrics = report["metrics"]
        assert metrics["attack_parameter_gathers"] == report["attack gathers"], case
        assert metrics["parameter_gathers"] == report["gathers"], case


def test_bytes_of_gradients_follow_the_ring_at_stage_0(reports: dict[Any, Any]) -> None:
    # Stage 0 all-reduces every gradient once, flattened without padding.
    expected = 2 * (RANKS - 1) / RANKS * NUMEL * 4
    for steps, micro in ((1, 1), (10, 1), (1, 2)):
        assert of(reports, 0, steps, micro)["metrics"]["bytes_sent"]["gradients"] == expected


def test_one_rank_sends_nothing() -> None:
    (reports,) = run_ranks(measure_alone, 1)
    for report in reports.values():
        assert all(sent == 0 for sent in report["metrics"]["bytes_sent"].values())
