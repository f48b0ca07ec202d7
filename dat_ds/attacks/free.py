"""Free adversarial training: the update's own backward moves the perturbation.

Shafahi et al., NeurIPS 2019, arXiv 1904.12843, algorithm 1. Each batch is trained on several times
in a row (replays); one backward gives the gradient in the weights and the gradient in the images,
so an optimizer step costs as much as one of natural training. The perturbation goes on from replay
to replay and from batch to batch.

Shapes: ``B`` batch; images ``(B, C, H, W)``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dat_ds.attacks.noise import Generator
from dat_ds.attacks.threat import ThreatModel


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
        carried = self._fitting(x, slot)
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
            x: As in :meth:`images`, which came before.
            x_adv: What it returned.
            gradient: Gradient of the outer loss at ``x_adv``, up to a positive factor per sample;
                a sample whose gradient is zero stands still. Overwritten.
            slot: As in :meth:`images`.
            threat: As in :meth:`images`.
            step_size: Length of the step in pixel units, in the threat model's norm.
        """
        moved = x_adv.detach().add(threat.steepest(gradient, x_adv.detach()), alpha=step_size)
        delta = threat.project(moved, x).sub_(x)
        carried = self._fitting(x, slot)
        if carried is None or len(carried) == len(x):
            self._carried[slot] = delta
        else:
            self._carried[slot] = torch.cat([delta, carried[len(x) :].to(x.device)])

    def _fitting(self, x: Tensor, slot: int) -> Tensor | None:
        """The perturbation of ``slot``, where it is one of images like ``x``."""
        carried = self._carried.get(slot)
        if carried is None or len(carried) < len(x) or carried.shape[1:] != x.shape[1:]:
            return None
        return carried

    def state_dict(self) -> dict[int, Tensor]:
        """The perturbations by slot, on the CPU."""
        return {slot: carried.cpu() for slot, carried in self._carried.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Go on with the perturbations of :meth:`state_dict`."""
        self._carried = dict(state)
