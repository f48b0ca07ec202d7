"""A model under evaluation that sees every image an attack tries, and counts passes.

Shapes: ``B`` rows of a batch; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import cw_margin
from dat_ds.contracts import check_finite

ROWS = 32
"""From this number of images on, libraries of matrix products compute a row alike whatever the
other rows and the number of threads are."""
_SLACK = 1e-6  # of the pixel range: float32's rounding of a distance


class Passes:
    """Images that went through the model, forwards and backwards."""

    def __init__(self, forwards: int = 0, backwards: int = 0) -> None:
        self.forwards = forwards
        self.backwards = backwards

    def count(self, logits: Tensor) -> None:
        """Count a forward that gave ``logits`` ``(B, K)``, and every backward through them."""
        self.forwards += len(logits)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]  # in torch

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class AllBroken(Exception):
    """Every row of the batch is broken, so that there is nothing left to attack."""


class WatchedModel:
    """A model that keeps, of each row, the first image in the ball that it misclassifies.

    An image counts where a plain forward of it, without gradients and beside other images,
    confirms that it is misclassified; otherwise the search goes on.

    Args:
        model: Pixels to logits ``(B, K)``, as the attack sees it.
        plain: The model in float32.
        x: Original images.
        y: Class indices ``(B,)``.
        threat: Allowed perturbations.
        passes: Where passes are counted.

    Attributes:
        broken: Rows with such an image ``(B,)``.
        denied: Rows with an image that a plain forward has denied ``(B,)``.
        step: Number of the forward that found it, from 1; 0 for the others ``(B,)``.
        predicted: Its class ``(B,)``.
        margin: Its true logit minus largest other, in the plain forward; of the others the
            smallest over images in the ball, float64 ``(B,)``.
        distance: Its distance from the original ``(B,)``.
    """

    def __init__(
        self,
        model: Model,
        plain: Model,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        passes: Passes,
    ) -> None:
        self._model, self._plain, self._passes = model, plain, passes
        self._x, self._y, self._threat = x, y, threat
        self._reach = threat.eps + _SLACK * (threat.upper - threat.lower)
        self._calls = 0
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.denied = torch.zeros_like(self.broken)
        self.step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.predicted = y.clone()
        self.margin = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
        self.distance = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def __call__(self, x_adv: Tensor) -> Tensor:
        """Its logits; attacks of one batch call it with all rows, in their order.

        Raises:
            AllBroken: When there is no row left to attack.
            ModelError: For an image in the ball whose outputs are not finite.
        """
        logits = self._model(x_adv)
        self._passes.count(logits)
        if len(x_adv) == len(self._x):
            with torch.no_grad():
                self._look(x_adv, logits)
        return logits

    def _look(self, x_adv: Tensor, logits: Tensor) -> None:
        self._calls += 1
        inside = self._threat.distance(x_adv, self._x) <= self._reach
        inside &= ~self.broken
        margin = -cw_margin(logits.double(), self._y)
        # Outputs that are not finite are not a classification: the plain forward decides.
        fools = inside & ((logits.argmax(dim=1) != self._y) | ~logits.isfinite().all(dim=1))
        smaller = inside & ~fools & (margin < self.margin)
        self.margin = torch.where(smaller, margin, self.margin)
        if bool(fools.any()):
            self._verify(x_adv, fools.nonzero().flatten())
            if bool(self.broken.all()):
                raise AllBroken

    def _verify(self, x_adv: Tensor, rows: Tensor) -> None:
        """Look at these rows again by a plain forward.

        Raises:
            ModelError: For outputs that are not finite.
        """
        rows = _padded(rows)  # which rows are verified together must not matter
        images = self._threat.project(x_adv[rows], self._x[rows])
        logits = self._plain(images)
        self._passes.count(logits)
        check_finite(logits)
        predicted = logits.argmax(dim=1)
        confirmed = predicted != self._y[rows]
        self.denied[rows[~confirmed]] = True
        rows, images, logits = rows[confirmed], images[confirmed], logits[confirmed]
        self.broken[rows] = True
        self.step[rows] = self._calls
        self.predicted[rows] = predicted[confirmed]
        self.margin[rows] = -cw_margin(logits.double(), self._y[rows])
        self.distance[rows] = self._threat.distance(images, self._x[rows])


def _padded(items: Tensor) -> Tensor:
    """The items with the last repeated up to a multiple of :data:`ROWS`."""
    return torch.cat([items, items[-1:].expand(-len(items) % ROWS)])
