"""Free adversarial training: the update's own backward moves the perturbation.

Shafahi et al., NeurIPS 2019, arXiv 1904.12843, algorithm 1. Each batch is trained on several times
in a row (replays); one backward gives the gradient in the weights and the gradient in the images,
so an optimizer step costs as much as one of natural training. The perturbation goes on from replay
to replay and from batch to batch.

Shapes: ``B`` batch; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.attacks.attack import Attack
from dat_ds.attacks.gradient import InputGradient, Model, finite_samples
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.strategy import (
    Adversarial,
    AttackedBatch,
    CarriedPerturbations,
    InUse,
    RunAttack,
    Strategy,
)
from dat_ds.attacks.threat import ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import Trait, at_least, option, step_length


class FreePerturbation(CarriedPerturbations):
    """The perturbations that free adversarial training carries along."""

    def images(self, x: Tensor, slot: int, threat: ThreatModel, generator: Generator) -> Tensor:
        """Images under the perturbation of ``slot``, to train on.

        Args:
            x: Images, float32. May be fewer than in earlier steps.
            slot: Which micro-batch this is.
            threat: Allowed perturbations at this point of the run.
            generator: Source of the perturbations' start, drawn from the ball. (The paper starts at
                zero, where the divergence of TRADES has no gradient.)

        Returns:
            ``x_adv`` inside the threat model.
        """
        carried = self.fitting(x, slot)
        if carried is None:
            carried = threat.random_start(x, generator) - x
        return threat.project(x + carried[: len(x)].to(x.device), x)

    @torch.no_grad()
    def ascend(
        self,
        x: Tensor,
        x_adv: Tensor,
        gradient: Tensor,
        slot: int,
        threat: ThreatModel,
        step_size: float,
    ) -> None:
        """Move the perturbation of ``slot`` a step up ``gradient``.

        Args:
            x: Natural images ``(B, C, H, W)``, as in :meth:`images`, which came before.
            x_adv: Result of :meth:`images` ``(B, C, H, W)``.
            gradient: Gradient of the outer loss at ``x_adv``, up to a positive factor per sample;
                a sample whose gradient is zero stands still. Overwritten.
            slot: As in :meth:`images`.
            threat: Allowed perturbations.
            step_size: Length of the step in pixel units, in the threat model's norm.
        """
        moved = x_adv.detach().add(threat.steepest(gradient, x_adv.detach()), alpha=step_size)
        self.keep(threat.project(moved, x).sub_(x), slot)


class FreeTraining(Strategy):
    """Free adversarial training: the update's own backward moves the perturbation.

    See :class:`FreePerturbation`.

    Args:
        replays: How often each batch is trained on in a row.
    """

    moves_in_backward: ClassVar[bool] = True

    def __init__(self, replays: int) -> None:
        self.replays = replays
        self._perturbation = FreePerturbation()

    def images(self, batch: AttackedBatch, attack: InUse, run: RunAttack) -> Adversarial:
        """Images under the slot's perturbation; the model is not asked."""
        moment = batch.moment
        generator = moment.generator("start")
        x_adv = self._perturbation.images(batch.x, moment.slot, attack.ball, generator)
        return Adversarial(x_adv.requires_grad_())

    @torch.no_grad()
    def after_backward(
        self, batch: AttackedBatch, found: Adversarial, attack: InUse, gradient: InputGradient
    ) -> None:
        """Move the slot's perturbation up the gradient that the backward left at the images.

        Raises:
            RuntimeError: If it left none.
        """
        g, x_adv = found.images.grad, found.images.detach()
        if g is None:
            raise RuntimeError("The loss given to backward does not depend on the last images.")
        g = gradient.count(g, finite_samples(g))
        slot = batch.moment.slot
        self._perturbation.ascend(batch.x, x_adv, g, slot, attack.ball, attack.step)

    def state_dict(self) -> dict[Any, Tensor]:
        """The perturbations by slot."""
        return dict(self._perturbation.state_dict())

    def load_state_dict(self, state: Mapping[Any, Tensor]) -> None:
        """Go on with the perturbations of :meth:`state_dict`."""
        self._perturbation.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class FreeAttack(Attack):
    """Free adversarial training: the training step itself moves the perturbation."""

    name: ClassVar[str] = "free"
    cost: ClassVar[str] = "0, each batch is trained on `replays` times"
    paper: ClassVar[str] = "Shafahi et al., NeurIPS 2019, arXiv 1904.12843, algorithm 1"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {
            Trait.ASKS_THE_HOST,
            Trait.CARRIES_PERTURBATIONS,
            Trait.HAS_NO_STRONGER,
        }
    )
    step_share: ClassVar[float] = 1.0
    card: ClassVar[str] = """\
    for each batch, `replays` times:  one backward of loss(model(x + delta)) gives both gradients;
    weights step down theirs;  delta = project(delta + step_size * steepest(grad_x))

`step_size = eps`, `replays` (m) 4 to 8. No attack passes at all; the perturbation goes on from
replay to replay, from batch to batch, and through checkpoints. An epoch has `replays` times as many
optimizer steps, so divide `dat.schedule.epochs` by it for natural training's cost. The perturbation
climbs the whole outer loss, which for `trades` is its divergence; it starts in a random place,
where the paper starts at zero. The built-in loader repeats each batch for you. If you iterate over
your own loader, train on the batches of each optimizer step `replays` times. Like FGSM it can
suffer catastrophic overfitting, though later; large steps and few replays make it more likely.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of a step. Default: eps."""
    replays: int = at_least(1, 4)
    """Optimizer steps in a row on the same batch."""
    precision: None = option(None, is_key=False)
    fold_batch_norm: bool = option(False, is_key=False)
    resolution: int | None = option(None, is_key=False)
    keep_tokens: float | None = option(None, is_key=False)
    model_mode: Literal["eval", "train"] = option("eval", is_key=False)

    def strategy(self) -> Strategy:
        """The perturbation that goes on from step to step."""
        return FreeTraining(self.replays)

    @property
    def is_single_step(self) -> bool:
        """False: it takes no step of its own."""
        return False

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None,
        gradient: InputGradient | None,
        **carried: Tensor,
    ) -> Tensor:
        """Raise: apart from a training step there is no such attack.

        Raises:
            ValueError: Always.
        """
        raise ValueError("attack 'free' is part of a training step: attack a model with 'pgd'.")
