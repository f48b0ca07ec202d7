"""Adversarial training, and DAT's sum of natural and adversarial loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import Objective, Outputs, smoothed_cross_entropy


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Objective):
    """``natural_weight * CE(f(x), y) + CE(f(x_adv), y)``.

    Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1, for a ``natural_weight`` of 0.
    """

    name: ClassVar[str] = "at"
    needs_attack: ClassVar[bool] = False
    cost: ClassVar[str] = "`3 F`; with a natural term `6 F`"
    paper: ClassVar[str] = "Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1"
    natural_weight: float = at_least(0, 0.0)
    """Weight of the natural term. A sum, not a weighted mean."""
    label_smoothing: float = fraction(0.0)
    """Probability mass spread over all classes."""

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the natural term has a weight."""
        return self.natural_weight > 0

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``robust_loss``, and ``natural_loss`` where it has a weight."""
        robust = outputs.mean(
            smoothed_cross_entropy(outputs.adversarial, outputs.y, self.label_smoothing)
        )
        if not self.needs_natural_logits:
            return {"loss": robust, "robust_loss": robust.detach()}
        natural = outputs.mean(
            smoothed_cross_entropy(outputs.needed("natural"), outputs.y, self.label_smoothing)
        )
        return {
            "loss": self.natural_weight * natural + robust,
            "robust_loss": robust.detach(),
            "natural_loss": natural.detach(),
        }


@dataclass(frozen=True, kw_only=True)
class Dat(AdversarialTraining):
    """``at`` with both terms (Zhang et al., UAI 2022, eq. 1, lambda 1)."""

    name: ClassVar[str] = "dat"
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = "Zhang et al., UAI 2022, arXiv 2206.06257, eq. 1"
    natural_weight: float = at_least(0, 1.0)
    """Weight of the natural term. A sum, not a weighted mean."""
