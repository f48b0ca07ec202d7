"""Copies of a model on every rank."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def share_from_first_rank(module: nn.Module) -> None:
    """Give every rank the first one's weights and buffers; a collective, where there are several.

    Args:
        module: Its tensors are whole; overwritten on all ranks but the first.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
