"""Nuclear-norm adversarial training (NuAT).

Sriramanan et al., "Towards Efficient and Effective Adversarial Training", NeurIPS 2021.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import Objective, Outputs, smoothed_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Nuat(Objective):
    """``CE(f(x), y) + beta * ||f(x_adv) - f(x)||_* / B``, the nuclear norm of the batch's logits.

    The norm is that of the ``(B, K)`` matrix of all ranks' micro-batches together, so that it does
    not depend on how a batch is spread over ranks; accumulated micro-batches have norms of their
    own. For independent rows it grows like ``sqrt(B)``: the default is the authors' weight for a
    batch of 64, and another batch wants ``beta * sqrt(B / 64)``. They raise it from 0 along a run.
    """

    name: ClassVar[str] = "nuat"
    compares_samples: ClassVar[bool] = True
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = (
        "Sriramanan et al., Towards Efficient and Effective Adversarial Training, NeurIPS 2021"
    )
    beta: float = at_least(0, 4.5)
    """Weight of the norm."""
    label_smoothing: float = fraction(0.0)
    """Probability mass spread over all classes."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``natural_loss`` and ``consistency_loss`` (without ``beta``)."""
        z, y = outputs.needed("natural"), outputs.y
        natural = outputs.mean(smoothed_cross_entropy(z, y, self.label_smoothing))
        # A place that is only filled, and an image without a label, are rows of zeros.
        classes = y.argmax(1) if y.is_floating_point() else y
        rows = (outputs.adversarial - z).where(classes.unsqueeze(1) >= 0, 0.0)
        if outputs.weights is not None:
            rows = rows * outputs.weights.unsqueeze(1)
        count: Tensor | int = len(rows)
        if outputs.gather is not None:
            others, found = outputs.gather(rows, classes)
            rows = torch.cat([rows, others.where(found.unsqueeze(1) >= 0, 0.0)])
            count = count + (found >= 0).sum()
        norm = torch.linalg.svdvals(rows).sum() / count
        return {
            "loss": natural + self.beta * norm,
            "natural_loss": natural.detach(),
            "consistency_loss": norm.detach(),
        }
