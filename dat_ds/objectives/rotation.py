"""Rotation prediction, under attack.

Shapes: ``B`` batch; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.attacks import Generator
from dat_ds.kinds import Head
from dat_ds.objectives.at import AdversarialTraining
from dat_ds.objectives.views import rotations


@dataclass(frozen=True, kw_only=True)
class Rotation(AdversarialTraining):
    """``at`` on how far an image was turned.

    Gidaris et al., ICLR 2018, arXiv 1803.07728, sec. 2: all four rotations of every image are
    in the batch. Adversarial as in Chen et al., CVPR 2020, arXiv 2003.12862.
    """

    name: ClassVar[str] = "rotation"
    cost: ClassVar[str] = "`12 F` (four turns)"
    paper: ClassVar[str] = "Gidaris et al., ICLR 2018, arXiv 1803.07728, sec. 2"
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
