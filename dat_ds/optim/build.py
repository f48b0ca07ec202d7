"""Optimizers of ``dat.optimizer``, built from torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed matrices and undecayed vectors, as timm does.

    Args:
        model: Any module.
        weight_decay: Decay of every parameter with at least two dimensions.

    Returns:
        At most two groups for a torch optimizer; empty groups are left out (ZeRO refuses them).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build the optimizer of ``dat.optimizer``.

    Args:
        model: Its trainable parameters are optimised.
        config: ``name`` (``"adamw"`` or ``"sgd"``), ``lr``, ``weight_decay`` and the optimizer's
            own keys: ``betas`` and ``eps``, or ``momentum`` and ``nesterov``.

    Raises:
        ValueError: For an unknown name.
    """
    groups, lr = parameter_groups(model, config["weight_decay"]), config["lr"]
    if config["name"] == "adamw":
        betas = (config["betas"][0], config["betas"][1])
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config["eps"])
    if config["name"] == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=config["momentum"], nesterov=config["nesterov"]
        )
    raise ValueError(f"optimizer.name={config['name']!r} is not one of adamw, sgd.")
