"""Where a loss or a gradient was first not finite: remembered on the device, read when asked.

Shapes: ``B`` images of a micro-batch, ``V`` outputs for each of them, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dat_ds.minmax.batch import MicroBatch
from dat_ds.minmax.outer import OuterTerms

_MOST_AWAITED = 1000


@dataclass(frozen=True)
class NonFinite:
    """The first step since the last look with a number that is not finite, on one rank.

    Attributes:
        kind: ``"loss"``, or ``"gradient"`` where the losses of the step were finite.
        step: Optimizer step, counted from 1.
        micro_steps: Those of its micro-steps whose loss was not finite.
        samples: Dataset indices of the images whose outputs were not finite; of all images of
            these micro-steps where all outputs were finite; empty where indices are not known.
        loss: The first loss that was not finite; None for a gradient.
    """

    kind: str
    step: int
    micro_steps: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    loss: float | None = None


@dataclass(frozen=True)
class _Loss:
    """A micro-step's loss that nobody has looked at yet."""

    step: int
    micro_step: int
    samples: Sequence[int] | None
    loss: Tensor
    bad_images: Tensor


class FiniteWatch:
    """Remembers losses and gradients until someone looks; a step never waits for the device."""

    def __init__(self) -> None:
        self._losses: list[_Loss] = []
        self._gradients: list[tuple[int, Tensor]] = []
        self._first: NonFinite | None = None

    @torch.no_grad()
    def see_loss(self, outer: OuterTerms, part: MicroBatch) -> None:
        """Remember whether the loss of a micro-batch is finite, and which outputs are."""
        if part.num_images == 0:  # a black image fills in, with weight 0
            return
        num_images = len(part.samples) if part.samples else part.num_images
        finite = outer.logits_adv.isfinite().flatten(1).all(1)
        if outer.logits is not None:
            finite = torch.cat([finite, outer.logits.isfinite().flatten(1).all(1)])
        # Views of an image are whole batches one after another.
        bad_images = ~finite.view(-1, num_images).all(0)
        moment = part.moment
        self._losses.append(
            _Loss(
                moment.step + 1,
                moment.slot,
                part.samples,
                outer.terms["loss"].detach(),
                bad_images,
            )
        )
        if len(self._losses) >= _MOST_AWAITED:
            self._read()

    def see_gradient(self, step: int, norm: Tensor) -> None:
        """Remember a norm ``()`` of the gradients that optimizer step ``step`` takes."""
        self._gradients.append((step, norm.detach()))
        if len(self._gradients) >= _MOST_AWAITED:
            self._read()

    def first(self) -> NonFinite | None:
        """The first since the last call, on this rank; waits for the device."""
        self._read()
        found, self._first = self._first, None
        return found

    def _read(self) -> None:
        losses, gradients = self._losses, self._gradients
        self._losses, self._gradients = [], []
        if self._first is not None or not (losses or gradients):
            return
        values = [item.loss.float() for item in losses] + [norm.float() for _, norm in gradients]
        finite = torch.stack(values).isfinite().tolist()
        bad = [item for item, fine in zip(losses, finite, strict=False) if not fine]
        steps = [
            step
            for (step, _), fine in zip(gradients, finite[len(losses) :], strict=True)
            if not fine
        ]
        step = min([item.step for item in bad] + steps, default=None)
        if step is None:
            return
        bad = [item for item in bad if item.step == step]
        if not bad:
            self._first = NonFinite("gradient", step)
            return
        self._first = NonFinite(
            "loss",
            step,
            tuple(item.micro_step for item in bad),
            tuple(sample for item in bad for sample in _samples_of(item)),
            float(bad[0].loss),
        )


def _samples_of(item: _Loss) -> list[int]:
    if item.samples is None:
        return []
    rows = item.bad_images.nonzero().flatten().tolist() or range(len(item.samples))
    return [item.samples[row] for row in rows]
