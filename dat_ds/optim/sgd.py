"""SGD with momentum, torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dat_ds.method import above, at_least, fraction
from dat_ds.optim.method import OptimizerMethod


@dataclass(frozen=True, kw_only=True)
class SgdMethod(OptimizerMethod):
    """Stochastic gradient descent with momentum.

    Defaults of adversarial training on CIFAR-10: Rice et al., ICML 2020, arXiv 2002.11569.
    """

    name: ClassVar[str] = "sgd"
    paper: ClassVar[str] = "defaults: Rice et al., ICML 2020, arXiv 2002.11569"
    scaling: ClassVar[str | None] = "linear"

    lr: float = above(0, 0.1)
    """Learning rate."""
    weight_decay: float = at_least(0, 5e-4)
    """Weight decay of every parameter with at least two dimensions."""
    momentum: float = fraction(0.9)
    """Decay of the average of gradients."""
    nesterov: bool = False
    """Nesterov's momentum."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Torch's."""
        return torch.optim.SGD(params, **self.arguments())
