"""FGSM from the perturbation of the previous batch.

Jia et al., "Prior-Guided Adversarial Initialization for Fast Adversarial Training", ECCV 2022,
arXiv 2207.08859, sec. 3.2 (FGSM-BP).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dat_ds.attacks.ascent import step_
from dat_ds.attacks.attack import Attack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.strategy import (
    Adversarial,
    AttackedBatch,
    CarriedPerturbations,
    InUse,
    RunAttack,
    Strategy,
)
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import Trait, step_length


def fgsm_pgi(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: StepSize | None = None,
    loss: str | InnerLoss = "ce",
    start: Tensor | None = None,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """One step of FGSM from ``start``.

    Args:
        model: As in :func:`dat_ds.attacks.pgd`, and so are ``x``, ``y``, ``threat``, ``loss``,
            ``model_mode`` and ``gradient``.
        x: Images, float32.
        y: Labels as the loss takes them.
        threat: l-infinity or l2.
        step_size: Length of the step. None: eps.
        loss: What is maximised.
        start: Images inside the ball to start from. None: a draw from the ball.
        generator: Source of that draw.
        model_mode: Mode of the model's modules.
        gradient: How input gradients are taken and counted.

    Returns:
        ``x_adv``, detached float32, inside the threat model.
    """
    inner = ascent_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        x_adv = threat.random_start(x, generator) if start is None else start.detach().clone()
        direction = threat.steepest(take_gradient(model, x_adv, y, inner), x_adv)
    size = threat.step(step_size, FgsmPgi.step_share)
    return threat.projector(x)(step_(x_adv, direction, size))


class PriorPerturbation(Strategy):
    """Starts where the attack on the previous batch ended, image by image of a micro-batch."""

    def __init__(self) -> None:
        self._priors = CarriedPerturbations()

    def images(self, batch: AttackedBatch, attack: InUse, run: RunAttack) -> Adversarial:
        """Images of the step from the prior, and where it started."""
        x, prior = batch.x, self._priors.fitting(batch.x, batch.moment.slot)
        if prior is None:
            start = attack.ball.random_start(x, batch.moment.generator("start"))
        else:
            start = attack.ball.project(x + prior[: len(x)].to(x.device), x)
        return Adversarial(run(start=start), start)

    @torch.no_grad()
    def after_backward(
        self, batch: AttackedBatch, found: Adversarial, attack: InUse, gradient: InputGradient
    ) -> None:
        """Keep this batch's perturbation for the next one."""
        self._priors.keep(found.images.detach() - batch.x, batch.moment.slot)

    def state_dict(self) -> dict[Any, Tensor]:
        """The perturbations by slot."""
        return dict(self._priors.state_dict())

    def load_state_dict(self, state: Mapping[Any, Tensor]) -> None:
        """Go on with the perturbations of :meth:`state_dict`."""
        self._priors.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class FgsmPgi(Attack):
    """One step of FGSM from the perturbation of the previous batch."""

    name: ClassVar[str] = "fgsm_pgi"
    function = staticmethod(fgsm_pgi)
    cost: ClassVar[str] = "`2 F`"
    paper: ClassVar[str] = "Jia et al., ECCV 2022, arXiv 2207.08859, sec. 3.2 (FGSM-BP)"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    always_random: ClassVar[bool] = True  # the first batch; later ones start away from the image
    norm_reason: ClassVar[str] = ", which has no sign step"
    losses: ClassVar[tuple[str, ...]] = ("ce", "cw", "dlr", "feature_distance")
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.CARRIES_PERTURBATIONS})
    step_share: ClassVar[float] = 1.0
    tells_start: ClassVar[bool] = True
    card: ClassVar[str] = """\
    x_0 = project(x + delta);  x_adv = project(x_0 + eps * sign(grad loss(f(x_0), y)))
    delta = x_adv - x

The prior of the paper's batch variant (BP): `delta` goes on from batch to batch by place in the
micro-batch, and through checkpoints. Its variants EP and MEP keep a perturbation for every image,
which would have to follow images from rank to rank. The objective `pgi` is its outer loss.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of the step. Default: eps."""
    loss: str | None = None
    """Loss that is maximised. Default: ``ce``."""

    def strategy(self) -> Strategy:
        """The perturbation that goes on from batch to batch."""
        return PriorPerturbation()
