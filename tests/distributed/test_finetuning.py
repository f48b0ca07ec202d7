"""Fine-tuning on two ranks: rates by layer, frozen parameters and adapters at every ZeRO stage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dat_ds.finetuning.lora import merged
from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import weights_of

DECAY, LR, MICRO_BATCH = 0.5, 0.01, 4
RULES = [{"match": "mlp.fc1.bias$", "lr": 3.0}, {"match": "^norm", "weight_decay": 0.5}]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": LR},
    "sgd": {"name": "sgd", "lr": LR, "weight_decay": 0.0},
    "lamb": {"name": "lamb", "lr": LR},
    "lars": {"name": "lars", "lr": LR, "trust_coefficient": 1.0},
    "muon": {"name": "muon", "lr": LR},
    "one_bit_adam": {"name": "one_bit_adam", "lr": LR, "freeze_step": 2},
    "one_bit_lamb": {"name": "one_bit_lamb", "lr": LR, "freeze_step": 2},
    "DeepSpeed's": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}},
}
STAGES = {
    **dict.fromkeys(("adamw", "sgd", "lamb"), (0, 1, 2, 3)),
    **dict.fromkeys(("lars", "muon", "DeepSpeed's"), (2, 3)),
    **dict.fromkeys(("one_bit_adam", "one_bit_lamb"), (0,)),
}
CASES = [(name, stage) for name, stages in STAGES.items() for stage in stages]
LORA = {"rank": 2, "alpha": 6.0}
FROZEN: dict[str, dict[str, Any]] = {
    "stem": {"parameters": [{"match": "^(patch_embed|pos_embed|cls_token)", "freeze": True}]},
    "probe": {"linear_probe": True},
    "lora": {"lora": LORA, "parameters": [{"match": "norm", "freeze": False}]},
}
# Optimizer, precision and average of the weights by ZeRO stage.
FREEZING = [
    *((kind, "adamw", stage, "float32", 0.5) for kind in ("stem", "lora") for stage in range(4)),
    *(("probe", "adamw", stage, "float32", 0.5) for stage in (0, 3)),
    *(("lora", "muon", stage, "float32", 0.0) for stage in (2, 3)),
    ("stem", "lamb", 1, "float32", 0.0),
    ("stem", "adamw", 2, "bf16", 0.5),
    *(("lora", "adamw", stage, "bf16", 0.5) for stage in (0, 3)),
    ("probe", "one_bit_adam", 0, "float32", 0.0),
    ("lora", "one_bit_adam", 0, "float32", 0.5),
    ("stem", "DeepSpeed's", 2, "float32", 0.0),
]


def start(
    name: str, stage: int, finetuning: dict[str, Any], *, precision: str = "float32", **dat: Any
) -> Any:
    import dat_ds

    section = OPTIMIZERS[name]
    config = tiny.config(
        stage,
        **tiny.PRECISIONS[precision],
        dat={"finetuning": finetuning, "attack": {"name": "none"}, **dat},
    )
    if "type" in section:
        config["optimizer"] = section
    else:
        del config["optimizer"]
        config["dat"]["optimizer"] = section
    return dat_ds.initialize(model=tiny.vit(), config=config)[0]


def step(engine: Any, number: int = 0) -> None:
    x, y = tiny.images(64)
    first = (number * engine.ranks.count + engine.ranks.rank) * MICRO_BATCH % 64
    engine.train_step([(x[first : first + MICRO_BATCH], y[first : first + MICRO_BATCH])])


def first_step(name: str, stage: int, finetuning: dict[str, Any]) -> dict[str, Any]:
    engine = start(name, stage, finetuning)
    before = {k: v.double() for k, v in weights_of(engine).items()}
    step(engine)
    moved = {k: v.double() - before[k] for k, v in weights_of(engine).items()}
    engine.close()
    return {"moved": moved, "before": before}


def rates_along(name: str, stage: int) -> list[list[float]]:
    """Rate of every group in each of four steps of a cosine after a warm-up."""
    from dat_ds.engine import hooks

    schedule = {"name": "cosine", "max_steps": 4, "epochs": 4, "warmup_epochs": 1}
    engine = start(name, stage, {"layer_decay": DECAY}, schedule=schedule)
    rates = []
    for number in range(4):
        groups = hooks.basic_optimizer(engine.deepspeed).param_groups
        rates.append([group["lr"] for group in groups])
        step(engine, number)
    engine.close()
    return rates


def first_steps() -> dict[str, Any]:
    report: dict[str, Any] = {}
    tuned = {"layer_decay": DECAY, "parameters": RULES}
    plain = {name: first_step(name, 0, {}) for name in OPTIMIZERS}
    for name, stage in CASES:
        report[f"{name} {stage}"] = (plain[name], first_step(name, stage, tuned))
    report["rates"] = {name: rates_along(name, 2) for name in ("adamw", "lamb", "DeepSpeed's")}
    return report


@pytest.fixture(scope="module")
def moves() -> dict[str, Any]:
    return run_ranks(first_steps, 2)[0]


def expected_factor(name: str) -> float:
    """By hand: 2 blocks, so that the classifier is layer 3 of 0 to 3; timm's norm is block 2's."""
    layers = {"blocks.0.": 1, "blocks.1.": 2, "norm.": 2, "head.": 3}
    layer = next((n for start, n in layers.items() if name.startswith(start)), 0)
    return DECAY ** (3 - layer) * (3.0 if name.endswith("mlp.fc1.bias") else 1.0)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_the_first_step_of_each_layer_is_its_rates_share(
    name: str, stage: int, moves: dict[str, Any]
) -> None:
    plain, tuned = moves[f"{name} {stage}"]
    factors, compared = set(), 0
    for key, moved in tuned["moved"].items():
        factor = expected_factor(key)
        base = plain["moved"][key]
        if key.startswith("norm."):  # decay of its own
            decay = 0.1 if name == "DeepSpeed's" else 0.0
            base = base - LR * (0.5 - decay) * plain["before"][key] * (name != "lars")
            if name in ("sgd", "lars"):
                continue  # their decay goes through momentum and ratio; tested by the unit tests
        # Weights of about 1 are rounded to 1e-7, and moves are as small as 1e-5.
        torch.testing.assert_close(moved, factor * base, rtol=2e-3, atol=2.5e-7, msg=key)
        if base.abs().max() > 1e-6:  # weights of nearly zero hardly move by trust ratios
            compared += 1
            factors.add(factor)
    assert len(factors) >= 5
    assert compared >= 26


@pytest.mark.parametrize("stage", range(4))
def test_a_step_of_sgd_is_the_gradient_times_the_layers_rate(
    stage: int, moves: dict[str, Any]
) -> None:
    model = tiny.vit()
    x, y = (part[: 2 * MICRO_BATCH] for part in tiny.images(64))
    F.cross_entropy(model(x), y).backward()
    _, tuned = moves[f"sgd {stage}"]
    for key, p in model.named_parameters():
        if key.startswith("norm."):
            continue
        moved = -LR * expected_factor(key) * p.grad.double()
        torch.testing.assert_close(tuned["moved"][key], moved, rtol=1e-3, atol=2.5e-7, msg=key)


def test_the_schedule_keeps_the_ratios(moves: dict[str, Any]) -> None:
    for name, rates in moves["rates"].items():
        factors = [rate / rates[0][0] for rate in rates[0]]
        assert rates[0][0] == LR  # the first is the classifier's, which logs show
        assert len({round(f, 6) for f in factors}) == 4, name
        assert len({row[0] for row in rates}) > 2, "the schedule moves"
        for row in rates:
            assert row == pytest.approx([row[0] * factor for factor in factors])


# ---- frozen parameters, adapters


def trained_and_resumed(case: tuple[str, str, int, str, float]) -> dict[str, Any]:
    """A run with a checkpoint in its middle: what it holds, and what goes on from it."""
    from dat_ds.engine import hooks
    from dat_ds.engine.unaveraged import unaveraged_weights
    from dat_ds.models.pretrained import read_weights

    kind, name, stage, precision, decay = case
    options = {"precision": precision, "ema": {"decay": decay}}
    with tempfile.TemporaryDirectory() as own:
        engine = start(name, stage, FROZEN[kind], **options)
        folder = engine.ranks.gather(own)[0]
        before = weights_of(engine)
        trained = [n for n, p in engine.module.named_parameters() if p.requires_grad]
        gradients = []
        for number in range(3):
            step(engine, number)
            gradients += [n for n, p in engine.module.named_parameters() if p.grad is not None]
        masters = hooks.master_weights(engine.deepspeed)
        held = {piece[0] for weights in masters for piece in weights.pieces}
        averaged = 0 if engine.ema is None else sum(t.numel() for t in engine.ema.averages)
        at_save = weights_of(engine)
        engine.save_checkpoint(folder, tag="here")
        raw = unaveraged_weights(Path(folder) / "here")
        step(engine, 3)
        unbroken = weights_of(engine)
        sent = dict(engine.metrics["bytes_sent"])
        engine.close()
        resumed = {}
        others = [stage] if name.startswith("one_bit") else [stage, (stage + 2) % 4]
        for other in others:
            engine = start(name, other, FROZEN[kind], **options)
            engine.load_checkpoint(folder, "here")
            step(engine, 3)
            resumed[other] = weights_of(engine)
            if engine.ema is not None:
                engine.save_checkpoint(folder, tag=f"then-{other}")
            engine.close()
        engine = start(name, stage, FROZEN[kind], **options)
        engine.load_checkpoint(folder, "here")
        with engine.frozen() as model, torch.no_grad():
            logits = model(tiny.images(8)[0]).float()
        saved = read_weights(Path(folder) / "here" / "model.safetensors")
        averages = {
            other: read_weights(Path(folder) / f"then-{other}" / "model.safetensors")
            for other in others
            if decay
        }
        engine.ranks.gather(0)
        engine.close()
    return {
        "before": before,
        "after": unbroken,
        "trained": trained,
        "gradients": gradients,
        "held": held,
        "averaged": averaged,
        "resumed": resumed,
        "unbroken": unbroken,
        "logits": logits,
        "saved": saved,
        "at_save": at_save,
        "raw": raw,
        "averages": averages,
        "sent": sent,
    }


def train_all() -> dict[Any, dict[str, Any]]:
    return {case: trained_and_resumed(case) for case in FREEZING}


@pytest.fixture(scope="module")
def frozen_runs() -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(train_all, 2)


@pytest.mark.parametrize("case", FREEZING, ids=str)
def test_frozen_parameters_stay_and_cost_nothing(
    case: Any, frozen_runs: list[dict[Any, dict[str, Any]]]
) -> None:
    run = frozen_runs[0][case]
    for name, before in run["before"].items():
        assert torch.equal(before, run["after"][name]) == (name not in run["trained"]), name
    assert set(run["gradients"]) <= set(run["trained"])
    assert set().union(*(r[case]["held"] for r in frozen_runs)) == set(run["trained"])
    numel = sum(run["before"][name].numel() for name in run["trained"])
    kind, _, stage, _, decay = case
    if decay and stage < 3:
        assert run["averaged"] == numel
    if kind == "probe":
        assert run["trained"] == ["head.weight", "head.bias"]
        assert run["sent"].get("gradients", 0) < 8 * (numel + 64)


@pytest.mark.parametrize("case", FREEZING, ids=str)
def test_a_run_goes_on_exactly_also_at_another_stage(
    case: Any, frozen_runs: list[dict[Any, dict[str, Any]]]
) -> None:
    run = frozen_runs[0][case]
    _, _, stage, precision, _ = case
    for other, weights in run["resumed"].items():
        for key, value in run["unbroken"].items():
            if other == stage:
                assert torch.equal(weights[key], value), key
            else:
                tolerance = 1e-2 if precision == "bf16" else 2e-5
                torch.testing.assert_close(weights[key], value, rtol=tolerance, atol=tolerance)
    averages = list(run["averages"].values())
    for key in averages[0] if averages else ():
        torch.testing.assert_close(averages[0][key], averages[-1][key], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", [c for c in FREEZING if c[0] == "lora"], ids=str)
def test_the_saved_model_holds_merged_weights(
    case: Any, frozen_runs: list[dict[Any, dict[str, Any]]]
) -> None:
    run = frozen_runs[0][case]
    _, _, _, precision, decay = case
    plain = tiny.vit()
    now = merged(run["at_save"], LORA["alpha"] / LORA["rank"])
    for key, value in run["raw"].items():
        tolerance = 1e-6 if precision == "float32" else 1e-2
        torch.testing.assert_close(value, now[key], rtol=tolerance, atol=tolerance, msg=key)
    state = {k: v.float() for k, v in run["saved"].items()}
    assert state.keys() == plain.state_dict().keys()
    changed = [k for k, v in plain.state_dict().items() if not torch.equal(v, state[k])]
    assert {k for k in changed if "weight" in k and "norm" not in k} >= {
        "blocks.0.attn.qkv.weight",
        "blocks.1.attn.proj.weight",
        "head.weight",
    }
    if precision == "float32":
        assert "blocks.0.mlp.fc1.weight" not in changed
    plain.load_state_dict(state)
    if not decay:  # without an average: what the engine computes with its adapters
        with torch.no_grad():
            logits = plain.eval()(tiny.images(8)[0])
        torch.testing.assert_close(logits, run["logits"], rtol=1e-4, atol=1e-5)
