"""State that an attack carries from one training step to the next: by default none.

Shapes: ``n`` images of a micro-batch, ``V`` adversarial images for each; images ``(n, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dat_ds.attacks.gradient import InputGradient
from dat_ds.attacks.noise import SampleGenerator
from dat_ds.attacks.threat import ThreatModel


class Place(Protocol):
    """Where in the run a micro-batch is."""

    @property
    def slot(self) -> int:
        """Micro-steps done since the last optimizer step."""
        ...

    def generator(self, stream: Any) -> SampleGenerator:
        """The beginning of a stream of random numbers, such as ``"start"``."""
        ...


class AttackedBatch(Protocol):
    """A micro-batch: natural images ``x`` and what outputs are compared with, ``y``."""

    @property
    def x(self) -> Tensor:
        """Images ``(n, C, H, W)``, float32."""
        ...

    @property
    def y(self) -> Tensor:
        """Target of the inner loss."""
        ...

    @property
    def moment(self) -> Place:
        """Its place in the run."""
        ...

    @property
    def samples(self) -> Sequence[int] | None:
        """Dataset index of each image; None where it is not known."""
        ...


class InUse(Protocol):
    """The attack at a point of the run."""

    @property
    def ball(self) -> ThreatModel:
        """Its threat model."""
        ...

    @property
    def step(self) -> float:
        """Length of its step in pixel units."""
        ...


RunAttack = Callable[..., Tensor]
"""Runs the attack on the frozen model; its keyword arguments, if any, are the attack's."""


@dataclass(frozen=True)
class Adversarial:
    """Result of an inner maximisation.

    Attributes:
        images: Adversarial images ``(V n, C, H, W)``, those of one view after the other.
        start: Where the attack started from ``(n, C, H, W)``; None where no one asks.
    """

    images: Tensor
    start: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[Adversarial]:
        """The result for each part of a batch that was attacked as one."""
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

    def images(self, batch: AttackedBatch, attack: InUse, run: RunAttack) -> Adversarial:
        """Images to train on.

        Args:
            batch: Natural images, and their place in the run; where several micro-batches are
                attacked as one, all of them, at the slot of the first.
            attack: The attack at this point of the run.
            run: Runs it on ``batch``.
        """
        return Adversarial(run())

    def after_backward(
        self, batch: AttackedBatch, found: Adversarial, attack: InUse, gradient: InputGradient
    ) -> None:
        """Move on what is carried along, after the backward of the outer loss.

        Args:
            batch: Natural images, as in :meth:`images`.
            found: Result of :meth:`images` for it.
            attack: The attack at this point of the run, as in :meth:`images`.
            gradient: Counts gradients.
        """

    def state_dict(self) -> dict[Any, Tensor]:
        """State to save, on the CPU."""
        return {}

    def load_state_dict(self, state: Mapping[Any, Tensor]) -> None:
        """Go on with what :meth:`state_dict` returned."""


class CarriedPerturbations:
    """Perturbations that go on from step to step, one batch of them for each *slot*.

    A slot is the place of a micro-batch among the micro-steps of an optimizer step.
    """

    def __init__(self) -> None:
        self._carried: dict[int, Tensor] = {}

    def fitting(self, x: Tensor, slot: int) -> Tensor | None:
        """Those of ``slot``, at least ``len(x)``; None where they are not of images like ``x``."""
        carried = self._carried.get(slot)
        if carried is None or len(carried) < len(x) or carried.shape[1:] != x.shape[1:]:
            return None
        return carried

    def keep(self, delta: Tensor, slot: int) -> None:
        """Put ``delta`` in the place of the first of ``slot``; those of a larger batch stay."""
        carried = self.fitting(delta, slot)
        if carried is not None and len(carried) > len(delta):
            delta = torch.cat([delta, carried[len(delta) :].to(delta.device)])
        self._carried[slot] = delta

    def state_dict(self) -> dict[int, Tensor]:
        """The perturbations by slot, on the CPU."""
        return {slot: carried.cpu() for slot, carried in self._carried.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on with the perturbations of :meth:`state_dict`."""
        self._carried = dict(state)
