"""The batch that the outer forward sees: natural, adversarial and further images, in one.

All images go through the model in one forward: several forwards before one backward would break
ZeRO's bookkeeping, and double ZeRO-3's gathers.

Shapes: ``B`` batch, ``K`` classes, ``V`` adversarial images for each original; images
``(B, C, H, W)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.objectives.base import Gather, Objective
from dat_ds.objectives.grad_align import AlignmentProbes
from dat_ds.objectives.hat import helper_images


@dataclass(frozen=True)
class OuterTerms:
    """What an objective made of the outer forward.

    Attributes:
        terms: ``loss``, with gradient, and detached terms.
        logits_adv: Outputs for the adversarial images ``(V B, K)``.
        logits: Outputs for the natural images ``(B, K)``, where the objective needs them.
    """

    terms: dict[str, Tensor]
    logits_adv: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class OuterBatch:
    """Images of one outer forward; made by :func:`outer_batch`.

    Attributes:
        objective: Whose batch it is.
        images: All of them, one kind after the other, pixel units, float32.
        sizes: Number of images by kind, in that order.
        x_adv: The adversarial ones ``(V B, C, H, W)``.
        probes: GradAlign's, where it is on.
    """

    objective: Objective
    images: Tensor
    sizes: Mapping[str, int]
    x_adv: Tensor
    probes: AlignmentProbes | None = None

    def terms(
        self,
        outputs: Tensor,
        y: Tensor,
        *,
        weights: Tensor | None = None,
        helper: Callable[[Tensor], Tensor] | None = None,
        gather: Gather | None = None,
        grad_align: float = 0.0,
    ) -> OuterTerms:
        """The objective of the model's outputs for :attr:`images`.

        Args:
            outputs: Shape ``(sum of sizes, K)``.
            y: What natural images are compared with ``(B,)`` or ``(B, K)``.
            weights: Weight of each sample ``(B,)``; None for 1.
            helper: HAT's naturally trained model, pixels to logits.
            gather: Brings in other ranks' features, where the objective compares samples.
            grad_align: Weight of the probes' penalty.
        """
        by_kind = dict(
            zip(self.sizes, torch.split(outputs, list(self.sizes.values())), strict=True)
        )
        logits_adv, logits = by_kind["adversarial"], by_kind.get("natural")
        extra: dict[str, Any] = {} if gather is None else {"gather": gather}
        if self.objective.needs_helper_logits:
            assert helper is not None
            with torch.no_grad():
                labels = helper(self.x_adv).argmax(dim=1)
            extra |= {"logits_helper": by_kind["helper"], "y_helper": labels}
        views = len(logits_adv) // len(y)
        repeated, y_adv = logits, y
        if views > 1:
            repeated = None if logits is None else logits.repeat(views, 1)
            y_adv = y.repeat(views, *[1] * (y.ndim - 1))
            weights = None if weights is None else weights.repeat(views)
        if weights is not None:
            extra["weights"] = weights
        terms = self.objective(logits_adv, y_adv, repeated, **extra)
        if self.probes is not None:
            penalty = self.probes.penalty(by_kind["alignment"], y)
            terms["loss"] = terms["loss"] + grad_align * penalty
            terms["alignment_loss"] = penalty.detach()
        return OuterTerms(terms, logits_adv, logits)


def outer_batch(
    objective: Objective,
    x: Tensor,
    x_adv: Tensor,
    *,
    threat: ThreatModel,
    probes: AlignmentProbes | None = None,
) -> OuterBatch:
    """Put together what ``objective`` needs outputs for.

    Args:
        objective: The outer loss.
        x: Natural images, pixel units, float32.
        x_adv: Adversarial images; several after one another for an attack with several views.
        threat: Its pixel range bounds helper images.
        probes: GradAlign's images; None where it is off.
    """
    kinds = {"natural": x} if objective.needs_natural_logits else {}
    kinds["adversarial"] = x_adv
    if objective.needs_helper_logits:
        views = len(x_adv) // len(x)
        kinds["helper"] = helper_images(
            x.repeat(views, 1, 1, 1), x_adv.detach(), threat.lower, threat.upper
        )
    if probes is not None:
        kinds["alignment"] = probes.images
    sizes = {kind: len(images) for kind, images in kinds.items()}
    images = torch.cat(list(kinds.values())) if len(kinds) > 1 else x_adv
    return OuterBatch(objective, images, sizes, x_adv, probes)


@torch.no_grad()
def num_correct(
    logits: Tensor, y: Tensor, labelled: Tensor | None = None
) -> tuple[Tensor, Tensor | int]:
    """Correct images and how many count: those whose true class is known.

    Args:
        logits: Logits of one or several views of the images ``(n B, K)``.
        y: Class indices ``(B,)``, or probabilities ``(B, K)``, of which the likeliest counts.
        labelled: Which images count ``(B,)``; None for all.
    """
    classes = y.argmax(dim=1) if y.is_floating_point() else y
    correct = logits.argmax(dim=1).view(-1, len(y)) == classes
    if labelled is None:
        return correct.sum(), correct.numel()
    return (correct & labelled).sum(), labelled.sum() * len(correct)
