"""Every attack with every objective under every ZeRO stage trains, and resumes exactly."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_ds.attacks import ATTACKS
from dat_ds.config import load_config
from dat_ds.objectives import OBJECTIVES
from tests.distributed import tiny
from tests.distributed.harness import run_ranks

RANKS, MICRO_BATCH = 2, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "pgd": {"restarts": 2},
    "multi_norm": {"other_norms": {"l2": 0.5, "l1": 2.0}, "combine": "average"},
    "fat": {"extra_steps": 1},
}
STAGES = [0, 1, 2, 3]
CASES = list(itertools.product(ATTACKS, OBJECTIVES, STAGES))


def settings(attack: str, objective: str, stage: int, helper: str) -> dict[str, Any]:
    options = {"name": attack, **OPTIONS.get(attack, {})}
    if attack not in ("fgsm", "fgsm_rs", "n_fgsm"):
        options["steps"] = 2
    section: dict[str, Any] = {"name": objective}
    if objective == "hat":
        section["helper_model"] = helper
    return tiny.config(stage, dat={"attack": options, "objective": section})


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = tiny.images(MICRO_BATCH * RANKS, seed=step)
    part = slice(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH)
    return x[part], y[part]


def step_on(engine: Any, step: int) -> None:
    engine.backward(engine(*batch(step, engine.ranks.rank)))
    engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    from dat_ds.engine import hooks

    return {k: v.clone() for k, v in hooks.full_state_dict(engine.deepspeed).items()}


def train_and_resume(case: tuple[str, str, int], helper: str, folder: Path) -> dict[str, Any]:
    """Two steps; then the second again, in a new engine that loads the state after the first."""
    import dat_ds
    from dat_ds.engine.checkpoint import Checkpoints

    config = settings(*case, helper)
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    start = weights_of(engine)
    step_on(engine, 0)
    checkpoints = Checkpoints(folder / "-".join(map(str, case)), keep=1)
    checkpoints.save(engine, None, {}, weights_of(engine))
    step_on(engine, 1)
    metrics, end = engine.metrics, weights_of(engine)
    engine.close()
    again, *_ = dat_ds.initialize(model=tiny.vit(seed=1), config=config)
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.load(latest, again, None)
    step_on(again, 1)
    resumed, metrics_again = weights_of(again), again.metrics
    again.close()
    return {
        "moved": max((float((end[k] - start[k]).abs().max()) for k in end), default=0.0),
        "finite": all(bool(t.isfinite().all()) for t in end.values()),
        "same": all(torch.equal(end[k], resumed[k]) for k in end),
        "losses": (metrics["loss"], metrics_again["loss"]),
        "robust_acc": metrics["robust_acc"],
    }


def every_case(folder: str) -> dict[Any, Any]:
    helper = str(Path(folder) / "helper")
    return {case: train_and_resume(case, helper, Path(folder)) for case in CASES}


def save_helper(folder: Path) -> None:
    """A naturally trained model's stand-in, as a run leaves it."""
    from dat_ds.models import build_model, save_weights

    model = build_model(
        "vit_tiny_patch16_224",
        num_classes=tiny.CLASSES,
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        img_size=tiny.SIZE,
        patch_size=4,
        depth=1,
        embed_dim=16,
        num_heads=2,
    )
    save_weights(folder, model.state_dict(), model.spec)


@pytest.fixture(scope="module")
def outcomes() -> dict[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_helper(Path(folder) / "helper")
        return run_ranks(every_case, RANKS, folder)[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_trains_and_resumes_bit_for_bit(
    outcomes: dict[Any, Any], attack: str, objective: str, stage: int
) -> None:
    outcome = outcomes[attack, objective, stage]
    assert outcome["finite"]
    assert outcome["moved"] > 1e-4
    assert outcome["same"]
    assert outcome["losses"][0] == outcome["losses"][1]
    assert 0 <= outcome["robust_acc"] <= 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_prints_itself(attack: str, objective: str, tmp_path: Path) -> None:
    run = load_config(settings(attack, objective, 2, str(tmp_path)))
    assert load_config(run.to_dict()).to_dict() == run.to_dict()
