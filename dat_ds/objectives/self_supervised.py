"""Objectives that need no label: rotation, contrastive, and FARE.

Shapes: ``B`` batch, ``D`` features; images ``(B, C, H, W)``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.attacks import Generator, InnerLoss, feature_distance, nt_xent
from dat_ds.objectives.adversarial_training import AdversarialTraining
from dat_ds.objectives.base import Head, Objective, accurate, average
from dat_ds.objectives.views import random_view, rotations

Gather = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""This rank's features and ``y`` to those of all other ranks, differentiable."""


@dataclass(frozen=True, kw_only=True)
class Rotation(AdversarialTraining):
    """:class:`AdversarialTraining` on how far an image was turned.

    Gidaris et al., ICLR 2018, arXiv 1803.07728, sec. 2: all four rotations of every image are
    in the batch. Adversarial as in Chen et al., CVPR 2020, arXiv 2003.12862.
    """

    name: ClassVar[str] = "rotation"
    head: ClassVar[Head] = "rotation"
    uses_unlabelled: ClassVar[bool] = True
    num_views: ClassVar[int] = 4

    def inputs(
        self,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
        reference: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Four rotations of each image, and the number of quarter turns ``(4 B,)``."""
        return rotations(x)


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """``natural_weight * NT-Xent(f(x_1), f(x_2)) + NT-Xent(f(x_1,adv), f(x_2,adv))``.

    Two random views ``x_1``, ``x_2`` of every image, both of them attacked. With a
    ``natural_weight`` of 1 it is twice the dual-stream loss of ACL (Jiang et al., NeurIPS 2020,
    arXiv 2010.13337, sec. 3); with 0 its adversarial-to-adversarial one. See also RoCL (Kim et
    al., NeurIPS 2020, arXiv 2006.07589).

    Views are compared with those of all ranks in the outer loss, and with those of their own rank
    in the attack, which then needs no communication.

    Args:
        natural_weight: Weight of the natural term, at least 0. A sum, not a weighted mean.
        temperature: That similarities are divided by, above 0.
        crop_area: Smallest area of a view as a share of the image, in (0, 1].
        color_jitter: Strength of the change of colours, in [0, 1].
        flip: Probability of mirroring a view left and right.
    """

    name: ClassVar[str] = "contrastive"
    default_attack_loss: ClassVar[str] = "nt_xent"
    head: ClassVar[Head] = "projection"
    classifies: ClassVar[bool] = False
    uses_unlabelled: ClassVar[bool] = True
    num_views: ClassVar[int] = 2
    compares_samples: ClassVar[bool] = True
    natural_weight: float = 1.0
    temperature: float = 0.5
    crop_area: float = 0.2
    color_jitter: float = 0.5
    flip: float = 0.5

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the natural term has a weight."""
        return self.natural_weight > 0

    @property
    def inner_loss(self) -> InnerLoss:
        """NT-Xent at this objective's temperature, within the batch."""
        return functools.partial(nt_xent, temperature=self.temperature)

    def inputs(
        self,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
        reference: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Two random views of each image, and zeros: all of them count."""
        views = [
            random_view(
                x,
                generator,
                crop_area=self.crop_area,
                color_jitter=self.color_jitter,
                flip=self.flip,
            )
            for _ in range(self.num_views)
        ]
        count = self.num_views * len(x)
        return torch.stack(views, dim=1).flatten(0, 1), x.new_zeros(count, dtype=torch.int64)

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
        gather: Gather | None = None,
    ) -> dict[str, Tensor]:
        """The loss, ``robust_loss``, and ``natural_loss`` where it has a weight.

        ``logits_adv`` and ``logits`` are projections ``(2 B, D)``, and ``y`` is as
        :func:`dat_ds.attacks.nt_xent` takes it. ``gather`` brings in other ranks' views.
        """
        robust = average(self._losses(accurate(logits_adv), y, gather), weights)
        if not self.needs_natural_logits:
            return {"loss": robust, "robust_loss": robust.detach()}
        natural = average(self._losses(self._needed(logits), y, gather), weights)
        return {
            "loss": self.natural_weight * natural + robust,
            "robust_loss": robust.detach(),
            "natural_loss": natural.detach(),
        }

    def _losses(self, features: Tensor, y: Tensor, gather: Gather | None) -> Tensor:
        others = None if gather is None else gather(features, y)
        return nt_xent(features, y, self.temperature, others)


@dataclass(frozen=True, kw_only=True)
class Fare(Objective):
    """``||f(x_adv) - f_0(x)||_2^2``, with ``f_0`` the encoder as it was at the start, frozen.

    Schlarmann et al., ICML 2024, arXiv 2402.12336, sec. 3: robust features that stay where they
    were, so that whatever was built on them still fits.
    """

    name: ClassVar[str] = "fare"
    default_attack_loss: ClassVar[str] = "feature_distance"
    head: ClassVar[Head] = "features"
    classifies: ClassVar[bool] = False
    uses_unlabelled: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    @property
    def needs_natural_logits(self) -> bool:
        """False: natural images are seen by the encoder at the start alone."""
        return False

    @property
    def inner_loss(self) -> InnerLoss:
        """The squared distance of features."""
        return feature_distance

    def inputs(
        self,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
        reference: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The images, and their features at the start ``(B, D)``.

        Raises:
            ValueError: Without the reference.
        """
        if reference is None:
            raise ValueError("objective 'fare' needs the encoder as it was at the start.")
        return x, accurate(reference(x).detach())

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
        """The loss and ``robust_loss``; ``y`` are features of the natural images ``(B, D)``."""
        robust = average(feature_distance(accurate(logits_adv), y), weights)
        return {"loss": robust, "robust_loss": robust.detach()}
