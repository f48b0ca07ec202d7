"""The weights that a user gets of a model in training: averaged over time and over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.engine import hooks
from dat_ds.finetuning.lora import merged
from dat_ds.models import PixelModel, save_weights

if TYPE_CHECKING:
    from dat_ds.engine.adversarial import AdversarialEngine


@contextlib.contextmanager
def exported_weights(engine: AdversarialEngine) -> Iterator[None]:
    """Put averages in the place of an engine's weights and buffers, until exit; a collective."""
    with _averaged_weights(engine), _averaged_over_ranks(engine):
        yield


def spec_of(engine: AdversarialEngine) -> Mapping[str, Any]:
    """How the engine's model is built again; empty for a model of the user's own."""
    return engine.module.spec if isinstance(engine.module, PixelModel) else {}


def exported_state(engine: AdversarialEngine) -> dict[str, Tensor]:
    """The whole model's state with the weights of this moment, adapters merged; a collective.

    Returns:
        On rank 0, names to tensors on the CPU; empty on other ranks.
    """
    state = hooks.full_state_dict(engine.deepspeed)
    lora = engine.run.dat.finetuning.lora
    return state if lora is None else merged(state, lora.scale)


def write_model(engine: AdversarialEngine, folder: Path) -> None:
    """Write the engine's model with the weights of this moment; a collective.

    Raises:
        CheckpointError: If it cannot be written.
    """
    state = exported_state(engine)
    with engine.ranks.together():
        if engine.ranks.is_main:
            save_weights(folder, state, spec_of(engine))


@contextlib.contextmanager
def _averaged_weights(engine: AdversarialEngine) -> Iterator[None]:
    if engine.ema is None:
        yield
        return
    try:
        with engine.ema.swapped_in():
            hooks.release_parameters(engine.deepspeed)
            yield
    finally:
        hooks.release_parameters(engine.deepspeed)


@contextlib.contextmanager
def _averaged_over_ranks(engine: AdversarialEngine) -> Iterator[None]:
    """Replace what ranks have of their own by its mean over them, until exit.

    These are floating-point buffers, and the weights of replicas that step by themselves.
    """
    own = [b for b in engine.module.buffers() if b.is_floating_point()]
    if engine.replicas_differ:
        own += hooks.held_weights(engine.deepspeed)
    if engine.ranks.count == 1 or not own:
        yield
        return
    saved = [tensor.clone() for tensor in own]
    for tensor in own:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        mean = tensor.to(wide, copy=True)
        dist.all_reduce(mean)
        tensor.copy_(mean.div_(engine.ranks.count))
    try:
        yield
    finally:
        for tensor, value in zip(own, saved, strict=True):
            tensor.copy_(value)
