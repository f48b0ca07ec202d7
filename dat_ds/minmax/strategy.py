"""What an attack carries from one step of training to the next: by default nothing.

Shapes: ``n`` images of a micro-batch, ``V`` adversarial images for each; images ``(n, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dat_ds.attacks import Attack, FreeAttack, FreePerturbation, InputGradient, finite_samples
from dat_ds.minmax.batch import MicroBatch

RunAttack = Callable[..., Tensor]
"""Runs the attack on the frozen model; its keyword arguments, if any, are the attack's."""


@dataclass(frozen=True)
class Adversarial:
    """What an inner maximisation found.

    Attributes:
        images: Adversarial images ``(V n, C, H, W)``, those of one view after the other.
        start: Where the attack started from ``(n, C, H, W)``; None where no one asks.
    """

    images: Tensor
    start: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[Adversarial]:
        """What was found for each part of a batch that was attacked as one."""
        by_view = self.images.view(-1, sum(sizes), *self.images.shape[1:])
        views = torch.split(by_view, list(sizes), dim=1)
        starts: Sequence[Tensor | None] = [None] * len(sizes)
        if self.start is not None:
            starts = torch.split(self.start, list(sizes))
        return [
            Adversarial(images.flatten(0, 1), start)
            for images, start in zip(views, starts, strict=True)
        ]


class Strategy:
    """How the images to train on come about: here, by an attack that leaves nothing behind.

    Subclasses carry something along. :meth:`images` must leave it as it is, so that an attack may
    be run and thrown away; :meth:`after_backward` moves it on.

    Attributes:
        moves_in_backward: Whether the outer loss's own backward has to reach the images.
        replays: Optimizer steps in a row that train on the same batch.
    """

    moves_in_backward: ClassVar[bool] = False
    replays: int = 1

    def images(self, batch: MicroBatch, attack: Attack, run: RunAttack) -> Adversarial:
        """Images to train on.

        Args:
            batch: Natural images, and their place in the run; where several micro-batches are
                attacked as one, all of them, at the slot of the first.
            attack: The attack at this point of the run.
            run: Runs it on ``batch``.
        """
        return Adversarial(run())

    def after_backward(
        self, batch: MicroBatch, found: Adversarial, attack: Attack, gradient: InputGradient
    ) -> None:
        """Move on what is carried along, after the backward of the outer loss.

        Args:
            batch: As in :meth:`images`.
            found: What that returned for it.
            attack: As in :meth:`images`.
            gradient: Counts gradients.
        """

    def state_dict(self) -> dict[Any, Tensor]:
        """What is carried along, on the CPU."""
        return {}

    def load_state_dict(self, state: Mapping[Any, Tensor]) -> None:
        """Go on with what :meth:`state_dict` returned."""


class FreeTraining(Strategy):
    """Free adversarial training: the update's own backward moves the perturbation.

    See :class:`dat_ds.attacks.FreePerturbation`.

    Args:
        attack: Says how often each batch is trained on.
    """

    moves_in_backward: ClassVar[bool] = True

    def __init__(self, attack: FreeAttack) -> None:
        self.replays = attack.replays
        self._perturbation = FreePerturbation()

    def images(self, batch: MicroBatch, attack: Attack, run: RunAttack) -> Adversarial:
        """Images under the slot's perturbation; the model is not asked."""
        moment = batch.moment
        generator = moment.generator("start")
        x_adv = self._perturbation.images(batch.x, moment.slot, attack.threat, generator)
        return Adversarial(x_adv.requires_grad_())

    @torch.no_grad()
    def after_backward(
        self, batch: MicroBatch, found: Adversarial, attack: Attack, gradient: InputGradient
    ) -> None:
        """Move the slot's perturbation up the gradient that the backward left at the images.

        Raises:
            RuntimeError: If it left none.
        """
        assert isinstance(attack, FreeAttack)
        g, x_adv = found.images.grad, found.images.detach()
        if g is None:
            raise RuntimeError("The loss given to backward does not depend on the last images.")
        g = gradient.count(g, finite_samples(g))
        slot = batch.moment.slot
        self._perturbation.ascend(batch.x, x_adv, g, slot, attack.threat, attack.step_size)

    def state_dict(self) -> dict[Any, Tensor]:
        """The perturbations by slot."""
        return dict(self._perturbation.state_dict())

    def load_state_dict(self, state: Mapping[Any, Tensor]) -> None:
        """Go on with the perturbations of :meth:`state_dict`."""
        self._perturbation.load_state_dict(state)


def strategy_of(attack: Attack | None) -> Strategy:
    """How an attack makes the images to train on."""
    return FreeTraining(attack) if isinstance(attack, FreeAttack) else Strategy()
