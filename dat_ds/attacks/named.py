"""Names of evaluation attacks: ``pgd-20``, ``pgd-50-10``, ``apgd-dlr-100``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from dat_ds.attacks.apgd import apgd
from dat_ds.attacks.fab import fab
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import InnerLoss
from dat_ds.attacks.noise import SampleGenerator
from dat_ds.attacks.pgd import pgd
from dat_ds.attacks.square import square
from dat_ds.attacks.strong import malt, probability_margin
from dat_ds.attacks.threat import ThreatModel

Method = Literal[
    "pgd",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "apgd-cw",
    "apgd-pm",
    "malt",
    "fab",
    "fab-t",
    "square",
]
METHODS: tuple[str, ...] = get_args(Method)
_PATTERN = re.compile(rf"({'|'.join(METHODS)})-([1-9]\d*)(?:-([1-9]\d*))?")
_APGD_LOSSES: dict[str, str | InnerLoss] = {
    "apgd-ce": "ce",
    "apgd-dlr": "dlr",
    "apgd-t": "dlr-targeted",
    "apgd-cw": "cw",
    "apgd-pm": probability_margin,
}
_NEEDED_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
_OF_AUTOATTACK = ("apgd-ce", "apgd-dlr", "apgd-t")
NUM_TARGETS = {"linf": 9, "l2": 9, "l1": 5}
"""Wrong classes that ``apgd-t`` tries, as in AutoAttack's standard version."""
FAB_TARGETS = 9


@dataclass(frozen=True)
class EvaluationAttack:
    """An attack for evaluation, from a random start.

    Args:
        name: As written in the config and the record.
        method: ``"pgd"`` with step size ``2.5 eps / steps`` (Madry et al. 2018, sec. 4), or APGD on
            cross-entropy, on the DLR loss, on the targeted DLR loss over the 9 likeliest wrong
            classes (Croce and Hein 2020, sec. 4), on the margin of the logits or on that of the
            probabilities (:func:`dat_ds.attacks.strong.probability_margin`), which have no step
            size to set; ``"malt"``, APGD towards the 9 nearest wrong classes
            (:func:`dat_ds.attacks.strong.malt`); ``"fab"`` and ``"fab-t"``, to the nearest boundary
            or to those of the 9 likeliest wrong classes; or ``"square"``, random search. In l1,
            ``apgd-ce``, ``apgd-dlr`` and ``apgd-t`` begin in larger balls, and ``apgd-t`` tries 5
            classes (Croce and Hein 2021).
        steps: Gradient steps of each run; queries of a random search.
        restarts: Random restarts; the worst is kept.
    """

    name: str
    method: str
    steps: int
    restarts: int

    def step_size(self, eps: float) -> float:
        """Step length of PGD in pixel units for a ball of radius ``eps``."""
        return 2.5 * eps / self.steps

    @property
    def needed_classes(self) -> int:
        """Fewest classes that the attack's loss is defined for."""
        return _NEEDED_CLASSES.get(self.method, 2)


def parse_evaluation_attack(name: str) -> EvaluationAttack:
    """Read ``METHOD-STEPS`` or ``METHOD-STEPS-RESTARTS``.

    Raises:
        ValueError: For anything else.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not an evaluation attack: write METHOD-STEPS or METHOD-STEPS-RESTARTS, "
            f"such as 'pgd-20' or 'pgd-50-10'; methods are {', '.join(METHODS)}."
        )
    return EvaluationAttack(name, match[1], int(match[2]), int(match[3] or 1))


def stream_of(attack: EvaluationAttack, seed: int, first_index: int = 0) -> SampleGenerator:
    """Random numbers of an evaluation attack: a function of the seed, its name, and each image.

    Args:
        attack: The attack.
        seed: Of the run.
        first_index: Index of the batch's first image within the data.
    """
    return SampleGenerator(seed, 0, first_index, stream=f"evaluation {attack.name}")


def run_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    attack: EvaluationAttack,
    generator: SampleGenerator,
    loss: InnerLoss | None = None,
) -> Tensor:
    """Adversarial images for ``x`` ``(B, C, H, W)`` by an evaluation attack.

    ``loss`` takes the place of PGD's cross-entropy.
    """
    if attack.method == "malt":
        return malt(
            model,
            x,
            y,
            threat=threat,
            steps=attack.steps,
            restarts=attack.restarts,
            generator=generator,
        )
    if attack.method in ("fab", "fab-t"):
        return fab(
            model,
            x,
            y,
            threat=threat,
            steps=attack.steps,
            restarts=attack.restarts,
            targets=FAB_TARGETS if attack.method == "fab-t" else None,
            generator=generator,
        )
    if attack.method == "square":
        return square(
            model,
            x,
            y,
            threat=threat,
            queries=attack.steps,
            restarts=attack.restarts,
            generator=generator,
        )
    if attack.method != "pgd":
        return run_apgd(model, x, y, threat, attack, generator, _APGD_LOSSES[attack.method])
    return pgd(
        model,
        x,
        y,
        threat=threat,
        steps=attack.steps,
        step_size=attack.step_size(threat.eps),
        loss="ce" if loss is None else loss,
        restarts=attack.restarts,
        generator=generator,
    )


def run_apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    attack: EvaluationAttack,
    generator: SampleGenerator,
    loss: str | InnerLoss,
) -> Tensor:
    """Adversarial images for ``x`` ``(B, C, H, W)`` by an ``apgd-`` attack, on ``loss``."""
    return apgd(
        model,
        x,
        y,
        threat=threat,
        steps=attack.steps,
        loss=loss,
        restarts=attack.restarts,
        num_targets=NUM_TARGETS[threat.norm],
        shrinking_ball=threat.norm == "l1" and attack.method in _OF_AUTOATTACK,
        generator=generator,
    )
