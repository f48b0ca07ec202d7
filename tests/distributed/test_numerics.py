"""Claims: faults are told alike on all ranks in every ZeRO stage; ranks that differ are named."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from dat_ds.models import load
from dat_ds.training.replay import replay
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks
from tests.spoilt import Spoil

MODEL = {"patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
SAMPLES, BATCH = 32, 4
STAGES = (0, 1, 2, 3)


def images() -> TensorDataset:
    """Dark images, and the last of them white."""
    x, y = tiny.images(SAMPLES)
    x = 0.6 * x
    x[-1] = 1.0
    return TensorDataset(x, y)


def model(fault: str) -> nn.Module:
    """A ViT that meets a fault at the white image."""
    from dat_ds.models import build_model

    built = build_model(
        "vit_tiny_patch16_224", num_classes=tiny.CLASSES, in_chans=3, img_size=8, seed=0, **MODEL
    )

    def spoil(_module: nn.Module, given: tuple[Tensor], outputs: Tensor) -> Tensor:
        white = (given[0].flatten(1).mean(1) > 0.8).unsqueeze(1)
        if fault == "output":
            return outputs * torch.where(white, torch.nan, 1.0).to(outputs.dtype)
        return Spoil.apply(outputs, white)

    if fault != "none":
        built.register_forward_hook(spoil)
    return built


def trainer(folder: Path, stage: int, fault: str, **sections: Any) -> Any:
    import dat_ds
    from dat_ds.training.trainer import Trainer

    dat = {
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 3, "progress": False, "trackers": []},
        **sections.pop("dat", {}),
    }
    config = tiny.config(stage, train_micro_batch_size_per_gpu=BATCH, dat=dat, **sections)
    engine, _, loader, _ = dat_ds.initialize(
        model=model(fault), config=config, training_data=images()
    )
    return Trainer(engine, loader, Subset(images(), []), folder)


def faulty(folder: Path, stage: int, fault: str) -> dict[str, Any]:
    """The message and events of a run that meets the white image, and weights before that."""
    from dat_ds.engine import hooks
    from dat_ds.errors import NumericsError

    run = trainer(folder, stage, fault)
    train_step, before, plans = run.engine.train_step, {}, []

    def spied(batches: Any) -> Tensor:
        before.update(hooks.full_state_dict(run.engine.deepspeed))
        plans.append([index for _, _, plan in batches for index in plan.indices])
        return train_step(batches)

    run.engine.train_step = spied
    message = None
    try:
        run.fit()
    except NumericsError as error:
        message = str(error)
    run.engine.close()
    return {"message": message, "events": run.events, "before": before, "plans": plans}


def differing(folder: Path, stage: int) -> dict[str, Any]:
    """What is said of weights that one rank has changed, and of those of a whole run."""
    from dat_ds.engine.replicas import replica_difference
    from dat_ds.errors import NumericsError

    # Parameters of up to 64 entries stay whole under ZeRO-3.
    zero = {"stage3_param_persistence_threshold": 64} if stage == 3 else {}
    run = trainer(folder, stage, "none", zero_optimization=zero)
    run.fit()
    found: dict[str, Any] = {"events": list(run.events), "alone": replica_difference(run.engine)}
    parameter = dict(run.engine.module.named_parameters())["body.blocks.0.norm1.bias"]
    if run.ranks.rank == 1:
        with torch.no_grad():
            parameter.data[3] += 0.25
    found["perturbed"] = replica_difference(run.engine)
    try:
        run._numerics.compare_ranks()
    except NumericsError as error:
        found["message"] = str(error)
    found["event"] = run.events[-1]
    run.engine.close()
    return found


def overflowing(folder: Path, stage: int, fp16: dict[str, Any]) -> dict[str, Any]:
    """How a float16 run ends whose every gradient overflows."""
    from dat_ds.errors import LossScaleError

    numerics = {"numerics": {"most_skipped": 3}}
    run = trainer(folder, stage, "none", fp16={"enabled": True, **fp16}, dat=numerics)
    outer = run.engine._outer

    def huge(*arguments: Any) -> Any:
        terms = outer(*arguments)
        terms.terms["loss"] = terms.terms["loss"] * 1e30
        return terms

    run.engine._outer = huge
    message = None
    try:
        run.fit()
    except LossScaleError as error:
        message = str(error)
    steps = run.engine.global_steps
    run.engine.close()
    return {"message": message, "events": run.events, "steps": steps}


def cases(folder: str) -> dict[str, Any]:
    allow_fp16()
    home = Path(folder)
    found: dict[str, Any] = {}
    for stage in STAGES:
        for fault in ("output", "gradient") if stage in (0, 2) else ("output",):
            found[f"{fault} {stage}"] = faulty(home / f"{fault}-{stage}", stage, fault)
        found[f"differing {stage}"] = differing(home / f"differing-{stage}", stage)
    dynamic = {"initial_scale_power": 2, "hysteresis": 1}
    for stage in (0, 2, 3):
        found[f"dynamic {stage}"] = overflowing(home / f"dynamic-{stage}", stage, dynamic)
    found["fixed 2"] = overflowing(home / "fixed", 2, {"loss_scale": 4})
    found["rank"] = int(os.environ["RANK"])
    return found


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as path:
        yield path


@pytest.fixture(scope="module")
def found(folder: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = run_ranks(cases, 2, folder)
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_on_one_rank_stops_all_with_its_rank_and_sample(found, folder, stage):
    by_rank = [of_rank[f"output {stage}"] for of_rank in found]
    assert by_rank[0]["events"] == by_rank[1]["events"]
    (event,) = by_rank[0]["events"]
    step, (rank,) = event["step"], event["ranks"]
    assert SAMPLES - 1 in by_rank[rank]["plans"][step - 1]
    assert event["samples"] == [[SAMPLES - 1]]
    for of_rank in by_rank:
        words = f"The loss is nan in step {step} on rank {rank} (samples {SAMPLES - 1})."
        assert of_rank["message"].startswith(words)
    kept = Path(event["reproducer"])
    assert sorted(file.name for file in kept.parent.glob("*.pt")) == [f"rank-{rank}.pt"]
    assert (kept.parent / "model.safetensors").exists() == (stage > 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_weights_kept_are_those_at_the_start_of_the_step(found, stage):
    of_rank = found[0][f"output {stage}"]
    assert len(of_rank["plans"]) == of_rank["events"][0]["step"], "told in the step itself"
    kept = load(Path(of_rank["events"][0]["reproducer"]).parent).state_dict()
    assert kept.keys() == of_rank["before"].keys()
    assert all(torch.equal(kept[name], value) for name, value in of_rank["before"].items())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_is_told_where_losses_are(found, stage):
    by_rank = [of_rank[f"gradient {stage}"] for of_rank in found]
    (event,) = by_rank[0]["events"]
    assert (event["kind"], event["ranks"]) == ("gradient", [])
    step = event["step"]
    assert any(SAMPLES - 1 in of_rank["plans"][step - 1] for of_rank in by_rank)
    assert all("Gradients are not finite" in of_rank["message"] for of_rank in by_rank)
    names = sorted(file.name for file in Path(event["reproducer"]).parent.glob("*.pt"))
    assert names == ["rank-0.pt", "rank-1.pt"]


def test_a_kept_step_of_zero_3_is_repeated_by_one_process(found, monkeypatch):
    from dat_ds.training import replay as module

    (event,) = found[0]["output 3"]["events"]
    healthy = replay(Path(event["reproducer"]))
    assert healthy.first is None, "a model without the planted fault"
    assert healthy.weights == "at the start of the step"

    def planted(*_: Any) -> nn.Module:
        built = model("output")
        built.load_state_dict(load(Path(event["reproducer"]).parent).state_dict())
        return built

    monkeypatch.setattr(module, "load", planted)
    repeated = replay(Path(event["reproducer"]))
    assert repeated.first is not None
    assert list(repeated.samples) == [SAMPLES - 1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_with_other_weights_is_named_and_equal_ranks_raise_no_alarm(found, stage):
    for of_rank in found:
        case = of_rank[f"differing {stage}"]
        assert case["events"] == [], "compared at every checkpoint of the run"
        assert case["alone"] is None
        difference = case["perturbed"]
        assert difference.parameter == "body.blocks.0.norm1.bias"
        assert (difference.ranks, difference.num_parameters) == ((1,), 1)
        assert difference.largest == pytest.approx(0.25, abs=1e-6)
        assert "body.blocks.0.norm1.bias, on rank(s) 1, by up to 0.25" in case["message"]
        assert case["event"]["event"] == "ranks_differ"


@pytest.mark.parametrize("case", ["dynamic 0", "dynamic 2", "dynamic 3", "fixed 2"])
def test_an_exhausted_loss_scale_ends_the_run(found, case):
    for of_rank in found:
        assert "that cannot shrink any further" in of_rank[case]["message"]
        (event,) = of_rank[case]["events"]
        assert event["event"] == "loss_scale_exhausted"
        assert event["loss_scale"] == (4 if case == "fixed 2" else 1)
        assert of_rank[case]["steps"] <= 6
