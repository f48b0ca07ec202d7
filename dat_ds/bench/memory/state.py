"""Memory of an optimizer, by element of what it updates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dat_ds.bench.memory.trace import LiveBytes
from dat_ds.config import RunConfig, one_bit_name
from dat_ds.config.deepspeed.optimizer import ADAM_NAMES
from dat_ds.errors import ConfigError

_SIDE = 64  # of the matrix that is probed


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes of an optimizer for each float32 element that it updates.

    Attributes:
        state: Kept from step to step: 8 for Adam's two moments.
        transient: The most that a step makes and lets go of, of the tensors that it works on.
        whole: Whether a step works on all of its tensors at once, and not on one after the other.
    """

    state: float
    transient: float
    whole: bool


def optimizer_bytes(run: RunConfig, device_type: str) -> OptimizerBytes:
    """What the optimizer of a run takes, found by two steps of it for one small matrix.

    DeepSpeed's own Adam kernels, which an accelerator runs, cannot be built without one: they keep
    two float32 moments and work in place.

    Args:
        run: Adapted to the device.
        device_type: Where the optimizer's states lie, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: For an optimizer whose memory is not known.
    """
    section = run.deepspeed.get("optimizer")
    if run.dat.optimizer is None and section is not None and one_bit_name(run.deepspeed) is None:
        name, params = section["type"].lower(), section["params"]
        if name in ADAM_NAMES and not params.get("torch_adam"):
            return OptimizerBytes(8.0, 0.0, whole=False)
    layer = nn.Linear(_SIDE, _SIDE, bias=False)
    try:
        optimizer = _build(run, layer)
        for _ in range(2):  # the first makes the states
            layer.weight.grad = torch.ones_like(layer.weight)
            live = LiveBytes()
            live.leave_out(_held(optimizer, layer))
            with live:
                optimizer.step()
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        name = section["type"] if run.dat.optimizer is None and section else "dat.optimizer"
        raise ConfigError(
            f"The memory of the optimizer {name!r} is not known without its ranks ({error}): "
            "measure it, or predict with 'AdamW'."
        ) from error
    states = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() > 1
    )
    count = layer.weight.numel()
    whole = device_type != "cpu" and run.dat.optimizer is None
    return OptimizerBytes(states / count, math.ceil(10 * live.peak / count) / 10, whole)


def _held(optimizer: torch.optim.Optimizer, layer: nn.Linear) -> Iterator[Tensor]:
    yield layer.weight
    if layer.weight.grad is not None:
        yield layer.weight.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _build(run: RunConfig, layer: nn.Linear) -> torch.optim.Optimizer:
    """The run's optimizer for one layer."""
    ours = run.dat.optimizer
    if one_bit_name(run.deepspeed) is not None or (ours is not None and ours.compresses):
        raise ConfigError("1-bit optimizers keep errors of every rank")
    if ours is not None:
        return ours.build(layer)
    section = run.deepspeed["optimizer"]
    not_torchs = ("torch_adam", "adam_w_mode", "bias_correction", "set_grad_none")
    params = {key: value for key, value in section["params"].items() if key not in not_torchs}
    name = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad", "sgd": "SGD"}
    kind = getattr(torch.optim, name.get(section["type"].lower(), section["type"]), None)
    if kind is None:
        raise ConfigError(f"torch.optim has no {section['type']!r}")
    if section["type"].lower() == "adam" and section["params"].get("adam_w_mode", True):
        kind = torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind([layer.weight], **params)
    return optimizer
