"""Contrastive learning, under attack.

Shapes: ``B`` batch, ``D`` features; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dat_ds.attacks import Generator, InnerLoss, nt_xent
from dat_ds.kinds import Head
from dat_ds.method import Trait, above, at_least, positive_share, share
from dat_ds.objectives.base import Gather, Objective, Outputs
from dat_ds.objectives.views import random_view


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """``natural_weight * NT-Xent(f(x_1), f(x_2)) + NT-Xent(f(x_1,adv), f(x_2,adv))``.

    Two random views ``x_1``, ``x_2`` of every image, both of them attacked. With a
    ``natural_weight`` of 1 it is twice the dual-stream loss of ACL (Jiang et al., NeurIPS 2020,
    arXiv 2010.13337, sec. 3); with 0 its adversarial-to-adversarial one. See also RoCL (Kim et
    al., NeurIPS 2020, arXiv 2006.07589).

    Views are compared with those of all ranks in the outer loss, and with those of their own rank
    in the attack, which then needs no communication.
    """

    name: ClassVar[str] = "contrastive"
    needs_attack: ClassVar[bool] = False
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.SHOWS_OTHER_VIEWS})
    cost: ClassVar[str] = "`6 F` (two views); with a natural term `12 F`"
    paper: ClassVar[str] = "Jiang et al., NeurIPS 2020, arXiv 2010.13337, sec. 3"
    default_attack_loss: ClassVar[str] = "nt_xent"
    head: ClassVar[Head] = "projection"
    classifies: ClassVar[bool] = False
    uses_unlabelled: ClassVar[bool] = True
    num_views: ClassVar[int] = 2
    compares_samples: ClassVar[bool] = True
    natural_weight: float | None = at_least(0, None)
    """Weight of the natural term. A sum, not a weighted mean. Default: 1, and 0 without an attack,
    where both terms would be the same."""
    temperature: float = above(0, 0.5)
    """Temperature by which the similarities are divided."""
    crop_area: float = positive_share(0.2)
    """Smallest area of a view as a share of the image."""
    color_jitter: float = share(0.5)
    """Strength of the change of colours."""
    flip: float = share(0.5)
    """Probability of mirroring a view left and right."""

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the natural term has a weight."""
        return self._natural_weight > 0

    @property
    def _natural_weight(self) -> float:
        return 1.0 if self.natural_weight is None else self.natural_weight

    def resolved(self, has_attack: bool) -> Self:
        """With the weight of the natural term written out."""
        if self.natural_weight is not None:
            return self
        return dataclasses.replace(self, natural_weight=1.0 if has_attack else 0.0)

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

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss, ``robust_loss``, and ``natural_loss`` where it has a weight.

        Adversarial and natural outputs are projections ``(2 B, D)``, and ``y`` is as
        :func:`dat_ds.attacks.nt_xent` takes it. ``gather`` brings in other ranks' views.
        """
        robust = outputs.mean(self._losses(outputs.adversarial, outputs.y, outputs.gather))
        if not self.needs_natural_logits:
            return {"loss": robust, "robust_loss": robust.detach()}
        natural = outputs.mean(self._losses(outputs.needed("natural"), outputs.y, outputs.gather))
        return {
            "loss": self._natural_weight * natural + robust,
            "robust_loss": robust.detach(),
            "natural_loss": natural.detach(),
        }

    def _losses(self, features: Tensor, y: Tensor, gather: Gather | None) -> Tensor:
        others = None if gather is None else gather(features, y)
        return nt_xent(features, y, self.temperature, others)
