"""Optimizers by name, from the ``dat.optimizer`` section of a run config."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dat_ds.optim.lamb import Lamb
from dat_ds.optim.lars import Lars
from dat_ds.optim.one_bit_adam import OneBitAdam
from dat_ds.optim.one_bit_lamb import OneBitLamb
from dat_ds.optim.zero_one_adam import ZeroOneAdam

Groups = list[dict[str, Any]]


def _adamw(
    params: Groups,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101."""
    return torch.optim.AdamW(params, lr, (betas[0], betas[1]), eps, weight_decay)


def _sgd(
    params: Groups,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Defaults of adversarial training on CIFAR-10: Rice et al., ICML 2020, arXiv 2002.11569."""
    return torch.optim.SGD(
        params, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lamb": Lamb,
    "lars": Lars,
    "one_bit_adam": OneBitAdam,
    "one_bit_lamb": OneBitLamb,
    "zero_one_adam": ZeroOneAdam,
}
"""Each takes parameter groups and the keys of ``dat.optimizer`` that it names, with defaults."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "lamb": {
        "modern": {"adapt_vectors": False},
        "paper": {"adapt_vectors": True, "bias_correction": False, "upper": 10.0},
    },
    "lars": {
        "modern": {"adapt_vectors": False},
        "paper": {
            "adapt_vectors": True,
            "scaled": "momentum",
            "trust_coefficient": 1.0,
            "upper": 10.0,
            "lr": 0.01,
        },
    },
}
"""Defaults of the layer-wise optimizers, of which ``modern`` is the first.

``modern`` is what timm and NVLAMB do; ``paper`` the bounded rule of Zhang et al., UAI 2022, arXiv
2206.06257, on every tensor. ``adapt_vectors`` says whether vectors have trust ratios.
"""


def optimizer_options(name: str, preset: str | None = None) -> dict[str, Any]:
    """Options of an optimizer by name and their defaults, as JSON has them.

    Args:
        name: One of :data:`OPTIMIZERS`.
        preset: One of :data:`PRESETS`, of an optimizer that has them. Default: its first.
    """
    options = {
        key: list(p.default) if isinstance(p.default, tuple) else p.default
        for key, p in inspect.signature(OPTIMIZERS[name]).parameters.items()
        if key != "params"
    }
    if name in PRESETS:
        preset = preset or next(iter(PRESETS[name]))
        options |= {**PRESETS[name][preset], "preset": preset}
    return options


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
    """Build an optimizer from the keys of ``dat.optimizer``.

    Args:
        model: Its trainable parameters are optimised.
        config: ``name`` and that optimizer's options; one that is None has its default.

    Raises:
        ValueError: For an unknown name or option.
    """
    options = {key: value for key, value in config.items() if value is not None}
    name = options.pop("name")
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name={name!r} is not one of {', '.join(OPTIMIZERS)}.")
    known = optimizer_options(name, options.get("preset"))
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"optimizer {name!r} has no option {', '.join(unknown)}: {', '.join(known)}."
        )
    options = {**known, **options}
    groups = parameter_groups(model, options["weight_decay"])
    if name in PRESETS:
        del options["preset"]
        adapt_vectors = options.pop("adapt_vectors")
        for group in groups:
            group["adapt"] = adapt_vectors or group["params"][0].ndim > 1
    return OPTIMIZERS[name](groups, **options)
