"""A first config for data of one's own: what a few answers and usual values come to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dat_ds.attacks.threat import NORMS
from dat_ds.config import load_config
from dat_ds.config.reference import meanings
from dat_ds.data.method import named_data
from dat_ds.errors import ConfigError
from dat_ds.files import replace_text

_SMALL = ("cifar10", "cifar100", "npz")
_EPS: dict[str, dict[str, str | float]] = {
    # RobustBench's balls for CIFAR-10 and ImageNet; that of our digits.
    "linf": {"digits": "2/16", "small": "8/255", "large": "4/255"},
    "l2": {"digits": 0.5, "small": 0.5, "large": 3.0},
    "l1": {"digits": 2.0, "small": 12.0, "large": 75.0},
}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a first config is made of; None leaves a usual value.

    Args:
        data: ``"NAME:PATH"`` of a dataset, or a path: a folder with ``train``, or an npz file.
        model: Name of a timm model, or ``hf:PATH``.
        pretrained: File or run with weights to start from.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius in pixel units, as text.
        gpus: Number of GPUs; 0 for the CPU.
    """

    data: str
    model: str | None = None
    pretrained: str | None = None
    norm: str = "linf"
    eps: str | None = None
    gpus: int = 0


def first_config(answers: Answers) -> dict[str, Any]:
    """A complete run config.

    Raises:
        ConfigError: For answers that make none, with all problems.
    """
    named = _dataset(answers.data)
    name = named["name"]
    problems = []
    if answers.norm not in NORMS:
        problems.append(f"--norm {answers.norm}: write one of {', '.join(NORMS)}.")
    if answers.gpus < 0:
        problems.append(f"--gpus {answers.gpus}: write 0 for the CPU, or how many.")
    if problems:
        raise ConfigError("\n".join(problems))
    size = "digits" if name == "digits" else "small" if name in _SMALL else "large"
    starts = answers.pretrained is not None or (answers.model or "").startswith("hf:")
    data: dict[str, Any] = dict(named)
    data["augment"] = {
        "digits": "crop",  # a mirrored digit is not a digit
        "small": "crop_flip",
        "large": "resized_crop_flip",
    }[size]
    if answers.gpus:
        data["num_workers"] = 8
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 32 if size == "large" else 64,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4 if starts else 1e-3, "weight_decay": 0.05},
        },
        "zero_optimization": {"stage": 2 if answers.gpus > 1 else 0},
        "dat": {
            **_model(answers, size),
            "data": data,
            "threat_model": {
                "norm": answers.norm,
                "eps": _EPS[answers.norm][size] if answers.eps is None else answers.eps,
            },
            "attack": {"name": "pgd", "steps": 3, "step_size": "eps/2"},
            "schedule": {"name": "cosine", "epochs": 30, "warmup_epochs": 3},
            "evaluation": {"attacks": ["pgd-20"]},
        },
    }
    if answers.gpus:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    load_config(config)
    return config


def _dataset(text: str) -> dict[str, str]:
    """Name and path of the data that ``text`` stands for, as keys of ``dat.data``."""
    if os.path.isdir(text):
        return {"name": "imagefolder", "path": text}
    if text.endswith(".npz") and not text.startswith("npz:"):
        return {"name": "npz", "path": text}
    return named_data(text)


def _model(answers: Answers, size: str) -> dict[str, Any]:
    """The section of the model; none for the digits, which have a usual one."""
    if answers.model is None and size == "digits":
        return {}
    model: dict[str, Any] = {"name": answers.model or "vit_small_patch16_224"}
    if answers.model is None and size == "small":
        model = {"name": "resnet18", "stem": "cifar", "options": {"channels": [64, 128, 256, 512]}}
    if answers.pretrained is not None:
        model["pretrained"] = answers.pretrained
    return {"model": model}


def write_first(answers: Answers, file: Path) -> str:
    """Write a first config.

    Args:
        answers: What it is made of.
        file: It must not be there.

    Returns:
        What each of its keys means, and the commands that follow.

    Raises:
        ConfigError: For answers that make none, and a file that is there.
    """
    if file.exists():
        raise ConfigError(f"--output {file} is there already: choose another name, or remove it.")
    config = first_config(answers)
    replace_text(file, json.dumps(config, indent=2) + "\n")
    rows = list(_explained(config))
    width = max(len(key) for key, _, _ in rows)
    shown = max(len(value) for _, value, _ in rows)
    lines = [f"{key:{width}}  {value:{shown}}  {meaning}".rstrip() for key, value, meaning in rows]
    launch = "dat-ds train"
    if answers.gpus > 1:
        launch = f"torchrun --no-python --nproc_per_node {answers.gpus} dat-ds train"
    lines += [
        "",
        f"{file} is written. --set dat.attack.steps=10 changes a key of it; all keys are in "
        "docs/config.md.",
    ]
    if "model" in config["dat"] and not answers.pretrained:
        lines.append("The model starts from random weights, unless --pretrained FILE names some.")
    lines += [
        "",
        f"    {launch} --deepspeed_config {file}",
        "    dat-ds eval RUN --attacks standard --report",
        "    dat-ds export RUN --to timm",
    ]
    return "\n".join(lines)


def _explained(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and meaning of each key of ours."""
    for section, values in config["dat"].items():
        means = meanings(section, values.get("name"))
        for key, value in values.items():
            yield f"dat.{section}.{key}", json.dumps(value), means.get(key, "")
