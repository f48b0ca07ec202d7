"""FARE: robust features that stay where they were.

Shapes: ``B`` batch, ``D`` features; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.attacks import Generator, InnerLoss, feature_distance
from dat_ds.kinds import Head
from dat_ds.method import Trait
from dat_ds.objectives.base import Objective, Outputs, accurate


@dataclass(frozen=True, kw_only=True)
class Fare(Objective):
    """``||f(x_adv) - f_0(x)||_2^2``, with ``f_0`` the encoder as it was at the start, frozen.

    Schlarmann et al., ICML 2024, arXiv 2402.12336, sec. 3: robust features that stay where they
    were, so that whatever was built on them still fits.
    """

    name: ClassVar[str] = "fare"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.FLAT_AT_THE_IMAGE})
    cost: ClassVar[str] = "`3 F`, and `F` of the encoder at the start"
    paper: ClassVar[str] = "Schlarmann et al., ICML 2024, arXiv 2402.12336, sec. 3"
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

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The loss and ``robust_loss``; ``y`` are features of the natural images ``(B, D)``."""
        robust = outputs.mean(feature_distance(outputs.adversarial, outputs.y))
        return {"loss": robust, "robust_loss": robust.detach()}
