"""The messages that the page on troubleshooting explains are those that users get."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_ds.assembly import build_data_of
from dat_ds.attacks import ThreatModel, pgd
from dat_ds.config import load_config
from dat_ds.errors import UserError
from dat_ds.models import build_model, load
from tests.docs.pages import DOCS

PAGE = DOCS / "howto" / "troubleshooting.md"
RUN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    "zero_optimization": {"stage": 2},
    "dat": {},
}
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
X, Y = torch.linspace(0, 1, 4 * 48).view(4, 3, 4, 4), torch.tensor([1, 2, 3, 4])


def config(**sections: Any) -> Any:
    """A run whose top-level keys are these; ``dat`` ones are written ``dat_KEY``."""
    values = copy.deepcopy(RUN)
    for key, value in sections.items():
        place = values["dat"] if key.startswith("dat_") else values
        place[key.removeprefix("dat_")] = value
    return load_config({key: value for key, value in values.items() if value is not None})


def attacked(model: Callable[[Tensor], Any] = MODEL, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return pgd(model, x, y, threat=ThreatModel("linf", "8/255"), steps=1)


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return MODEL(x)


CONFIG: list[Callable[[], Any]] = [
    lambda: config(dat_atack={"name": "pgd"}),
    lambda: config(zero_optimisation={"stage": 1}),
    lambda: config(dat_threat_model={"eps": 8}),
    lambda: config(dat_threat_model={"eps": "8/0"}),
    lambda: config(dat_attack={"name": "n_fgsm"}, dat_threat_model={"norm": "l2", "eps": 0.5}),
    lambda: config(dat_attack={"name": "pgd", "loss": "kl", "random_start": False}),
    lambda: config(dat_evaluation={"attacks": ["pgd20"]}),
    lambda: config(optimizer=None),
    lambda: config(dat_optimizer={"name": "lamb"}),
    lambda: config(scheduler={"type": "WarmupLR", "params": {}}),
    lambda: config(bf16={"enabled": True}, fp16={"enabled": True}),
    lambda: config(optimizer={"type": "OneBitAdam", "params": {"lr": 0.001}}),
    lambda: config(
        zero_optimization={"stage": 3}, dat_attack={"name": "pgd", "fold_batch_norm": True}
    ),
    lambda: config(dat_attack={"name": "mine:Mine"}),
    lambda: config(wandb={"enabled": True}),
]
INPUTS: list[Callable[[], Any]] = [
    lambda: attacked(x=X * 252.36714 + 1.03886),
    lambda: attacked(x=X * 3.9587 - 1.9837),
    lambda: attacked(x=(X * 255).byte()),
    lambda: attacked(x=X / 0 * 0),
    lambda: attacked(x=torch.rand(4, 8, 8, 3)),
    lambda: attacked(y=torch.tensor([9, 1, 2, 3])),
    lambda: attacked(without_graph),
    lambda: attacked(lambda x: MODEL(x).argmax(1)),
    lambda: attacked(lambda x: (MODEL(x), x.flatten(1))),
    lambda: build_model("resnet81", num_classes=3),
    lambda: build_model("vit_tiny_patch16_224", num_classes=3, img_size=30, depth=1),
    lambda: build_data_of(config(dat_data={"name": "imagefolder", "path": "nowhere"})),
    lambda: load("nowhere"),
]


def listed(heading: str) -> list[str]:
    """Messages in the first column of a section's table."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "mistakes"), [("Config", CONFIG), ("Images, labels, models", INPUTS)]
)
def test_the_messages_on_the_page_are_the_ones_that_users_get(
    heading: str, mistakes: list[Callable[[], Any]], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dat_ds.config.deepspeed.sections.is_installed", lambda module: False)
    messages = listed(heading)
    assert len(messages) == len(mistakes)
    for message, mistake in zip(messages, mistakes, strict=True):
        with pytest.raises(UserError) as caught:
            mistake()
        assert str(caught.value).startswith(message), message
