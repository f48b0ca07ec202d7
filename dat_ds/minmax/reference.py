"""The model as it was at the start, which some objectives compare with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dat_ds.casting import LayerCasts
from dat_ds.errors import ConfigError
from dat_ds.finetuning.lora import without_adapters
from dat_ds.models.replicas import share_from_first_rank


def frozen_copy(model: nn.Module, objective: str, *, remedy: str) -> nn.Module:
    """A model as it is now, frozen, in evaluation mode.

    Args:
        model: Its parameters are whole.
        objective: Name of the objective that asks for it.
        remedy: Advice for the case that DeepSpeed has sharded its parameters already.

    Raises:
        ConfigError: If it has.
    """
    if any(hasattr(p, "ds_status") for p in model.parameters()):
        raise ConfigError(
            f"dat.objective.name={objective!r} copies the model before training, but its "
            f"parameters are sharded already: {remedy}"
        )
    return copy.deepcopy(model).requires_grad_(False).eval()


def settle(reference: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Move a copy to where the model runs, with rank 0's weights on every rank; a collective.

    Args:
        reference: From :func:`frozen_copy`.
        model: What it is a copy of, in the dtypes that it has been cast to since. The copy's
            layers cast what they are given, as the model's do.
        device: Where the model runs.
    """
    # Of before the model got adapters, if it has any.
    dtypes = {without_adapters(name): tensor.dtype for name, tensor in _tensors(model)}
    for name, tensor in _tensors(reference):
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    reference.to(device)
    share_from_first_rank(reference)
    LayerCasts(reference)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())
