"""Adversarial logit pairing.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import Objective, Outputs, smoothed_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Alp(Objective):
    """``(CE(f(x), y) + CE(f(x_adv), y)) / 2 + beta * ||f(x) - f(x_adv)||_2^2 / K``.

    Adversarial logit pairing: Kannan, Kurakin and Goodfellow 2018, arXiv 1803.06373, sec. 3.1, with
    the squared error averaged over classes. Pairing alone is known to break under strong attacks
    (Engstrom et al. 2018, arXiv 1807.10272); here it is added to adversarial training.
    """

    name: ClassVar[str] = "alp"
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = "Kannan, Kurakin and Goodfellow 2018, arXiv 1803.06373, sec. 3.1"
    beta: float = at_least(0, 0.5)
    """Weight of the pairing; the paper's lambda of 0.5."""
    label_smoothing: float = fraction(0.0)
    """Probability mass spread over all classes."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``natural_loss``, ``robust_loss`` and ``consistency_loss`` (no ``beta``)."""
        z, z_adv = outputs.needed("natural"), outputs.adversarial
        natural = outputs.mean(smoothed_cross_entropy(z, outputs.y, self.label_smoothing))
        robust = outputs.mean(smoothed_cross_entropy(z_adv, outputs.y, self.label_smoothing))
        pairing = outputs.mean((z - z_adv).square().mean(dim=1))
        return {
            "loss": 0.5 * (natural + robust) + self.beta * pairing,
            "natural_loss": natural.detach(),
            "robust_loss": robust.detach(),
            "consistency_loss": pairing.detach(),
        }
