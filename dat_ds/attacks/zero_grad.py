"""ZeroGrad: FGSM that leaves the pixels with the smallest gradients where they started.

Golgooni et al. 2021, arXiv 2103.15476, sec. 4.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.attacks.ascent import inner_target, step_
from dat_ds.attacks.attack import Attack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import share, step_length


def zero_grad(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: StepSize | None = None,
    zeroed: float = 0.35,
    loss: str | InnerLoss = "ce",
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """One step from a random start along the signs of each sample's larger gradient entries.

    ``x_adv = project(x_0 + step_size * sign(g where |g| >= q else 0))`` with ``q`` the quantile
    ``zeroed`` of the sample's ``|g|``. Tiny gradients have signs that mean nothing; FGSM moves
    their pixels by a whole eps all the same, which the paper finds behind catastrophic overfitting.

    Cost: one forward and one input-gradient backward.

    Args:
        model: As in :func:`dat_ds.attacks.pgd`, and so are ``x``, ``y``, ``loss``, ``generator``,
            ``model_mode`` and ``gradient``.
        x: Images, float32.
        y: Labels as the loss takes them.
        threat: l-infinity only.
        step_size: Length of the step. None: ``2 eps``, so that every pixel that moves reaches the
            border of the ball.
        zeroed: Share of each sample's entries that stay, in [0, 1]; 0 is FGSM from a random start.
        loss: What is maximised.
        generator: Source of the random start.
        model_mode: Mode of the model's modules.
        gradient: How input gradients are taken and counted.

    Returns:
        ``x_adv``, detached float32, inside the threat model.

    Raises:
        ValueError: For another norm than l-infinity.
    """
    if threat.norm != "linf":
        raise ValueError(f"zero_grad is defined for norm 'linf', not {threat.norm!r}: use 'pgd'.")
    inner = ascent_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        y = inner_target(model, x, y, loss)
        x_adv = threat.random_start(x, generator)
        direction = take_gradient(model, x_adv, y, inner)
    magnitude = direction.abs()
    direction.masked_fill_(magnitude < per_sample(quantile(magnitude, zeroed), x), 0.0).sign_()
    size = threat.step(step_size, ZeroGrad.step_share)
    return threat.projector(x)(step_(x_adv, direction, size))


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile ``share`` of each sample's entries ``(B,)``, linearly interpolated.

    As ``torch.quantile``, which refuses more than 16 million entries.
    """
    ordered = values.flatten(1).sort(dim=1).values
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


@dataclass(frozen=True, kw_only=True)
class ZeroGrad(Attack):
    """FGSM from a random start that leaves the pixels with the smallest gradients alone."""

    name: ClassVar[str] = "zero_grad"
    function = staticmethod(zero_grad)
    cost: ClassVar[str] = "`2 F`"
    paper: ClassVar[str] = "Golgooni et al. 2021, arXiv 2103.15476, sec. 4"
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    always_random: ClassVar[bool] = True
    step_share: ClassVar[float] = 2.0
    card: ClassVar[str] = """\
    x_adv = project(x_0 + 2 eps * sign(g)),  g = 0 where |g| is below its sample's quantile `zeroed`

`zeroed` is 0.35 for CIFAR-10, 0.45 for CIFAR-100, 0.7 for SVHN in the paper. Pixels that do not
move keep their random start. Over many epochs it still collapses (catastrophic overfitting), later
than FGSM: keep `dat.guard`.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of the step. Default: 2 eps."""
    zeroed: float = share(0.35)
    """Share of each image's gradient entries that are set to zero."""
    loss: str | None = None
    """What is maximised. Default: the objective's, where it fits; else ``ce``."""
