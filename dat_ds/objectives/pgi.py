"""The outer loss of FGSM with prior-guided initialisation.

Jia et al., ECCV 2022, arXiv 2207.08859, eq. 8.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import Objective, Outputs, smoothed_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Pgi(Objective):
    """``CE(f(x_adv), y) + beta * ||f(x_adv) - f(x_0)||_2^2 / K``, with ``x_0`` the attack's start.

    Ties the outputs before the attack's step to those after it, both with gradient; for the attack
    ``fgsm_pgi``. Default smoothing: the authors' probability of 0.6 for the true class of 10.
    """

    name: ClassVar[str] = "pgi"
    needs_start_logits: ClassVar[bool] = True
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = "Jia et al., ECCV 2022, arXiv 2207.08859, eq. 8"
    beta: float = at_least(0, 10.0)
    """Weight of the distance."""
    label_smoothing: float = fraction(4 / 9)
    """Probability mass spread over all classes."""

    @property
    def needs_natural_logits(self) -> bool:
        """False: the start stands in for the image."""
        return False

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``robust_loss`` and ``consistency_loss`` (without ``beta``)."""
        z_adv, z_start = outputs.adversarial, outputs.needed("start")
        robust = outputs.mean(smoothed_cross_entropy(z_adv, outputs.y, self.label_smoothing))
        distance = outputs.mean((z_adv - z_start).square().mean(dim=1))
        return {
            "loss": robust + self.beta * distance,
            "robust_loss": robust.detach(),
            "consistency_loss": distance.detach(),
        }
