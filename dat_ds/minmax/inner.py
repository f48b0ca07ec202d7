"""The inner maximisation of a training step: adversarial images, and what their cost depends on.

Shapes: ``n`` images of a micro-batch; images ``(n, C, H, W)``.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dat_ds.attacks import (
    FORMATS,
    Attack,
    AttackGraphs,
    InputGradient,
    Precision,
    already_checked,
    check_device,
    gradient_speedup,
    product_speedup,
)
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.strategy import Adversarial, Strategy
from dat_ds.minmax.batch import MicroBatch, joined
from dat_ds.objectives import AlignmentProbes, alignment_probes
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_WORTHWHILE = 1.1
"""Speedup of the attack from which on ``auto`` takes a shorter float."""


@dataclass(frozen=True)
class Access:
    """The model in training, as whoever trains it opens it to the inner maximisation.

    Attributes:
        ranks: The processes of the run.
        opened: Gives the model for one attack: pixels in, outputs out, in a mode; frozen, under
            the update's autocast, with its parameters where they have to be. No trace is left.
        overflows: Whether the model computes in float16.
    """

    ranks: Ranks
    opened: Callable[[ModelMode], AbstractContextManager[Model]]
    overflows: bool


class InnerMaximisation:
    """Attacks micro-batches on the model in training.

    Args:
        access: Opens the model.
        attack: The training attack; None trains naturally.
        model_mode: Mode of the model's modules during the attack.
        precision: Of the attack's passes, or ``"auto"``, which times what is faster at the first
            attack; None for the attack's own.
        graphs: Replays attacks as CUDA graphs; None where they run step by step.
        aligns: Whether GradAlign's probes are taken.

    Attributes:
        precision: Of the attack's passes; None for the model's; ``"auto"`` until the first attack.
        strategy: State that the attack carries from step to step.
        graphs: As given.
    """

    def __init__(
        self,
        access: Access,
        attack: Attack | None,
        *,
        model_mode: ModelMode = "eval",
        precision: Precision | Literal["auto"] | None = None,
        graphs: AttackGraphs | None = None,
        aligns: bool = False,
    ) -> None:
        self._access = access
        self._model_mode = model_mode
        self._aligns = aligns
        self.graphs = graphs
        self.precision = precision
        if precision is None and attack is not None:
            self.precision = attack.precision
        if self.precision is not None and self.precision != "auto":
            with access.ranks.together():
                check_device(access.ranks.device, self.precision)
            _warn_of_slow_products(self.precision, access.ranks)
        _tell_what_is_experimental(self.precision, graphs, access.ranks)
        self.use(attack)

    @property
    def is_natural(self) -> bool:
        """Whether there is no attack."""
        return self._attack is None

    def use(self, attack: Attack | None) -> None:
        """Take another attack, without what the last one carried along; None for none."""
        self._attack = attack
        self.strategy = Strategy() if attack is None else attack.strategy()
        self._awaited: tuple[MicroBatch, Adversarial] | None = None
        if self.graphs is not None:
            self.graphs.clear()

    def attack_at(self, progress: float) -> Attack | None:
        """The attack at a point of the run, ``progress`` in [0, 1]; None for natural training."""
        if self._attack is None:
            return None
        attack = self._attack.at(progress)
        if self.precision == "auto":
            return attack
        return attack.with_precision(self.precision)

    def input_gradient(self) -> InputGradient:
        """Takes and counts input gradients, again where float16 overflows on any rank."""
        overflows = self._access.overflows or self.precision == "fp16"
        return InputGradient(retry_non_finite=overflows, agree=self._access.ranks.any)

    def images(self, batch: MicroBatch, gradient: InputGradient) -> Adversarial:
        """Adversarial images for ``batch``; the model and what is carried along stay as they are.

        Args:
            batch: Natural images, and their place in the run.
            gradient: Counts of the attack's gradients go here.
        """
        attack = self.attack_at(batch.moment.progress)
        if attack is None:
            return Adversarial(batch.x)
        run = functools.partial(self._run, attack, batch, gradient)
        with already_checked():
            return self.strategy.images(batch, attack, run)

    def maximise(
        self, group: Sequence[MicroBatch], gradient: InputGradient
    ) -> list[tuple[MicroBatch, Adversarial]]:
        """Micro-batches of one optimizer step, attacked as one batch, each with its images."""
        if len(group) == 1:
            return [(group[0], self.images(group[0], gradient))]
        found = self.images(joined(group), gradient).split([len(part.x) for part in group])
        return list(zip(group, found, strict=True))

    def probes(self, batch: MicroBatch) -> AlignmentProbes | None:
        """GradAlign's images for the outer forward; None where it is off."""
        attack = self.attack_at(batch.moment.progress)
        if not self._aligns or attack is None:
            return None
        generator = batch.moment.generator("probe")
        with self._access.opened(self._model_mode) as model:
            return alignment_probes(
                model, batch.x, batch.y, threat=attack.ball, generator=generator
            )

    def await_backward(self, batch: MicroBatch, found: Adversarial) -> None:
        """Remember what :meth:`after_backward` follows."""
        self._awaited = (batch, found) if batch.num_images else None

    def after_backward(self, gradient: InputGradient) -> None:
        """Move on what the attack carries along, once the outer loss has gone backward."""
        if self._awaited is None:
            return
        (batch, found), self._awaited = self._awaited, None
        attack = self.attack_at(batch.moment.progress)
        if attack is not None:
            self.strategy.after_backward(batch, found, attack, gradient)

    # ---- internals

    def _run(
        self, attack: Attack, batch: MicroBatch, gradient: InputGradient, **carried: Tensor
    ) -> Tensor:
        """The attack on the opened model, with what its strategy carries along."""
        generator = batch.moment.generator("start")
        opened = functools.partial(self._access.opened, self._model_mode)
        if self.precision == "auto":
            with opened() as model:
                self.precision = self._faster_precision(model, batch.x)
            attack = attack.with_precision(self.precision)
        # A recording would go on with what was carried along when it was made.
        if self.graphs is not None and not carried:
            return self.graphs(attack, opened, batch.x, batch.y, generator, gradient)
        with opened() as model:
            return attack(model, batch.x, batch.y, generator, gradient=gradient, **carried)

    def _faster_precision(self, model: Model, x: Tensor) -> Precision | None:
        """``bf16`` where it makes the attack faster on every rank, else None; a collective."""
        ranks = self._access.ranks

        def slower_anywhere(speedup: float) -> bool:
            return ranks.any(torch.tensor(speedup < _WORTHWHILE))

        # Where a processor lacks the instructions, the model would take minutes.
        on_cpu = ranks.device.type == "cpu"
        of_products = product_speedup(ranks.device, "bf16") if on_cpu else math.inf
        chosen: Precision | None = None
        found = f"matrix products in bfloat16 run at {of_products:.2f}x the speed"
        if not slower_anywhere(of_products):
            speedup = gradient_speedup(model, x, "bf16")
            found = f"input gradients in bfloat16 run at {speedup:.2f}x the speed"
            chosen = None if slower_anywhere(speedup) else "bf16"
        if ranks.is_main:
            what = "the model's own precision" if chosen is None else chosen
            logger.info("dat.attack.precision='auto': %s; taking %s.", found, what)
        return chosen


def _tell_what_is_experimental(
    precision: str | None, graphs: AttackGraphs | None, ranks: Ranks
) -> None:
    """Say what of that which is switched on no GPU has run."""
    switched_on = {
        "dat.attack.precision='fp8'": precision == "fp8",
        "dat.engine.cuda_graphs=true": graphs is not None,
    }
    for setting, is_on in switched_on.items():
        if is_on and ranks.is_main:
            logger.warning("experimental: %s has not run on a GPU yet.", setting)


def _warn_of_slow_products(precision: Precision, ranks: Ranks) -> None:
    if not ranks.is_main or ranks.device.type != "cpu" or precision in FORMATS:
        return
    if (speedup := product_speedup(ranks.device, precision)) < 1:
        logger.warning(
            "dat.attack.precision=%r is slow here: matrix products run at %.2fx the speed of "
            "float32's. Remove it, or write 'auto'.",
            precision,
            speedup,
        )
