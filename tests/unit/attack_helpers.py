"""What the tests of attacks share: models, batches, and every attack under every norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_ds.attacks import ATTACKS, MODEL_MODES, NORMS, build_attack
from tests.settings import IMAGE_ATTACKS

STEPS: dict[str, Any] = {"steps": 3, "step_size": "2/255"}
OPTIONS: dict[str, dict[str, Any]] = {
    "pgd": STEPS,
    "fgsm": {},
    "fgsm_rs": {},
    "n_fgsm": {},
    "mim": STEPS,
    "apgd": {"steps": 3},
    "fat": STEPS,
    "multi_norm": STEPS,
}
EPS = {"linf": "8/255", "l2": 0.5, "l1": 4.0}
DEFINED = [(name, norm) for name in IMAGE_ATTACKS for norm in ATTACKS[name].norms]


def attack_named(name: str, norm: str, model_mode: str = "eval", **options: Any) -> Any:
    threat = {"norm": norm, "eps": EPS[norm]}
    if name == "multi_norm":
        options["other_norms"] = {other: EPS[other] for other in NORMS if other != norm}
    taken = ATTACKS[name].known_keys()
    options = {k: v for k, v in {**OPTIONS.get(name, {}), **options}.items() if k in taken}
    return build_attack({"name": name, "threat_model": threat, "model_mode": model_mode, **options})


class Net(nn.Module):
    """Conv, BatchNorm, dropout and a module that replaces its buffer; forwards are counted."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen_norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 4, 3)
        self.register_buffer("calls_in_training", torch.zeros((), dtype=torch.int64))
        self.fail_at, self.num_forwards = fail_at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise RuntimeError("boom")
        if self.training:
            self.calls_in_training = self.calls_in_training + 1  # a new tensor, not in place
        h = self.frozen_norm(self.norm(self.conv(x)).relu())
        return self.head(self.drop(h.flatten(1)))


def model_in_training(fail_at: int | None = None) -> Net:
    """A training model with a frozen part, mixed modes, and gradients here but not there."""
    model = Net(fail_at).train()
    model.frozen_norm.eval().requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def batch(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(size, 1, 4, 4, generator=generator, dtype=dtype)
    return x, torch.arange(size) % 3


def trace(model: Net, x: Tensor) -> dict[str, Any]:
    """Everything an attack must leave as it was."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "no_grad_yet": [name for name, p in model.named_parameters() if p.grad is None],
        "enabled": torch.is_grad_enabled(),
        "x_requires_grad": x.requires_grad,
        "tensors": [
            *(t.clone() for t in model.state_dict().values()),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            torch.get_rng_state(),
            x.detach().clone(),
        ],
    }


def assert_no_trace(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors, left = before.pop("tensors"), after.pop("tensors")
    assert after == before
    assert len(left) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(left, tensors, strict=True))


every_attack = pytest.mark.parametrize("name", IMAGE_ATTACKS)
every_norm = pytest.mark.parametrize("norm", NORMS)
every_attack_and_norm = pytest.mark.parametrize(("name", "norm"), DEFINED)
every_mode = pytest.mark.parametrize("model_mode", MODEL_MODES)


def linear(classes: int = 2, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Linear(16, classes, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(scale)
    return nn.Sequential(nn.Flatten(), layer)


def mid_range(dtype: torch.dtype = torch.float64, size: int = 6) -> tuple[Tensor, Tensor]:
    """Pixels in [0.4, 0.6], so that a ball of radius 0.1 is never clipped."""
    x, _ = batch(size, dtype)
    return 0.4 + 0.2 * x, torch.arange(size) % 2


def worst_direction(model: nn.Module, y: Tensor) -> Tensor:
    """``w_other - w_y`` of each sample of a two-class linear model."""
    weight = model[1].weight.detach()
    return (weight[1 - y] - weight[y]).view(-1, 1, 4, 4)


CLOSED_FORM = {torch.float64: {"rtol": 0, "atol": 1e-15}, torch.float32: {"rtol": 0, "atol": 2e-7}}
