"""Every attack with every objective under every ZeRO stage trains, and resumes exactly.

Cases grow with attacks times objectives, so every fifth pair runs here, under one stage, in turns;
beside the default attack or objective a method runs under two; all run under all in the slow tier.
The settings of every other method are those of ``tests/settings.py``.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dat_ds.attacks import ATTACKS
from dat_ds.config import load_config
from dat_ds.data import UNLABELLED, pseudo_label
from dat_ds.errors import ConfigError
from dat_ds.objectives import OBJECTIVES
from dat_ds.optim import OPTIMIZERS
from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.settings import TABLES, settings_of

RANKS, MICRO_BATCH = 2, 3
STAGES = [0, 1, 2, 3]
EXTRAS: dict[str, dict[str, Any]] = {
    "grad_align": {"attack": {"name": "fgsm"}, "objective": {"grad_align": 0.2}},
    "grad_align_split": {
        "attack": {"name": "fgsm_rs"},
        "objective": {"name": "trades", "grad_align": 0.2, "batch_norm": "split"},
    },
    "schedules": {
        "attack": {"steps": 3, "step_size": 0.04, "steps_from": 1, "eps_warmup": 0.5},
        "schedule": {"name": "constant", "max_steps": 3},
    },
    "free_accumulated": {
        "gradient_accumulation_steps": 2,
        "attack": {"name": "free"},
        "objective": {"name": "trades"},
    },
    "unlabelled": {
        "data": {"labelled_fraction": 0.5},
        "objective": {"name": "trades", "unlabelled_weight": 0.5},
    },
    "mixed": {"data": {"mixup": 0.2}, "objective": {"name": "trades"}},
    "keep_tokens": {"model": "vit", "attack": {"steps": 2, "keep_tokens": 0.5}},
    "bf16_attack": {"model": "vit", "attack": {"steps": 2, "precision": "bf16"}},
    "channels_last": {"attack": {"steps": 2}, "engine": {"channels_last": True}},
    "resolution": {"attack": {"steps": 2, "resolution": 4}},
    "split": {"objective": {"name": "dat", "batch_norm": "split"}},
    "rotation": {"attack": {"steps": 2}, "objective": {"name": "rotation", "natural_weight": 1}},
    "contrastive_split": {
        "attack": {"steps": 2},
        "objective": {"name": "contrastive", "batch_norm": "split"},
    },
    "contrastive_awp": {
        "attack": {"steps": 2},
        "objective": {"name": "contrastive"},
        "weight_perturbation": {"name": "awp"},
    },
    "fare_sam": {
        "attack": {"steps": 2},
        "objective": {"name": "fare"},
        "weight_perturbation": {"name": "sam"},
    },
    "awp": {"weight_perturbation": {"name": "awp"}},
    "sam": {"objective": {"name": "trades"}, "weight_perturbation": {"name": "sam"}},
}
REFUSED = {
    # They look at which images are misclassified, or at copies of an image in another ball.
    *itertools.product(["apgd", "fat"], ["contrastive", "fare"]),
    *itertools.product(["guided"], ["contrastive", "fare"]),  # its guide compares logits of classes
    *itertools.product(["multi_norm"], ["contrastive", "nuat"]),
    # Perturbations of views that the next step does not see.
    *itertools.product(["free", "fgsm_pgi"], ["contrastive"]),
    *itertools.product(["fgsm", "free"], ["fare"]),  # at the image itself, where the loss is flat
    # It compares with where an attack started, which others do not tell.
    *itertools.product([name for name in ATTACKS if name != "fgsm_pgi"], ["pgi"]),
    # They compare natural with adversarial images.
    *itertools.product(["none"], [name for name, kind in OBJECTIVES.items() if kind.needs_attack]),
}
PAIRS = [pair for pair in itertools.product(ATTACKS, OBJECTIVES) if pair not in REFUSED]
CASES = [
    (attack, objective, stage)
    for number, (attack, objective) in enumerate(PAIRS)
    for stage in STAGES
    if (
        stage % 2 == number % 2
        if ATTACKS.default == attack or OBJECTIVES.default == objective
        else number % 5 == 0 and stage == number // 5 % len(STAGES)
    )
]
OTHER_STAGES = [(*pair, stage) for pair in PAIRS for stage in STAGES if (*pair, stage) not in CASES]
OTHERS = [
    (section, name, stage)
    for section in ("optimizer", "compression", "schedule")
    for name in TABLES[section]
    for stage in (0, 3)
    # Those that compress their momentum need every rank's gradient of the whole model.
    if stage == 0 or not (section == "optimizer" and OPTIMIZERS[name].compresses)
]


def settings(attack: str, objective: str, stage: int, helper: str) -> dict[str, Any]:
    options = settings_of("attack", attack)
    if not OBJECTIVES[objective].classifies:
        options.pop("restarts", None)
    if (attack, objective) == ("mim", "fare"):
        options["random_start"] = True
    section = settings_of("objective", objective)
    if "helper_model" in section:
        section["helper_model"] = helper
    return tiny.config(stage, dat={"attack": options, "objective": section})


def other_settings(section: str, name: str, stage: int) -> dict[str, Any]:
    dat = {"attack": settings_of("attack", "fgsm_rs"), section: settings_of(section, name)}
    if section == "schedule":
        dat["schedule"]["max_steps"] = 3
    config = tiny.config(stage, dat=dat)
    if section == "optimizer":
        del config["optimizer"]
    return config


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = tiny.images(MICRO_BATCH * RANKS, seed=step)
    part = slice(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH)
    return x[part], y[part]


def step_on(engine: Any, step: int) -> None:
    for micro_step in range(engine.accumulation):
        x, y = batch(10 * micro_step + step, engine.ranks.rank)
        if engine.run.dat.data.has_unlabelled:
            y[::2] = torch.tensor([UNLABELLED, pseudo_label(y[2])])
        if engine.run.dat.data.mixes:
            y = 0.7 * F.one_hot(y, tiny.CLASSES) + 0.3 * F.one_hot(y.flip(0), tiny.CLASSES)
        engine.backward(engine(x, y))
        engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    from dat_ds.engine import hooks

    return {k: v.clone() for k, v in hooks.full_state_dict(engine.deepspeed).items()}


def train_and_resume(config: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Two steps; then the second again, in a new engine that loads the state after the first."""
    import dat_ds

    engine, *_ = dat_ds.initialize(model=tiny.MODELS[model](), config=config)
    start = weights_of(engine)
    step_on(engine, 0)
    engine.save_checkpoint(folder)
    step_on(engine, 1)
    metrics, end = engine.metrics, weights_of(engine)
    engine.close()
    again, *_ = dat_ds.initialize(model=tiny.MODELS[model](seed=1), config=config)
    again.load_checkpoint(folder)
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


