"""The attack in 16 bits: same direction, exact ball, no underflow, retries taken together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.errors import ConfigError
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks

BATCH, EPS, CONFIDENCE = 8, 0.1, 50.0
STAGES_OF = {
    "float32": (0,),
    "bf16": (0, 1, 2, 3),
    "autocast": (0, 1, 2, 3),
    "fp16": (0, 1, 2, 3),
}
SETTINGS = [(precision, stage) for precision, stages in STAGES_OF.items() for stage in stages]
HALF = [setting for setting in SETTINGS if setting[0] != "float32"]
FP16 = [setting for setting in SETTINGS if setting[0] == "fp16"]


def confident_vit() -> nn.Module:
    """A ViT that is sure of its predictions: the largest logit lies far above the others."""
    model = tiny.vit()
    with torch.no_grad():
        model.head.weight.mul_(CONFIDENCE)  # type: ignore[union-attr,operator]
        model.head.bias.add_(torch.tensor([60.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]
    return model


class _Spoil(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Spoiled(nn.Module):
    """A ViT whose first input gradients are infinite, on one rank only."""

    def __init__(self, num_spoiled: int) -> None:
        super().__init__()
        self.body, self.num_spoiled, self.num_forwards = tiny.vit(), num_spoiled, 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        spoil = self.num_forwards <= self.num_spoiled
        return self.body(_Spoil.apply(x, float("inf") if spoil else 1.0))


def start(model: nn.Module, precision: str, stage: int, **dat: Any) -> Any:
    import dat_ds

    config = tiny.config(
        stage,
        train_micro_batch_size_per_gpu=BATCH,
        optimizer={"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        dat=dat,
        **tiny.PRECISIONS[precision],
    )
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return dat_ds.initialize(model=model, config=config)[0]


def attack_random_model(precision: str, stage: int) -> dict[str, Any]:
    engine = start(tiny.vit(), precision, stage)
    x, y = tiny.images(BATCH)
    x_adv = engine.attack(x, y)
    engine.close()
    return {"x_adv": x_adv}


def attack_confident_model(precision: str, stage: int) -> dict[str, Any]:
    """Also what the plain gradient of the mean loss is: the reason for normalising."""
    engine = start(confident_vit(), precision, stage, attack={"steps": 1, "step_size": 0.04})
    x, _ = tiny.images(BATCH)
    with engine.frozen() as model:
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        y = logits.argmax(dim=1)
        (plain,) = torch.autograd.grad(F.cross_entropy(logits, y), leaf)
    gradient = engine.inner.input_gradient()
    x_adv = engine.attack(x, y, gradient=gradient)
    engine.close()
    return {
        "confidence": F.cross_entropy(logits.double(), y, reduction="none").max().item(),
        "plain zero share": (plain == 0).double().mean().item(),
        "zero share": float(gradient.num_zero) / gradient.num_entries,
        "non-finite": float(gradient.num_non_finite),
        "x_adv": x_adv,
    }


def attack_spoiled_model(stage: int, num_spoiled: int, resident_gib: float) -> dict[str, Any]:
    from dat_ds.engine.launch import setup_ranks

    rank = setup_ranks().rank
    model = Spoiled(num_spoiled if rank == 1 else 0)
    engine = start(
        model,
        "fp16",
        stage,
        attack={"steps": 2, "step_size": 0.04},
        engine={"resident_parameters_gib": resident_gib},
    )
    x, y = tiny.images(BATCH, seed=rank)
    gradient = engine.inner.input_gradient()
    x_adv = engine.attack(x, y, gradient=gradient)
    engine.close()
    return {
        "forwards": model.num_forwards,
        "retries": gradient.num_retries,
        "non-finite": int(gradient.num_non_finite),
        "x_adv": x_adv,
    }


def overfit(precision: str, stage: int) -> list[float]:
    # A class token ignores the patches at first: its loss leaves that plateau after 10 steps or
    # after 200, as rounding decides. The mean of the patches has none.
    model = tiny.vit(global_pool="avg", class_token=False)
    engine = start(model, precision, stage, attack={"steps": 1, "step_size": 0.02})
    # Classes differ in their colours.
    noise, y = tiny.images(BATCH, seed=engine.ranks.rank)
    colours = torch.rand(tiny.CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    x = 0.8 * colours[y] + 0.2 * noise
    losses = []
    for _ in range(60):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(engine.metrics["loss"])
    engine.close()
    return losses


def refusal(model: nn.Module, precision: str) -> str:
    import dat_ds

    with pytest.raises(ConfigError) as error:
        dat_ds.initialize(model=model, config=tiny.config(1, **tiny.PRECISIONS[precision]))
    return str(error.value)


def refusals() -> dict[str, str]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False  # some CPUs do support it
    messages = {"fp16 unsupported": refusal(tiny.vit(), "fp16")}
    allow_fp16()
    for precision in ("bf16", "fp16"):
        messages[f"BatchNorm in {precision}"] = refusal(tiny.cnn(), precision)
    return messages


SPOILED = [(2, 1, 4.0), (3, 1, 4.0), (3, 1, 0.0), (2, 100, 4.0)]


def measure() -> dict[Any, Any]:
    reports: dict[Any, Any] = {"refusals": refusals()}
    for precision, stage in SETTINGS:
        reports["random", precision, stage] = attack_random_model(precision, stage)
        reports["confident", precision, stage] = attack_confident_model(precision, stage)
    for case in SPOILED:
        reports["spoiled", case] = attack_spoiled_model(*case)
    # The attack above covers each stage; training is covered by one stage per precision.
    for precision, stage in (("float32", 0), ("bf16", 1), ("autocast", 0), ("fp16", 2)):
        reports["overfit", precision] = overfit(precision, stage)
    for stage in (0, 3):
        reports["overfit", f"fp16 stage {stage}"] = overfit("fp16", stage)
    return reports


@pytest.fixture(scope="module")
def by_rank() -> list[dict[Any, Any]]:
    return run_ranks(measure, 2)


@pytest.fixture(scope="module")
def reports(by_rank: list[dict[Any, Any]]) -> dict[Any, Any]:
    return by_rank[0]


@pytest.mark.parametrize(("precision", "stage"), HALF)
def test_adversarial_images_agree_with_float32(
    reports: dict[Any, Any], precision: str, stage: int
) -> None:
    x_adv = reports["random", precision, stage]["x_adv"]
    reference = reports["random", "float32", 0]["x_adv"]
    agreement = (x_adv - reference).abs().le(1e-6).double().mean().item()
    # float16 rounds eight times finer than bfloat16, so fewer signs of small gradients flip.
    assert agreement >= (0.99 if precision == "fp16" else 0.95)


@pytest.mark.parametrize(("precision", "stage"), SETTINGS)
@pytest.mark.parametrize("model", ["random", "confident"])
def test_adversarial_images_stay_in_the_ball(
    reports: dict[Any, Any], model: str, precision: str, stage: int
) -> None:
    x, _ = tiny.images(BATCH)
    x_adv = reports[model, precision, stage]["x_adv"]
    assert x_adv.dtype == torch.float32
    distance = (x_adv.double() - x.double()).abs().max().item()
    assert 0.9 * EPS < distance <= EPS + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize(("precision", "stage"), FP16)
def test_confident_samples_keep_their_gradient_in_fp16(
    reports: dict[Any, Any], precision: str, stage: int
) -> None:
    report = reports["confident", precision, stage]
    assert report["confidence"] < 1e-6
    assert report["plain zero share"] > 0.9  # what the gradient of the mean loss would give
    assert report["zero share"] < 0.01
    assert report["non-finite"] == 0
    reference = reports["confident", "float32", 0]["x_adv"]
    assert (report["x_adv"] - reference).abs().le(1e-6).double().mean() >= 0.98


@pytest.mark.parametrize("case", [case for case in SPOILED if case[1] == 1])
def test_ranks_retry_a_non_finite_gradient_together(
    by_rank: list[dict[Any, Any]], case: tuple[int, int, float]
) -> None:
    for report in (of_rank["spoiled", case] for of_rank in by_rank):
        assert report["forwards"] == 3  # two steps, the first one twice, on both ranks
        assert report["retries"] == 1
        assert report["non-finite"] == 0


def test_gradient_that_stays_non_finite_is_zeroed_and_counted(
    by_rank: list[dict[Any, Any]],
) -> None:
    from dat_ds.attacks import SampleGenerator
    from dat_ds.attacks.noise import rand_like

    good, bad = (of_rank["spoiled", SPOILED[-1]] for of_rank in by_rank)
    assert good["forwards"] == bad["forwards"] == 8  # two steps of one try and three retries
    assert good["retries"] == bad["retries"] == 6
    assert good["non-finite"] == 0
    assert bad["non-finite"] == 2 * BATCH
    # Two steps of length zero leave the random start.
    x, _ = tiny.images(BATCH, seed=1)
    noise = rand_like(x, SampleGenerator(0, 0, 0)) * 2 * EPS - EPS
    assert (bad["x_adv"] - (x + noise).clamp(0, 1)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "name", ["float32", "bf16", "autocast", "fp16", "fp16 stage 0", "fp16 stage 3"]
)
def test_training_reduces_the_loss(by_rank: list[dict[Any, Any]], name: str) -> None:
    for losses in (of_rank["overfit", name] for of_rank in by_rank):
        assert losses[-1] < 0.7 * losses[0]


def test_fp16_without_device_support_is_refused(reports: dict[Any, Any]) -> None:
    message = reports["refusals"]["fp16 unsupported"]
    assert "fp16.enabled" in message
    assert '"bf16": {"enabled": true}' in message
    assert '"torch_autocast": {"enabled": true}' in message


def test_batch_norm_in_16_bits_is_refused_in_favour_of_autocast(reports: dict[Any, Any]) -> None:
    for precision, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        message = reports["refusals"][f"BatchNorm in {precision}"]
        assert "BatchNorm" in message
        assert f'"torch_autocast": {{"enabled": true, "dtype": "{dtype}"}}' in message
