"""Attacks leave no trace: one that is run and thrown away does not change training by one bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks

STEPS, MICRO_BATCH = 4, 4
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "parameters": {"offload_param": {"device": "cpu"}},
}


@dataclass(frozen=True)
class Case:
    """One training set-up; the attack's own options come last and do not matter without it."""

    model: str
    stage: int
    precision: str = "float32"
    accumulation: int = 1
    offload: str = "none"
    model_mode: str = "eval"
    resident_gib: float = 4.0

    @property
    def without_attack(self) -> Case:
        return replace(self, model_mode="eval", resident_gib=4.0)


def vit(stage: int, precision: str = "float32", accumulation: int = 1, **options: Any) -> Case:
    return Case("vit", stage, precision, accumulation, **options)


CASES = [
    *(vit(stage, accumulation=accumulation) for stage in range(4) for accumulation in (1, 2)),
    *(vit(3, accumulation=accumulation, resident_gib=0.0) for accumulation in (1, 2)),
    *(vit(stage, "bf16", 1 + stage % 2) for stage in range(4)),
    *(vit(stage, "autocast", 2 - stage % 2, model_mode="train") for stage in range(4)),
    *(vit(stage, "fp16", accumulation) for stage in range(4) for accumulation in (1, 2)),
    *(vit(3, precision, resident_gib=0.0) for precision in ("bf16", "fp16", "autocast")),
    *(vit(stage, offload="optimizer") for stage in (1, 2, 3)),
    vit(2, "bf16", 2, offload="optimizer"),
    vit(3, offload="parameters"),
    vit(3, offload="parameters", resident_gib=0.0),
    *(
        Case("cnn", stage, precision, 1 + stage % 2, model_mode=mode)
        for stage in range(4)
        for precision in ("float32", "autocast")
        for mode in ("eval", "train")
    ),
]


def settings(case: Case) -> dict[str, Any]:
    sections: dict[str, Any] = dict(tiny.PRECISIONS[case.precision])
    if case.precision == "fp16":
        # Overflows at first, so that the run holds skipped steps and a changing loss scale.
        sections["fp16"] = {"enabled": True, "initial_scale_power": 17, "hysteresis": 1}
        sections["fp16"]["loss_scale_window"] = 2
    if case.offload == "optimizer":
        sections["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
        sections["zero_force_ds_cpu_optimizer"] = False
    return tiny.config(
        case.stage,
        gradient_accumulation_steps=case.accumulation,
        zero_optimization=OFFLOADS[case.offload],
        dat={
            "attack": {"steps": 2, "step_size": 0.04, "model_mode": case.model_mode},
            "engine": {"resident_parameters_gib": case.resident_gib},
        },
        **sections,
    )


def train(case: Case, attacked: bool) -> dict[str, Any]:
    import dat_ds
    from dat_ds.engine import hooks

    model = tiny.vit(drop_rate=0.1, proj_drop_rate=0.1) if case.model == "vit" else tiny.cnn()
    engine, *_ = dat_ds.initialize(model=model, config=settings(case))
    attack = engine.attack_in_use
    engine.use_attack(None)  # engine(x, y) now trains on x itself
    torch.manual_seed(100 + engine.ranks.rank)
    x, y = tiny.images(STEPS * case.accumulation * MICRO_BATCH, seed=engine.ranks.rank)
    losses, moved = [], 0.0
    for batch in zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True):
        if attacked:
            engine.use_attack(attack)
            moved = max(moved, (engine.attack(*batch) - batch[0]).abs().max().item())
            engine.use_attack(None)
        loss = engine(*batch)
        losses.append(loss.detach().clone())
        engine.backward(loss)
        engine.step()
    result = {
        "losses": torch.stack(losses),
        "random state": torch.get_rng_state(),
        "skipped steps": torch.tensor(engine.deepspeed.skipped_steps),
        # Every rank's own buffers, then the weights that all ranks share.
        **{f"buffer {name}": b.clone() for name, b in engine.module.named_buffers()},
        **{f"shard {i}": w.clone() for i, w in enumerate(hooks.held_weights(engine.deepspeed))},
        **hooks.full_state_dict(engine.deepspeed),
    }
    engine.close()
    return {"result": result, "moved": moved}


def train_cases() -> list[dict[str, Any]]:
    allow_fp16()
    plain = {case: train(case, False)["result"] for case in {c.without_attack: 0 for c in CASES}}
    reports = []
    for case in CASES:
        attacked, reference = train(case, True), plain[case.without_attack]
        assert attacked["result"].keys() == reference.keys()
        reports.append(
            {
                "moved": attacked["moved"],
                "skipped": int(reference["skipped steps"]),
                "finite": bool(reference["losses"].isfinite().all()),
                "losses differ": len(set(reference["losses"].tolist())) > 1,
                "changed": [
                    name
                    for name, value in reference.items()
                    if not torch.equal(value, attacked["result"][name])
                ],
            }
        )
    return reports


@pytest.fixture(scope="module")
def reports() -> list[list[dict[str, Any]]]:
    return run_ranks(train_cases, 2)


def test_discarded_attack_leaves_training_bit_identical(reports: list[list[Any]]) -> None:
    changed = {
        (case, rank): report["changed"]
        for rank, of_rank in enumerate(reports)
        for case, report in zip(CASES, of_rank, strict=True)
        if report["changed"]
    }
    assert not changed


def test_discarded_attacks_were_real_attacks(reports: list[list[Any]]) -> None:
    for case, report in zip(CASES, reports[0], strict=True):
        assert 0.05 < report["moved"] <= 0.1 + 1e-6, case
        assert report["finite"], case
        assert report["losses differ"], case


def test_fp16_runs_hold_skipped_and_taken_steps(reports: list[list[Any]]) -> None:
    for case, report in zip(CASES, reports[0], strict=True):
        if case.precision == "fp16":
            assert 0 < report["skipped"] < STEPS, case


def test_every_stage_meets_every_precision_accumulation_and_offload() -> None:
    for stage in range(4):
        cases = [case for case in CASES if case.stage == stage]
        precisions = {"float32", "bf16", "autocast", "fp16"}
        offloads = {"none"} | ({"optimizer"} if stage else set())
        assert {case.precision for case in cases} == precisions
        assert {case.accumulation for case in cases} == {1, 2}
        assert {case.offload for case in cases} == offloads | (
            {"parameters"} if stage == 3 else set()
        )
