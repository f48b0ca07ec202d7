"""The model as it was at the start, which some objectives compare with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dat_ds.errors import ConfigError
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


def settle(reference: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Move a copy to where the model runs, with rank 0's weights on every rank; a collective.

    Args:
        reference: From :func:`frozen_copy`.
        device: Where the model runs.
        dtype: Of its weights; None leaves them as they are.
    """
    reference.to(device, dtype=dtype)
    share_from_first_rank(reference)
    return reference
