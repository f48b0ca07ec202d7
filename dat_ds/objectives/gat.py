"""Guided adversarial training (GAT).

Sriramanan et al., NeurIPS 2020, arXiv 2011.14969, sec. 4.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import Objective, Outputs, smoothed_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Gat(Objective):
    """``CE(f(x), y) + beta * ||p(x) - p(x_adv)||_2^2``, with ``p`` the softmax.

    For the attack ``guided``: one step that maximises the same distance beside cross-entropy. The
    authors multiply ``beta`` by 4 in the last part of the run.
    """

    name: ClassVar[str] = "gat"
    uses_unlabelled: ClassVar[bool] = True
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = "Sriramanan et al., NeurIPS 2020, arXiv 2011.14969, sec. 4"
    beta: float = at_least(0, 10.0)
    """Weight of the distance."""
    label_smoothing: float = fraction(0.0)
    """Probability mass spread over all classes."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``natural_loss`` and ``consistency_loss`` (without ``beta``)."""
        z, z_adv = outputs.needed("natural"), outputs.adversarial
        natural = outputs.mean(smoothed_cross_entropy(z, outputs.y, self.label_smoothing))
        distance = outputs.mean((z.softmax(1) - z_adv.softmax(1)).square().sum(1))
        return {
            "loss": natural + self.beta * distance,
            "natural_loss": natural.detach(),
            "consistency_loss": distance.detach(),
        }
