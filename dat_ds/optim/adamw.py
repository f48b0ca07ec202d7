"""AdamW, torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dat_ds.method import above, at_least
from dat_ds.optim.method import OptimizerMethod, betas_option


@dataclass(frozen=True, kw_only=True)
class AdamWMethod(OptimizerMethod):
    """Adam with decoupled weight decay."""

    name: ClassVar[str] = "adamw"
    paper: ClassVar[str] = "Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101"
    scaling: ClassVar[str | None] = "sqrt"

    weight_decay: float = at_least(0, 0.05)
    """Weight decay of every parameter with at least two dimensions."""
    betas: list[float] = betas_option([0.9, 0.999])
    """Decays of the two moments."""
    eps: float = above(0, 1e-8)
    """Added to the root of the second moment."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Torch's."""
        first, second = self.betas
        return torch.optim.AdamW(params, self.lr, (first, second), self.eps, self.weight_decay)
