"""A whole run, small enough to take a second: two epochs of a few digits, one small ViT or CNN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VIT = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 4,
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "drop_rate": 0.1,
}
CNN = {"name": "resnet18", "stem": "cifar", "options": {"channels": [8, 8, 8, 8]}}


def config(output: Path, *, model: dict[str, Any] | None = None, **dat: Any) -> dict[str, Any]:
    """A complete run config; keywords replace sections of ``dat``."""
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
        "zero_optimization": {"stage": 2},
        "dat": {
            "model": model or VIT,
            "data": {
                "name": "synthetic",
                "num_train": 100,
                "num_test": 20,
                "num_classes": 4,
                "image_shape": [1, 8, 8],
            },
            "threat_model": {"eps": "2/16"},
            "attack": {"steps": 2, "step_size": "1/16"},
            "schedule": {"epochs": 2, "warmup_epochs": 0.5},
            "ema": {"decay": 0.9},
            "evaluation": {
                "attacks": ["pgd-5"],
                "validation_attack": "pgd-2",
                "validation_every_epochs": 1,
                "pictures": 2,
            },
            "checkpoint": {"every_steps": 5},
            "logging": {"every_steps": 1},
            "output_dir": str(output),
            **dat,
        },
    }


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``."""
    return rows_of(run / "metrics.jsonl")
