"""A model under evaluation that sees every image an attack tries, and counts passes.

Shapes: ``B`` rows of a batch; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import cw_margin
from dat_ds.attacks.projections import per_sample

_SLACK = 1e-6  # of the pixel range: float32's rounding of a distance


class Passes:
    """Images that went through the model, forwards and backwards."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0


class AllBroken(Exception):
    """Every row of the batch is broken, so that there is nothing left to attack."""


class WatchedModel:
    """A model that keeps, of each row, the first image in the ball that it misclassifies.

    Args:
        model: Pixels to logits ``(B, K)``.
        x: Original images.
        y: Class indices ``(B,)``.
        threat: Allowed perturbations.
        passes: Where passes are counted.

    Attributes:
        broken: Rows with such an image ``(B,)``.
        step: Number of the forward that found it, from 1; 0 for the others ``(B,)``.
        found: The image, projected onto the ball; the original for the others.
        margin: Smallest true logit minus largest other, over images in the ball, float64 ``(B,)``.
    """

    def __init__(
        self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, passes: Passes
    ) -> None:
        self._model, self._x, self._y, self._threat = model, x, y, threat
        self._passes = passes
        self._reach = threat.eps + _SLACK * (threat.upper - threat.lower)
        self._calls = 0
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.found = x.clone()
        self.margin = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)

    def __call__(self, x_adv: Tensor) -> Tensor:
        """Its logits; attacks of one batch call it with all rows, in their order.

        Raises:
            AllBroken: When there is no row left to attack.
        """
        logits = self._model(x_adv)
        self._passes.forwards += len(x_adv)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]  # in torch
        if len(x_adv) == len(self._x):
            self._look(x_adv.detach(), logits.detach())
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self._passes.backwards += len(gradient)

    def _look(self, x_adv: Tensor, logits: Tensor) -> None:
        self._calls += 1
        inside = self._threat.distance(x_adv, self._x) <= self._reach
        inside &= logits.isfinite().all(dim=1)
        margin = -cw_margin(logits.double(), self._y)
        # A row is done with when it is broken: how long the others go on must not matter.
        smaller = inside & ~self.broken & (margin < self.margin)
        self.margin = torch.where(smaller, margin, self.margin)
        fools = inside & (logits.argmax(dim=1) != self._y) & ~self.broken
        if not bool(fools.any()):
            return
        image = self._threat.project(x_adv, self._x)
        self.found = torch.where(per_sample(fools, image), image, self.found)
        self.step = torch.where(fools, self._calls, self.step)
        self.broken |= fools
        if bool(self.broken.all()):
            raise AllBroken
