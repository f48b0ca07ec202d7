"""The Trainer's callback on two ranks: equal to our engine under DDP and every ZeRO stage."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dat_ds.errors import ConfigError
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks
from tests.distributed.test_parity import weights_of
from tests.hf_tiny import MEAN, STD, PixelDicts, clip, our_hooks, trainer_of, vit

RANKS, MICRO_BATCH, STEPS = 2, 4, 5
ATTACK = {"name": "pgd", "steps": 3, "step_size": 0.04}
THREAT = {"norm": "linf", "eps": 0.1}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "at": {"name": "at"},
    "dat": {"name": "dat"},
    "trades": {"name": "trades"},
    "fare": {"name": "fare"},
    "grad_align": {"name": "at", "grad_align": 0.2},
    "awp": {"name": "at"},
    "sam": {"name": "trades"},
}
PERTURBATIONS = {"awp": {"name": "awp", "radius": 0.05}, "sam": {"name": "sam", "radius": 0.2}}
PARITY = [
    *((stage, "at", 1) for stage in ("ddp", 0, 1, 2, 3)),
    *itertools.product(["ddp", 2, 3], ["trades"], [1]),
    *itertools.product(["ddp", 3], ["dat"], [2]),
    (3, "grad_align", 1),
    *((stage, "awp", 1) for stage in (0, 1)),
    *((stage, "awp", 2) for stage in ("ddp", 2, 3)),
    *((stage, "sam", 1) for stage in ("ddp", 3)),
]
RESUMED = [2, 3]
HALF = [(stage, precision) for stage in (2, 3) for precision in ("bf16", "fp16")]


def deepspeed_config(stage: int, **sections: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        **sections,
    }


def data(accumulation: int = 1, levels: int = 256) -> PixelDicts:
    return PixelDicts(STEPS * accumulation * RANKS * MICRO_BATCH, levels=levels)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Names to whole tensors, also of sharded parameters; a collective."""
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def train_with_callback(
    folder: str, stage: Any, objective: str, accumulation: int, **arguments: Any
) -> tuple[dict[str, Tensor], Any]:
    from dat_ds.integrations.hf import AdversarialTrainingCallback

    settings = {"threat_model": THREAT, "attack": ATTACK, "objective": OBJECTIVES[objective]}
    settings["weight_perturbation"] = PERTURBATIONS.get(objective)
    settings = arguments.pop("settings", settings)
    model = arguments.pop("model", None)
    resume_from = arguments.pop("resume_from", None)
    callback = AdversarialTrainingCallback(**settings, mean=MEAN, std=STD)
    if stage != "ddp":
        sections = arguments.pop("sections", {})
        arguments["deepspeed"] = deepspeed_config(stage, **sections)
    trainer = trainer_of(
        vit() if model is None else model,
        folder,
        [callback],
        train_dataset=data(accumulation, arguments.pop("levels", 256)),
        eval_dataset=PixelDicts(7, seed=5),
        max_steps=STEPS,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return whole_weights(trainer.model), trainer


def best_model_at_the_end(folder: str, stage: Any) -> tuple[int, int, int]:
    """How many tensors of the model at the end differ from the best and the last checkpoint's."""
    scores = iter(range(0, -100, -1))
    _, trainer = train_with_callback(
        folder,
        stage,
        "at",
        1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        trainer_options={"compute_metrics": lambda prediction: {"score": next(scores)}},
    )
    trainer.save_model(f"{folder}/end")
    torch.distributed.barrier()
    best, last, end = (
        load_file(f"{folder}/{name}/model.safetensors")
        for name in ("checkpoint-1", f"checkpoint-{STEPS}", "end")
    )
    differing = [
        sum(not torch.equal(end[name], tensor) for name, tensor in file.items())
        for file in (best, last)
    ]
    return len(end), *differing


def train_with_engine(stage: int, objective: str, accumulation: int) -> dict[str, Tensor]:
    import dat_ds
    from dat_ds.models import PixelModel
    from dat_ds.models.families.huggingface import HuggingFaceBody

    body = HuggingFaceBody(vit())
    model = PixelModel(body, num_classes=tiny.CLASSES, mean=MEAN, std=STD)
    dat = {"objective": OBJECTIVES[objective], "attack": ATTACK, "threat_model": THREAT}
    if objective in PERTURBATIONS:
        dat["weight_perturbation"] = PERTURBATIONS[objective]
    config = tiny.config(stage, gradient_accumulation_steps=accumulation, dat=dat)
    engine, *_ = dat_ds.initialize(model=model, config=config)
    images = data(accumulation)
    for slot in range(STEPS * accumulation):
        first = (slot * RANKS + engine.ranks.rank) * MICRO_BATCH
        rows = slice(first, first + MICRO_BATCH)
        engine.backward(engine(images.pixels[rows], images.labels[rows]))
        engine.step()
    weights = weights_of(engine)
    engine.close()
    return {k.removeprefix("body.model."): v for k, v in weights.items() if k.startswith("body.")}


@contextlib.contextmanager
def counted_inputs() -> Iterator[list[Tensor]]:
    """What the model is given in training forwards with gradients; it casts by itself."""
    from transformers import ViTForImageClassification

    seen: list[Tensor] = []
    forward = ViTForImageClassification.forward

    @functools.wraps(forward)  # the Trainer reads off its signature which columns it takes
    def noted(self: nn.Module, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training and torch.is_grad_enabled():
            seen.append(pixel_values.detach())
        return forward(self, pixel_values, *args, **kwargs)

    ViTForImageClassification.forward = noted
    try:
        yield seen
    finally:
        ViTForImageClassification.forward = forward


def train_in_half(folder: str, stage: int, precision: str) -> dict[str, Any]:
    section = {"enabled": True}
    if precision == "fp16":
        section["initial_scale_power"] = 8
    with counted_inputs() as seen:
        weights, trainer = train_with_callback(
            folder, stage, "at", 1, sections={precision: section}, levels=9973, **{precision: True}
        )
    start = dict(vit().named_parameters())
    rank = trainer.args.process_index
    pixels = data(levels=9973).pixels.unflatten(0, (STEPS, RANKS, MICRO_BATCH))[:, rank]
    distances = [
        ((values * 0.5 + 0.5) - x).abs().max().item()
        for values, x in zip(seen, pixels, strict=True)
    ]
    return {
        "finite": all(bool(w.isfinite().all()) for w in weights.values()),
        "moved": max(float((w.float() - start[k]).abs().max()) for k, w in weights.items()),
        "distances": distances,
        "dtypes": {values.dtype for values in seen},
        "hooks": our_hooks(trainer.model),
    }


def count_gathers(folder: str, resident_gib: float, steps: int) -> tuple[dict[str, Tensor], int]:
    """Weights, and gathers of parameters, with so much memory and so many steps of the attack."""
    from dat_ds.engine.traffic import Traffic, listen, stop_listening

    traffic = Traffic()
    listen(traffic)
    settings = {"threat_model": THREAT, "attack": {**ATTACK, "steps": steps}}
    settings["resident_parameters_gib"] = resident_gib
    with traffic.counting("forward"):
        weights, _ = train_with_callback(folder, 3, "at", 1, settings=settings)
    stop_listening(traffic)
    return weights, traffic.calls["parameters"]


def refused_under_zero_3(folder: str, **keys: Any) -> str:
    settings = {"threat_model": THREAT, "attack": ATTACK, **keys}
    try:
        train_with_callback(folder, 3, "at", 1, settings=settings)
    except ConfigError as error:
        return str(error)
    return ""


def every_case(folder: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for case in PARITY:
        stage, objective, accumulation = case
        weights, trainer = train_with_callback(folder, *case)
        metrics = trainer.evaluate()
        found[case] = weights, {k: v for k, v in metrics.items() if "accuracy" in k}
        found["hooks", case] = our_hooks(trainer.model)
        engine_stage = 0 if stage == "ddp" else stage
        key = (engine_stage, objective, accumulation)
        if ("engine", key) not in found:
            found["engine", key] = train_with_engine(*key)
    section = {"threat_model": THREAT, "attack": ATTACK, "seed": 0}
    found["section"], _ = train_with_callback(
        folder, 2, "at", 1, settings={}, sections={"dat": section}
    )
    for stage in ("ddp", 3):
        found["fare", stage], trainer = train_with_callback(
            folder, stage, "fare", 1, model=clip(seed=trainer.args.process_index)
        )
        found["fare", "metrics", stage] = trainer.evaluate()
    found["gathers"] = [count_gathers(folder, *c) for c in ((4, 1), (4, 4), (0, 4))]
    found["no memory"] = refused_under_zero_3(
        folder, weight_perturbation="awp", resident_parameters_gib=0
    )
    found["folded"] = refused_under_zero_3(folder, attack={**ATTACK, "fold_batch_norm": True})
    for stage in RESUMED:
        where = str(Path(folder) / f"zero{stage}")
        saving = {"save_strategy": "steps", "save_steps": 3}
        whole, _ = train_with_callback(where, stage, "trades", 1, **saving)
        again, _ = train_with_callback(
            where, stage, "trades", 1, resume_from=f"{where}/checkpoint-3", **saving
        )
        found["resumed", stage] = whole, again
        found["best", stage] = best_model_at_the_end(str(Path(folder) / f"best{stage}"), stage)
    found["best", "ddp"] = best_model_at_the_end(str(Path(folder) / "bestddp"), "ddp")
    allow_fp16()
    for half in HALF:
        found[half] = train_in_half(folder, *half)
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(every_case, RANKS, folder)


@pytest.mark.parametrize("case", PARITY, ids=["-".join(map(str, case)) for case in PARITY])
def test_five_steps_equal_the_engines(outcomes: list[dict[Any, Any]], case: Any) -> None:
    stage, objective, accumulation = case
    weights, _ = outcomes[0][case]
    reference = outcomes[0]["engine", (0 if stage == "ddp" else stage, objective, accumulation)]
    start = dict(vit().named_parameters())
    assert weights.keys() == {k for k in reference if k in start}
    errors = {k: (w - reference[k]).abs().max().item() for k, w in weights.items()}
    assert max(errors.values()) <= 1e-5, errors
    assert max((w - start[k]).abs().max().item() for k, w in weights.items()) > 1e-3


def test_the_section_of_the_deepspeed_file_says_the_same(outcomes: list[dict[Any, Any]]) -> None:
    weights, _ = outcomes[0][2, "at", 1]
    assert all(torch.equal(outcomes[0]["section"][k], w) for k, w in weights.items())


def test_features_stay_close_to_those_of_the_first_ranks_model(
    outcomes: list[dict[Any, Any]],
) -> None:
    start = dict(clip(seed=0).named_parameters())
    for found in outcomes:
        weights = found["fare", "ddp"]
        assert max((w - start[k]).abs().max().item() for k, w in weights.items()) > 1e-4
        for name, value in found["fare", 3].items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
        robust = [found["fare", "metrics", stage]["eval_robust_loss"] for stage in ("ddp", 3)]
        assert robust[0] == pytest.approx(robust[1], rel=1e-4)


@pytest.mark.parametrize("stage", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    outcomes: list[dict[Any, Any]], stage: int
) -> None:
    whole, again = outcomes[0]["resumed", stage]
    assert all(torch.equal(again[k], w) for k, w in whole.items())


@pytest.mark.parametrize("stage", ["ddp", *RESUMED])
def test_every_tensor_is_the_best_checkpoints(outcomes: list[dict[Any, Any]], stage: Any) -> None:
    for found in outcomes:
        count, from_best, from_last = found["best", stage]
        assert from_best == 0
        assert from_last > count / 2


def test_zero_3_gathers_parameters_once_for_all_passes_of_an_attack(
    outcomes: list[dict[Any, Any]],
) -> None:
    (_, of_one_step), (resident, of_four), (gathered, each_pass) = outcomes[0]["gathers"]
    assert all(torch.equal(gathered[k], w) for k, w in resident.items())
    assert of_one_step == of_four < each_pass


def test_what_zero_3_cannot_do_is_refused(outcomes: list[dict[Any, Any]]) -> None:
    for found in outcomes:
        assert "write dat.engine.resident_parameters_gib=1." in found["no memory"]
        assert "dat.attack.fold_batch_norm=true with zero_optimization.stage=3" in found["folded"]


def test_nothing_is_left_on_the_model(outcomes: list[dict[Any, Any]]) -> None:
    for found in outcomes:
        assert all(found["hooks", case] == [] for case in PARITY)
        assert all(found[half]["hooks"] == [] for half in HALF)


def test_robust_metrics_do_not_depend_on_the_stage(outcomes: list[dict[Any, Any]]) -> None:
    metrics = [outcomes[0][stage, "at", 1][1] for stage in ("ddp", 0, 1, 2, 3)]
    assert metrics[0].keys() == {"eval_natural_accuracy", "eval_robust_accuracy"}
    assert all(m == metrics[0] for m in metrics)
    assert outcomes[1]["ddp", "at", 1][1] == metrics[0]


@pytest.mark.parametrize("half", HALF, ids=["-".join(map(str, half)) for half in HALF])
def test_pixels_stay_float32_until_the_models_input(
    outcomes: list[dict[Any, Any]], half: Any
) -> None:
    for found in outcomes:
        assert found[half]["finite"]
        assert found[half]["moved"] > 1e-3
        assert len(found[half]["distances"]) == STEPS
        assert found[half]["dtypes"] == {torch.float32}
        assert max(found[half]["distances"]) <= THREAT["eps"] + 1e-6
