"""Threat models: which perturbations an attacker may make.

Shapes: ``x`` and ``x_adv`` are ``(B, C, H, W)``; the first dimension is the sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dat_ds.attacks.noise import Generator, fresh_generator, rand_like, randn_like
from dat_ds.attacks.projections import project_l2, sample_norms

Norm = Literal["linf", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)


@dataclass(frozen=True)
class ThreatModel:
    """A norm ball of radius ``eps`` around the image, within the pixel range.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: Radius in pixel units (a full-range pixel is ``upper - lower``); 0 allows nothing.
        lower: Smallest pixel value.
        upper: Largest pixel value.

    Raises:
        ValueError: For an unknown norm, a negative radius, an empty pixel range, or an l-infinity
            radius larger than the pixel range (which is how 0-255 units show).
    """

    norm: Norm
    eps: float
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is not one of {', '.join(NORMS)}.")
        if not self.lower < self.upper:
            raise ValueError(f"lower={self.lower} must be below upper={self.upper}.")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps={self.eps} must be a finite number of at least 0.")
        if self.norm == "linf" and self.eps > self.upper - self.lower:
            raise ValueError(
                f"eps={self.eps} exceeds the pixel range [{self.lower}, {self.upper}]. "
                f"It looks like 0-255 units: write '{self.eps:g}/255'."
            )

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """An allowed image: projected onto the ball around ``x``, then onto the pixel range.

        Clipping to the range keeps a point in the ball, because ``x`` itself is in the range. For
        l-infinity the result is the nearest allowed image; for l2 it is one close by.

        Args:
            x_adv: Candidate images in pixel units, floating point.
            x: Original images, same shape, within ``[lower, upper]``.

        Returns:
            A new tensor like ``x_adv``.
        """
        return self.projector(x)(x_adv.clone())

    def projector(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`project` for one ``x`` and many candidates: bounds made once, works in place.

        Returns:
            A function that overwrites its argument with the projection and returns it.
        """
        if self.norm == "linf":
            low = (x - self.eps).clamp_(self.lower, self.upper)
            high = (x + self.eps).clamp_(self.lower, self.upper)
            return lambda x_adv: torch.clamp(x_adv, low, high, out=x_adv)

        def project_(x_adv: Tensor) -> Tensor:
            delta = project_l2(x_adv - x, self.eps)
            return torch.add(x, delta, out=x_adv).clamp_(self.lower, self.upper)

        return project_

    def random_start(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """A uniform draw from the ball around ``x``, clipped to the pixel range.

        Args:
            x: Images in pixel units, float32, within ``[lower, upper]``.
            generator: Source of randomness. None draws a fresh seed from the operating system;
                the global generator is never used.

        Returns:
            A new float32 tensor like ``x``.
        """
        source = fresh_generator(x.device) if generator is None else generator
        if self.norm == "linf":
            delta = rand_like(x, source).mul_(2 * self.eps).sub_(self.eps)
            return self.projector(x)(delta.add_(x))
        # Uniform in the l2 ball: a Gaussian direction, and a radius distributed as U^(1/d).
        direction = randn_like(x, source)
        direction.div_(sample_norms(direction).clamp_min_(torch.finfo(x.dtype).tiny))
        one_pixel = x.flatten(1)[:, :1]
        radius = rand_like(one_pixel, source).pow_(1 / max(1, x[:1].numel())).mul_(self.eps)
        delta = direction.mul_(radius.view(-1, *[1] * (x.ndim - 1)))
        return self.projector(x)(delta.add_(x))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of steepest ascent of unit length in this norm, per sample.

        ``sign(g)`` for l-infinity, ``g / ||g||_2`` for l2. A zero gradient gives zero.

        Args:
            gradient: Gradient of the inner loss, float32; overwritten.

        Returns:
            ``gradient``, now holding the direction.
        """
        if self.norm == "linf":
            return gradient.sign_()
        return gradient.div_(sample_norms(gradient).clamp_min_(torch.finfo(gradient.dtype).tiny))
