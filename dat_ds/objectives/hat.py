"""Helper-based adversarial training.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.method import at_least, fraction
from dat_ds.objectives.base import (
    Objective,
    Outputs,
    prediction_divergence,
    smoothed_cross_entropy,
)


@dataclass(frozen=True, kw_only=True)
class Hat(Objective):
    """``CE(f(x), y) + beta * KL(p || p_adv) + gamma * CE(f(x_helper), y_helper)``.

    Helper-based adversarial training: Rade and Moosavi-Dezfooli, ICLR 2022, openreview BuD2LmNaU3a,
    eq. 5. Helper images lie beyond the adversarial ones and carry the label that a naturally
    trained model gives those, which keeps the margin from growing further than robustness needs.
    """

    name: ClassVar[str] = "hat"
    default_attack_loss: ClassVar[str] = "kl"
    uses_unlabelled: ClassVar[bool] = True
    needs_helper_logits: ClassVar[bool] = True
    required: ClassVar[Mapping[str, str]] = {
        "helper_model": "the run folder or checkpoint of a naturally trained model (train one with "
        "dat.attack.name='none')"
    }
    cost: ClassVar[str] = "`9 F`, and `F` of the helper"
    paper: ClassVar[str] = "Rade and Moosavi-Dezfooli, ICLR 2022, openreview BuD2LmNaU3a, eq. 5"
    beta: float = at_least(0, 2.5)
    """Weight of the divergence."""
    helper_model: str | None = None
    """Run folder or checkpoint of a naturally trained model that labels helper images."""
    gamma: float = at_least(0, 0.5)
    """Weight of the helper term."""
    label_smoothing: float = fraction(0.0)
    """Probability mass spread over all classes; of the natural term."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``natural_loss``, ``consistency_loss`` and ``helper_loss`` (no weights)."""
        z, z_adv = outputs.needed("natural"), outputs.adversarial
        z_helper = outputs.needed("helper")
        natural = outputs.mean(smoothed_cross_entropy(z, outputs.y, self.label_smoothing))
        consistency = outputs.mean(prediction_divergence(z, z_adv))
        helper = outputs.mean(smoothed_cross_entropy(z_helper, outputs.needed("y_helper")))
        return {
            "loss": natural + self.beta * consistency + self.gamma * helper,
            "natural_loss": natural.detach(),
            "consistency_loss": consistency.detach(),
            "helper_loss": helper.detach(),
        }


def helper_images(x: Tensor, x_adv: Tensor, lower: float = 0.0, upper: float = 1.0) -> Tensor:
    """HAT's helper images: ``x + 2 (x_adv - x)``, clipped to the pixel range.

    Args:
        x: Natural images, pixel units.
        x_adv: Adversarial images of the same shape.
        lower: Smallest pixel value.
        upper: Largest pixel value.
    """
    return torch.lerp(x, x_adv, 2.0).clamp_(lower, upper)
