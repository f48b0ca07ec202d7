"""Free adversarial training: the update's own backward moves the perturbation.

Shafahi et al., NeurIPS 2019, arXiv 1904.12843, algorithm 1. Each batch is trained on several times
in a row (replays); one backward gives the gradient in the weights and the gradient in the images,
so an optimizer step costs as much as one of natural training. The perturbation goes on from replay
to replay and from batch to batch.

Shapes: ``B`` batch; images ``(B, C, H, W)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.attacks.attack import Attack
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.threat import ThreatModel
from dat_ds.length import Length
from dat_ds.method import Trait, at_least, option


class FreePerturbation:
    """The perturbations that free adversarial training carries along.

    One for each *slot*: the place of a micro-batch among the micro-steps of an optimizer step.
    """

    def __init__(self) -> None:
        self._carried: dict[int, Tensor] = {}

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
        carried = self._carried.get(slot)
        if carried is None or len(carried) < len(x) or carried.shape[1:] != x.shape[1:]:
            carried = self._carried[slot] = threat.random_start(x, generator) - x
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
            x: As in :meth:`images`, which came before.
            x_adv: What it returned.
            gradient: Gradient of the outer loss at ``x_adv``, up to a positive factor per sample;
                a sample whose gradient is zero stands still. Overwritten.
            slot: As in :meth:`images`.
            threat: As in :meth:`images`.
            step_size: Length of the step in pixel units, in the threat model's norm.
        """
        moved = x_adv.detach().add(threat.steepest(gradient, x_adv.detach()), alpha=step_size)
        carried = self._carried[slot] = self._carried[slot].to(x.device)
        carried[: len(x)] = threat.project(moved, x).sub_(x)

    def state_dict(self) -> dict[int, Tensor]:
        """The perturbations by slot, on the CPU."""
        return {slot: carried.cpu() for slot, carried in self._carried.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on with the perturbations of :meth:`state_dict`."""
        self._carried = dict(state)


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
            Trait.IS_THE_STEP,
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
your own loader, call the engine `replays` times per batch. Like FGSM it can suffer catastrophic
overfitting, though later; large steps and few replays make it more likely.
"""

    step_size: Length | None = at_least(0, None)
    """Length of a step. Default: eps."""
    replays: int = at_least(1, 4)
    """Optimizer steps in a row on the same batch."""
    precision: None = option(None, is_key=False)
    fold_batch_norm: bool = option(False, is_key=False)
    resolution: int | None = option(None, is_key=False)
    keep_tokens: float | None = option(None, is_key=False)
    model_mode: Literal["eval", "train"] = option("eval", is_key=False)

    @property
    def is_single_step(self) -> bool:
        """False: it takes no step of its own."""
        return False

    @property
    def step(self) -> float:
        """Length of a step in pixel units."""
        return self.ball.eps if self.step_size is None else float(self.step_size)

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None,
        gradient: InputGradient | None,
    ) -> Tensor:
        """Raise: apart from a training step there is no such attack.

        Raises:
            ValueError: Always.
        """
        raise ValueError("attack 'free' is part of a training step: attack a model with 'pgd'.")
