"""Tiny models, data and configs that the distributed tests share."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

SIZE, CLASSES = 8, 4


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        **options,
    )


def cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


MODELS = {"vit": vit, "cnn": cnn}


def images(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "fp16": {"fp16": {"enabled": True}},
}
"""Config sections by precision; fp16 needs ``harness.allow_fp16()`` on a CPU."""


def config(stage: int, **sections: Any) -> dict[str, Any]:
    """A run config; ``dat`` and DeepSpeed keys given as keywords are merged in."""
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "zero_optimization": {"stage": stage},
        "dat": {
            "threat_model": {"eps": 0.1},
            "attack": {"steps": 3, "step_size": 0.04},
            "schedule": {"name": "constant"},
        },
    }
    if stage == 3:
        # Otherwise DeepSpeed leaves parameters this small whole.
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    sections = copy.deepcopy(sections)
    values["dat"].update(sections.pop("dat", {}))
    values["zero_optimization"].update(sections.pop("zero_optimization", {}))
    values.update(sections)
    return values