def pairs(cases: list[tuple[str, str, int]], folder: str) -> dict[Any, Any]:
    helper = str(Path(folder) / "helper")
    return {
        case: train_and_resume(settings(*case, helper), "vit", Path(folder) / str(number))
        for number, case in enumerate(cases)
    }


def every_case(folder: str) -> dict[Any, Any]:
    outcomes = pairs(CASES, folder)
    for number, case in enumerate(OTHERS):
        place = Path(folder) / f"other-{number}"
        outcomes[case] = train_and_resume(other_settings(*case), "cnn", place)
    for case in itertools.product(EXTRAS, STAGES):
        dat = dict(EXTRAS[case[0]])
        accumulation = dat.pop("gradient_accumulation_steps", 1)
        model = dat.pop("model", "cnn")
        config = tiny.config(case[1], gradient_accumulation_steps=accumulation, dat=dat)
        place = Path(folder) / "-".join(map(str, case))
        outcomes[case] = train_and_resume(config, model, place)
    return outcomes


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


@pytest.fixture(scope="module")
def outcomes_of_other_stages() -> dict[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_helper(Path(folder) / "helper")
        return run_ranks(pairs, RANKS, OTHER_STAGES, folder)[0]


@pytest.mark.parametrize(("attack", "objective", "stage"), CASES)
def test_it_trains_and_resumes_bit_for_bit(
    outcomes: dict[Any, Any], attack: str, objective: str, stage: int
) -> None:
    has_accuracy = OBJECTIVES[objective].classifies and attack != "none"
    check(outcomes[attack, objective, stage], has_accuracy)


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "objective", "stage"), OTHER_STAGES)
def test_it_does_under_the_other_stages(
    outcomes_of_other_stages: dict[Any, Any], attack: str, objective: str, stage: int
) -> None:
    has_accuracy = OBJECTIVES[objective].classifies and attack != "none"
    check(outcomes_of_other_stages[attack, objective, stage], has_accuracy)


@pytest.mark.parametrize(("section", "name", "stage"), OTHERS)
def test_every_other_method_trains_and_resumes_bit_for_bit(
    outcomes: dict[Any, Any], section: str, name: str, stage: int
) -> None:
    check(outcomes[section, name, stage], has_accuracy=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_goes_with_them_does_too(outcomes: dict[Any, Any], extra: str, stage: int) -> None:
    objective = EXTRAS[extra].get("objective", {}).get("name", "at")
    check(outcomes[extra, stage], OBJECTIVES[objective].classifies)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_stages_agree(outcomes: dict[Any, Any], extra: str) -> None:
    losses = [outcomes[extra, stage]["losses"][0] for stage in STAGES]
    assert losses == pytest.approx([losses[0]] * len(STAGES), rel=1e-5)


def check(outcome: dict[str, Any], has_accuracy: bool) -> None:
    assert outcome["finite"]
    assert outcome["moved"] > 1e-4
    assert outcome["same"]
    assert outcome["losses"][0] == outcome["losses"][1]
    if has_accuracy:
        assert 0 <= outcome["robust_acc"] <= 1
    else:
        assert outcome["robust_acc"] is None


@pytest.mark.parametrize(("attack", "objective"), sorted(REFUSED))
def test_what_makes_no_sense_is_refused(attack: str, objective: str) -> None:
    with pytest.raises(ConfigError, match=r"dat\.(attack|objective)\.name"):
        load_config(settings(attack, objective, 2, ""))


@pytest.mark.parametrize(("attack", "objective"), PAIRS)
def test_it_prints_itself(attack: str, objective: str, tmp_path: Path) -> None:
    run = load_config(settings(attack, objective, 2, str(tmp_path)))
    assert load_config(run.to_dict()).to_dict() == run.to_dict()
