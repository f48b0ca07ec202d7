"""An identity whose gradient is not finite, to plant in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Spoil(torch.autograd.Function):
    """Identity whose gradient is NaN in some rows."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.masked_fill(rows, torch.nan), None
