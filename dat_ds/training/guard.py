"""A guard against catastrophic overfitting of single-step adversarial training.

Wong et al., ICLR 2020, arXiv 2001.03994, sec. 5.1: within a few hundred steps, accuracy under the
single-step training attack rises towards 100 % while accuracy under a multi-step attack falls to 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from dat_ds.attacks import Attack, build_attack
from dat_ds.engine.adversarial import AdversarialEngine


@dataclass(frozen=True)
class GuardReading:
    """One look of the guard, over all ranks.

    Attributes:
        attack_acc: Accuracy under the training attack, a fraction.
        probe_acc: Accuracy under the multi-step probe on the same images, a fraction.
        fired: Whether they differ by more than the guard allows.
    """

    attack_acc: float
    probe_acc: float
    fired: bool


class Guard:
    """Compares the training attack with a multi-step probe, on images of the current batch.

    Args:
        engine: Engine in training; it is left as it was.
        probe_steps: PGD steps of the probe, of ``2.5 eps / steps`` each.
        num_images: Images per rank.
        largest_gap: Largest allowed excess of accuracy under the training attack.
    """

    def __init__(
        self, engine: AdversarialEngine, *, probe_steps: int, num_images: int, largest_gap: float
    ) -> None:
        self._engine = engine
        self._num_images = num_images
        self._largest_gap = largest_gap
        self._probe = multi_step(engine, probe_steps, 2.5 / probe_steps)

    def look(self, x: Tensor, y: Tensor) -> GuardReading:
        """Attack images ``x`` ``(B, C, H, W)`` both ways; a collective, with one host sync."""
        engine = self._engine
        if not y.is_floating_point():
            x, y = x[y >= 0], y[y >= 0]  # accuracy needs the true class
        x, y = x[: self._num_images], y[: self._num_images]
        training = engine.attack_in_use
        assert training is not None
        attack_acc = engine.accuracy_under(training, x, y)
        probe_acc = engine.accuracy_under(self._probe, x, y)
        return GuardReading(attack_acc, probe_acc, attack_acc - probe_acc > self._largest_gap)


def stronger_attack(engine: AdversarialEngine) -> Attack:
    """What the guard has the engine train with, once it has fired."""
    steps = engine.run.dat.guard.stronger_steps
    training = engine.attack_in_use
    assert training is not None
    # What makes passes cheaper stays; what makes the attack weaker goes.
    return dataclasses.replace(
        multi_step(engine, steps, 2.5 / steps), fold_batch_norm=training.fold_batch_norm
    )


def multi_step(engine: AdversarialEngine, steps: int, step_share: float) -> Attack:
    """PGD within the run's threat model, with steps of ``step_share * eps``."""
    threat = engine.run.dat.threat_model
    return build_attack(
        {
            "name": "pgd",
            "steps": steps,
            "step_size": step_share * threat.eps,
            "threat_model": dataclasses.asdict(threat),
        }
    )
