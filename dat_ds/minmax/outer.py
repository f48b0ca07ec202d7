"""The batch that the outer forward sees: natural, adversarial and further images, in one.

All images go through the model in one forward: several forwards before one backward would break
ZeRO's bookkeeping, and double ZeRO-3's gathers.

Shapes: ``B`` batch, ``K`` classes, ``V`` adversarial images for each original; images
``(B, C, H, W)``.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dat_ds.attacks import ThreatModel
from dat_ds.attacks.strategy import Adversarial
from dat_ds.errors import ConfigError, DataError
from dat_ds.minmax.batch import MicroBatch
from dat_ds.models.batch_norm import has_batch_norm, split_batch_norm
from dat_ds.objectives.base import Gather, Objective
from dat_ds.objectives.grad_align import AlignmentProbes
from dat_ds.objectives.hat import helper_images
from dat_ds.ranks import Ranks, rows_of_others


@dataclass(frozen=True)
class OuterTerms:
    """Loss terms of an objective, from the outer forward.

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
            y: Targets of natural images ``(B,)`` or ``(B, K)``.
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
        if self.objective.needs_start_logits:
            extra["logits_start"] = by_kind["start"]
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
    start: Tensor | None = None,
) -> OuterBatch:
    """Put together what ``objective`` needs outputs for.

    Args:
        objective: The outer loss.
        x: Natural images, pixel units, float32.
        x_adv: Adversarial images; several after one another for an attack with several views.
        threat: Its pixel range bounds helper images.
        probes: GradAlign's images; None where it is off.
        start: Where the attack started from; None where it does not say.

    Raises:
        ConfigError: If the objective asks for the attack's start, which is not known.
    """
    kinds = {"natural": x} if objective.needs_natural_logits else {}
    kinds["adversarial"] = x_adv
    if objective.needs_helper_logits:
        views = len(x_adv) // len(x)
        kinds["helper"] = helper_images(
            x.repeat(views, 1, 1, 1), x_adv.detach(), threat.lower, threat.upper
        )
    if objective.needs_start_logits:
        if start is None:
            raise ConfigError(
                f"dat.objective.name={objective.name!r} compares adversarial images with where the "
                "attack started from, which this attack does not tell: choose another attack."
            )
        kinds["start"] = start
    if probes is not None:
        kinds["alignment"] = probes.images
    sizes = {kind: len(images) for kind, images in kinds.items()}
    images = torch.cat(list(kinds.values())) if len(kinds) > 1 else x_adv
    return OuterBatch(objective, images, sizes, x_adv, probes)


def fill_up(x: Tensor, module: nn.Module) -> Tensor:
    """A single image twice where BatchNorm is to take statistics, else ``x`` itself.

    BatchNorm refuses to take them of one value per channel; the first output of two equal images,
    and its gradients, are those of running one.
    """
    return torch.cat([x, x]) if len(x) == 1 and has_batch_norm(module) else x


class OuterForward:
    """From a micro-batch and its adversarial images to the objective's terms.

    Args:
        module: The bare model.
        objective: The outer loss.
        threat: Its pixel range bounds helper images.
        ranks: The processes of the run.
        micro_batch: Largest number of images of a rank in a micro-step.
        helper: HAT's naturally trained model, pixels to logits.
        grad_align: Weight of GradAlign's penalty.
        splits_batch_norm: Whether BatchNorm takes statistics of each kind of images apart.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        threat: ThreatModel,
        ranks: Ranks,
        *,
        micro_batch: int,
        helper: Callable[[Tensor], Tensor] | None = None,
        grad_align: float = 0.0,
        splits_batch_norm: bool = False,
    ) -> None:
        self._module = module
        self._objective = objective
        self._threat = threat
        self._ranks = ranks
        self._micro_batch = micro_batch
        self._helper = helper
        self._grad_align = grad_align
        self._splits = splits_batch_norm and has_batch_norm(module)
        self._gathers = objective.compares_samples and ranks.count > 1

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        part: MicroBatch,
        found: Adversarial,
        probes: AlignmentProbes | None,
    ) -> OuterTerms:
        """All of it, by one call of ``model``, in training mode."""
        batch = self.batch(part, found, probes)
        with self.normalised(batch):
            outputs = model(batch.images)
        return self.terms(batch, outputs, part)

    def batch(
        self, part: MicroBatch, found: Adversarial, probes: AlignmentProbes | None
    ) -> OuterBatch:
        """The images that the objective needs outputs for."""
        return outer_batch(
            self._objective,
            part.x,
            found.images,
            threat=self._threat,
            probes=probes,
            start=found.start,
        )

    def normalised(self, batch: OuterBatch) -> contextlib.AbstractContextManager[None]:
        """For the forward of ``batch``: BatchNorm's statistics of all images, or of each kind."""
        if self._splits and len(batch.sizes) > 1:
            return split_batch_norm(self._module, list(batch.sizes.values()))
        return contextlib.nullcontext()

    def terms(self, batch: OuterBatch, outputs: Tensor, part: MicroBatch) -> OuterTerms:
        """The objective's terms of the model's outputs for ``batch``."""
        return batch.terms(
            outputs,
            part.y,
            weights=part.weights,
            helper=self._helper,
            gather=self._features_of_others if self._gathers else None,
            grad_align=self._grad_align,
        )

    def _features_of_others(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Other ranks' features of this micro-step; a collective, in the backward too."""
        num_rows = self._micro_batch * self._objective.num_views
        if len(features) > num_rows:
            raise DataError(
                f"A batch of more than train_micro_batch_size_per_gpu={self._micro_batch} images: "
                f"dat.objective.name={self._objective.name!r} compares those of all ranks."
            )
        return rows_of_others(features, y, self._ranks, num_rows=num_rows)
