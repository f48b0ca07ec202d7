"""TRADES, and stability training on unlabelled images.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import (
    Objective,
    Outputs,
    prediction_divergence,
    smoothed_cross_entropy,
)


@dataclass(frozen=True, kw_only=True)
class Trades(Objective):
    """``CE(f(x), y) + beta * KL(softmax f(x) || softmax f(x_adv))``.

    Zhang et al., ICML 2019, arXiv 1901.08573, eq. 5, with the divergence as in its sec. 5 and the
    ``beta`` of its table 5 (1 / lambda = 6). The second term needs no label: with unlabelled
    samples it is the stability training of Carmon et al., NeurIPS 2019, arXiv 1905.13736, eq. 4,
    and UAT-OT of Alayrac et al., NeurIPS 2019, arXiv 1905.13725.
    """

    name: ClassVar[str] = "trades"
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = "Zhang et al., ICML 2019, arXiv 1901.08573, eq. 5"
    default_attack_loss: ClassVar[str] = "kl"
    uses_unlabelled: ClassVar[bool] = True
    beta: float = at_least(0, 6.0)
    """Weight of the divergence."""
    label_smoothing: float = fraction(0.0)
    """Probability mass spread over all classes."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``natural_loss`` and ``consistency_loss`` (without ``beta``)."""
        z, z_adv = outputs.needed("natural"), outputs.adversarial
        natural = outputs.mean(smoothed_cross_entropy(z, outputs.y, self.label_smoothing))
        consistency = outputs.mean(prediction_divergence(z, z_adv))
        return {
            "loss": natural + self.beta * consistency,
            "natural_loss": natural.detach(),
            "consistency_loss": consistency.detach(),
        }
