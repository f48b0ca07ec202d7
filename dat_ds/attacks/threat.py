"""Threat models: which perturbations an attacker may make.

Shapes: ``x`` and ``x_adv`` are ``(B, C, H, W)``; the first dimension is the sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dat_ds.attacks.noise import Generator, fresh_generator, rand_like, randn_like
from dat_ds.attacks.projections import per_sample, project_l1_box, project_l2, sample_norms
from dat_ds.length import OfEps, parse_length, parse_step

Norm = Literal["linf", "l2", "l1"]
StepSize = float | str | Tensor
"""A length in pixel units, for all samples or for each ``(B,)``; text as in JSON: ``"2/255"``,
``"eps/4"``."""
_L1_SHARE = 0.01  # SLIDE's quantile of 99 %
_ORDERS = {"l2": 2.0, "l1": 1.0}
_DUAL_ORDERS = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
NORMS: tuple[str, ...] = get_args(Norm)


@dataclass(frozen=True)
class ThreatModel:
    """A norm ball of radius ``eps`` around the image, within the pixel range.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius in pixel units (a full-range pixel is ``upper - lower``), also as text such as
            ``"8/255"``; 0 allows nothing.
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
        object.__setattr__(self, "eps", parse_length(self.eps))
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is not one of {', '.join(NORMS)}.")
        if not self.lower < self.upper:
            raise ValueError(f"lower={self.lower} must be below upper={self.upper}.")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps={self.eps:g} must be a finite number of at least 0.")
        if self.norm == "linf" and self.eps > self.upper - self.lower:
            raise ValueError(
                f"eps={self.eps:g} exceeds the pixel range [{self.lower}, {self.upper}]. "
                f"It looks like 0-255 units: write '{self.eps:g}/255'."
            )

    def step(self, size: StepSize | None, share: float) -> float | Tensor:
        """A step size in pixel units.

        Args:
            size: As an attack takes it; None for its default.
            share: The default as a share of eps.

        Raises:
            ValueError: For text that is neither a length nor a multiple of eps.
        """
        if size is None:
            return share * self.eps
        if isinstance(size, Tensor):
            return size
        length = parse_step(size)
        return self.eps * length.share if isinstance(length, OfEps) else float(length)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """An allowed image: projected onto the ball around ``x``, then onto the pixel range.

        Clipping to the range keeps a point in the ball, because ``x`` itself is in the range. For
        l-infinity and l1 the result is the nearest allowed image; for l2 it is one close by.

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
        if self.norm == "l1":
            low, high = self.lower - x, self.upper - x
            return lambda x_adv: torch.add(
                x, project_l1_box(x_adv - x, self.eps, low, high), out=x_adv
            ).clamp_(self.lower, self.upper)

        def project_(x_adv: Tensor) -> Tensor:
            delta = project_l2(x_adv - x, self.eps)
            return torch.add(x, delta, out=x_adv).clamp_(self.lower, self.upper)

        return project_

    def random_start(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """A random image of the ball around ``x``, clipped to the pixel range.

        Uniform for l-infinity. For l2 and l1 a uniform direction and a length uniform in
        ``[0, eps]``: a uniform draw from a ball of many dimensions lies at its surface, and an
        attack of few steps spends them on the way back.

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
        if self.norm == "l1":
            # Exponential magnitudes over their sum are uniform on the l1 sphere.
            direction = rand_like(x, source).log_()
            total = direction.flatten(1).sum(dim=1)
            sign = rand_like(x, source).sub_(0.5).sign_()
            direction.mul_(sign).div_(per_sample(total, x))
        else:
            direction = randn_like(x, source)
            direction.div_(sample_norms(direction).clamp_min_(torch.finfo(x.dtype).tiny))
        length = rand_like(x.flatten(1)[:, :1], source).mul_(self.eps)
        delta = direction.mul_(per_sample(length.flatten(), x))
        return self.projector(x)(delta.add_(x))

    def steepest(self, gradient: Tensor, x_adv: Tensor | None = None) -> Tensor:
        """Direction of steepest ascent of unit length in this norm, per sample.

        ``sign(g)`` for l-infinity, ``g / ||g||_2`` for l2. For l1 steepest ascent moves a single
        entry; instead the largest 1 % move alike, as in SLIDE (Tramer and Boneh, NeurIPS 2019,
        arXiv 1904.13000, sec. 3). A zero gradient gives zero.

        Args:
            gradient: Gradient of the inner loss, float32; overwritten.
            x_adv: Where the step starts, same shape. For l1, pixels at an end of their range that
                would leave it are passed over; they would use up the few that move.

        Returns:
            The direction, like ``gradient``.
        """
        if self.norm == "linf":
            return gradient.sign_()
        if self.norm == "l1":
            if x_adv is not None:
                gradient.masked_fill_((x_adv <= self.lower) & (gradient < 0), 0.0)
                gradient.masked_fill_((x_adv >= self.upper) & (gradient > 0), 0.0)
            return sparse_sign(gradient, _L1_SHARE)
        return gradient.div_(sample_norms(gradient).clamp_min_(torch.finfo(gradient.dtype).tiny))

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Length of each sample's perturbation in this norm, ``(B,)``, pixel units."""
        delta = (x_adv - x).flatten(1)
        if self.norm == "linf":  # several times as fast as vector_norm on a CPU
            return delta.abs_().amax(dim=1)
        lengths: Tensor = torch.linalg.vector_norm(delta, ord=_ORDERS[self.norm], dim=1)
        return lengths

    @property
    def dual_order(self) -> float:
        """Order of the dual norm, in which a gradient is a loss's slope in this norm."""
        return _DUAL_ORDERS[self.norm]


def sparse_sign(gradient: Tensor, share: float | Tensor) -> Tensor:
    """Signs of each sample's largest entries over their number: of unit l1 norm.

    Args:
        gradient: Shape ``(B, ...)``.
        share: Share of the entries that move, for all samples or for each ``(B,)``; one at least.

    Returns:
        A new tensor like ``gradient``; zero where the gradient is.
    """
    flat = gradient.flatten(1)
    numel = flat.shape[1]
    if not isinstance(share, Tensor):
        share = torch.full((), share, device=flat.device)  # without a copy from the host
    count = (share * numel).long().clamp(1, numel)
    descending = flat.abs().sort(dim=1, descending=True).values
    least = descending.gather(1, (count - 1).expand(len(flat)).unsqueeze(1))
    sign = flat.sign() * (flat.abs() >= least)
    moved = sign.abs().sum(dim=1, keepdim=True).clamp_min(1)
    return (sign / moved).view_as(gradient)
