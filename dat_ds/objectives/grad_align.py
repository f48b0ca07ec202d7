"""Gradient alignment (GradAlign) without second derivatives.

Andriushchenko and Flammarion, NeurIPS 2020, arXiv 2007.02617, eq. 4: the regulariser
``1 - cos(g(x), g(x + eta))``, with ``g`` the input gradient of the loss and ``eta`` uniform in the
ball. Its gradient in the weights is a second derivative, which ZeRO-3 cannot take through sharded
parameters. Along a fixed direction ``d`` it is a difference of first ones,

    d/dtheta <d, g(x)> = (grad_theta loss(x + h d) - grad_theta loss(x - h d)) / (2 h) + O(h^2),

so the outer forward of four shifted images per sample gives it, under every stage.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_ds.attacks.gradient import Model
from dat_ds.attacks.modes import ModelMode, attack_mode
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.projections import per_sample, sample_norms
from dat_ds.attacks.threat import ThreatModel

_SHARE = 0.1  # h over the length of eta


@dataclass(frozen=True)
class AlignmentProbes:
    """Images whose losses, weighted, have the regulariser's gradient in the weights.

    Attributes:
        images: ``x + h d``, ``x - h d`` and the same around ``x + eta``: ``(4 B, C, H, W)``; they
            may leave the pixel range by ``h d``.
        weights: Weight of the difference of losses at each pair ``(2 B,)``.
        misalignment: ``1 - cos`` of each sample ``(B,)``.
    """

    images: Tensor
    weights: Tensor
    misalignment: Tensor

    def penalty(self, logits: Tensor, y: Tensor) -> Tensor:
        """The regulariser: its value is exact, its gradient that of the finite difference.

        Args:
            logits: Logits of :attr:`images` ``(4 B, K)``.
            y: Class indices ``(B,)``, or probabilities ``(B, K)``.

        Returns:
            Mean over samples, a scalar in float32 (float64 for float64 logits).
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        y = y.to(logits.dtype) if y.is_floating_point() else y
        losses = F.cross_entropy(logits, y.repeat(4, *[1] * (y.ndim - 1)), reduction="none")
        above, below, above_eta, below_eta = losses.chunk(4)
        here, there = self.weights.to(losses.dtype).chunk(2)
        surrogate = (here * (above - below) + there * (above_eta - below_eta)).mean()
        return surrogate - surrogate.detach() + self.misalignment.mean()


def alignment_probes(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
) -> AlignmentProbes:
    """Choose the images at which the outer forward has to look; two input gradients.

    Args:
        model: Pixels to logits ``(B, K)``.
        x: Images, float32; not modified.
        y: Class indices ``(B,)``, or probabilities ``(B, K)``.
        threat: Ball that ``eta`` is drawn from.
        generator: Source of ``eta``. None: a fresh, unpredictable one.
        model_mode: Mode of the model's modules meanwhile.

    Returns:
        The probes, detached.
    """
    x = x.detach()
    near = threat.random_start(x, generator)
    with attack_mode(model, model_mode):
        here, there = (_loss_gradient(model, images, y) for images in (x, near))
    tiny = torch.finfo(x.dtype).tiny
    length, length_near = (sample_norms(g).clamp_min(tiny) for g in (here, there))
    unit, unit_near = here / length, there / length_near
    cosine = per_sample((unit * unit_near).flatten(1).sum(dim=1), x)
    h = _SHARE * sample_norms(near - x).clamp_min(tiny)
    images, weights = [], []
    for base, own, other, norm in (
        (x, unit, unit_near, length),
        (near, unit_near, unit, length_near),
    ):
        # d(1 - cos)/dg = -(other - cos * own) / ||g||
        slope = other - cosine * own
        steepness = sample_norms(slope).clamp_min(tiny)
        shift = h * slope / steepness
        images += [base + shift, base - shift]
        weights.append((-steepness / norm / (2 * h)).flatten())
    return AlignmentProbes(torch.cat(images), torch.cat(weights), 1 - cosine.flatten())


def _loss_gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of each sample's cross-entropy at ``x``, unscaled: its length counts here."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, y, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]
