"""MART: misclassification-aware adversarial training.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.method import Trait, at_least
from dat_ds.objectives.base import Objective, Outputs, prediction_divergence


@dataclass(frozen=True, kw_only=True)
class Mart(Objective):
    """``BCE(f(x_adv), y) + beta * KL(p || p_adv) * (1 - p_y)``, with ``p = softmax f(x)``.

    Wang et al., ICLR 2020, openreview rklOg6EFwS, eq. 11 and algorithm 1, where
    ``BCE = -log p_adv,y - log(1 - max_{k != y} p_adv,k)``.
    """

    name: ClassVar[str] = "mart"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_TRUE_CLASS})
    cost: ClassVar[str] = "`6 F`"
    paper: ClassVar[str] = "Wang et al., ICLR 2020, openreview rklOg6EFwS, eq. 11"
    beta: float = at_least(0, 5.0)
    """Weight of the second term; the paper's lambda of 5."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``robust_loss`` (the BCE) and ``consistency_loss`` (without ``beta``)."""
        y = outputs.y
        if y.is_floating_point():
            raise ValueError("objective 'mart' needs class indices, not probabilities: use 'at'.")
        z, z_adv = outputs.needed("natural"), outputs.adversarial
        labelled = y >= 0
        index = outputs.y.clamp_min(0).unsqueeze(1)
        log_p_adv = z_adv.log_softmax(dim=1)
        runner_up = z_adv.scatter(1, index, float("-inf")).argmax(dim=1, keepdim=True)
        # log(1 - p_k) from the other classes' logits: 1 - p_k itself rounds to 0.
        log_rest = z_adv.scatter(1, runner_up, float("-inf")).logsumexp(dim=1)
        boosted = -log_p_adv.gather(1, index).squeeze(1) - log_rest + z_adv.logsumexp(dim=1)
        robust = outputs.mean(boosted.where(labelled, 0.0))
        missing = 1 - z.softmax(dim=1).gather(1, index).squeeze(1)
        consistency = outputs.mean((prediction_divergence(z, z_adv) * missing).where(labelled, 0.0))
        return {
            "loss": robust + self.beta * consistency,
            "robust_loss": robust.detach(),
            "consistency_loss": consistency.detach(),
        }
