"""Adversarial training, and DAT's sum of natural and adversarial loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.objectives.base import Objective, accurate, average, cross_entropy


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Objective):
    """``natural_weight * CE(f(x), y) + CE(f(x_adv), y)``.

    Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1, for a ``natural_weight`` of 0.

    Args:
        natural_weight: Weight of the natural term, at least 0. A sum, not a weighted mean.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
    """

    name: ClassVar[str] = "at"
    natural_weight: float = 0.0
    label_smoothing: float = 0.0

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the natural term has a weight."""
        return self.natural_weight > 0

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, ``robust_loss``, and ``natural_loss`` where it has a weight."""
        robust = average(cross_entropy(accurate(logits_adv), y, self.label_smoothing), weights)
        if not self.needs_natural_logits:
            return {"loss": robust, "robust_loss": robust.detach()}
        natural = average(cross_entropy(self._needed(logits), y, self.label_smoothing), weights)
        return {
            "loss": self.natural_weight * natural + robust,
            "robust_loss": robust.detach(),
            "natural_loss": natural.detach(),
        }


@dataclass(frozen=True, kw_only=True)
class Dat(AdversarialTraining):
    """:class:`AdversarialTraining` with both terms (Zhang et al., UAI 2022, eq. 1, lambda 1)."""

    name: ClassVar[str] = "dat"
    natural_weight: float = 1.0
