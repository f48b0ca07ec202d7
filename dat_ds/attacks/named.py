"""Names of evaluation attacks: ``pgd-20``, ``pgd-50-10``, ``apgd-dlr-100``, ``square-5000``."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from torch import Tensor

from dat_ds.attacks.apgd import apgd
from dat_ds.attacks.attack import Attack
from dat_ds.attacks.build import ATTACKS
from dat_ds.attacks.fab import fab
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import InnerLoss
from dat_ds.attacks.noise import SampleGenerator
from dat_ds.attacks.pgd import pgd
from dat_ds.attacks.square import square
from dat_ds.attacks.strong import apgd_square, malt, probability_margin
from dat_ds.attacks.threat import Norm, ThreatModel
from dat_ds.length import Length


@dataclass(frozen=True)
class _Method:
    """A method of evaluation: APGD on a loss, or a function of its own.

    Args:
        loss: Loss of APGD; None for the others.
        num_targets: Likeliest wrong classes that each get a run; 0 where it is untargeted.
        needed_classes: Fewest classes that it is defined for.
        only_norm: The norm that it is defined for, where it is one alone.
    """

    loss: str | InnerLoss | None = None
    num_targets: int = 0
    needed_classes: int = 2
    only_norm: Norm | None = None


_METHODS = {
    "pgd": _Method(),
    "apgd-ce": _Method("ce"),
    "apgd-dlr": _Method("dlr", needed_classes=3),
    "apgd-t": _Method("dlr-targeted", num_targets=9, needed_classes=4),
    "apgd-ce-l1": _Method("ce", only_norm="l1"),
    "apgd-t-l1": _Method("dlr-targeted", num_targets=5, needed_classes=4, only_norm="l1"),
    "fab": _Method(),
    "fab-t": _Method(num_targets=9),
    "square": _Method(),
    "apgd-cw": _Method("cw"),
    "apgd-pm": _Method(probability_margin),
    "malt": _Method(num_targets=9),
    "apgd-square": _Method(),
    "own": _Method(),
}
METHODS = tuple(name for name in _METHODS if name != "own")
RANDOM_SEARCH = ("square", "apgd-square")
"""Methods whose last steps take no gradient."""
_PATTERN = re.compile(rf"({'|'.join(METHODS)})-([1-9]\d*)(?:-([1-9]\d*))?")


@dataclass(frozen=True)
class EvaluationAttack:
    """An attack for evaluation, of the built-in ones from a random start but for FAB.

    Args:
        name: As written in the config and the record.
        method: ``"pgd"`` with step size ``2.5 eps / steps`` (Madry et al. 2018, sec. 4); APGD on
            cross-entropy (``"apgd-ce"``), on the DLR loss (``"apgd-dlr"``), or on the targeted DLR
            loss over the 9 likeliest wrong classes (``"apgd-t"``; Croce and Hein 2020, sec. 4);
            ``"apgd-ce-l1"`` and ``"apgd-t-l1"``, the latter over 5 classes, in a shrinking l1 ball
            (Croce and Hein 2021); on the margin of the logits (``"apgd-cw"``) or of the
            probabilities (``"apgd-pm"``, :func:`dat_ds.attacks.strong.probability_margin`);
            ``"malt"``, APGD towards the 9 nearest wrong classes
            (:func:`dat_ds.attacks.strong.malt`); ``"fab"``, or ``"fab-t"`` over the 9 likeliest
            wrong classes; ``"square"``; ``"apgd-square"``, Square from where 20 steps of APGD lead
            (:func:`dat_ds.attacks.strong.apgd_square`); ``"own"``.
        steps: Gradient steps of each run; queries of Square.
        restarts: Independent runs; the worst is kept.
        own: A class of the user's own, with its defaults, in the place of a method.
    """

    name: str
    method: str
    steps: int
    restarts: int
    own: Attack | None = None

    def step_size(self, eps: float) -> float:
        """Step length of PGD in pixel units for a ball of radius ``eps``."""
        return 2.5 * eps / self.steps

    @property
    def loss(self) -> str | InnerLoss | None:
        """The loss of APGD; None for other attacks."""
        return _METHODS[self.method].loss

    @property
    def num_targets(self) -> int:
        """Likeliest wrong classes that each get a run; 0 where it is untargeted."""
        return _METHODS[self.method].num_targets

    @property
    def needed_classes(self) -> int:
        """Fewest classes that the attack is defined for."""
        return _METHODS[self.method].needed_classes

    def problem_with_classes(self, num_classes: int) -> str | None:
        """Why the attack is not defined for so few classes; None where it is."""
        if num_classes >= self.needed_classes:
            return None
        return (
            f"{self.name!r} compares the {self.needed_classes} largest logits, and there are "
            f"{num_classes} classes: write 'apgd-ce-{self.steps}'."
        )

    @property
    def in_shrinking_ball(self) -> bool:
        """Whether APGD begins in larger l1 balls."""
        return _METHODS[self.method].only_norm == "l1"

    def problem_with(self, norm: str) -> str | None:
        """Why the attack is not defined for a norm; None where it is."""
        if self.own is not None:
            return next((f"{self.name!r}: {p}" for p in self.own.norm_problems(norm)), None)
        only = _METHODS[self.method].only_norm
        if only is None or only == norm:
            return None
        general = self.name.replace(f"-{only}", "", 1)
        return f"{self.name!r} is for the norm {only}, not {norm}: write {general!r}."


def parse_evaluation_attack(name: str) -> EvaluationAttack:
    """Read ``METHOD-STEPS``, ``METHOD-STEPS-RESTARTS``, or ``MODULE:CLASS`` of an own attack.

    Raises:
        ValueError: For anything else, and for a module that was not imported
            (:func:`dat_ds.import_methods`).
    """
    if ":" in name:
        problems: list[str] = []
        found = ATTACKS.find(name, "", problems)
        if found is None:
            raise ValueError(problems[0].removeprefix(".name="))
        own = found()
        return EvaluationAttack(name, "own", getattr(own, "steps", 1), 1, own)
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

    Raises:
        ConfigError: For an attack of the user's own that leaves the ball.
    """
    if attack.own is not None:
        own = attack.own.resolved(Length(threat.eps), "ce")
        return dataclasses.replace(own, threat=threat, inner_loss=loss)(model, x, y, generator)
    if attack.loss is not None:
        return apgd(
            model,
            x,
            y,
            threat=threat,
            steps=attack.steps,
            loss=attack.loss,
            restarts=attack.restarts,
            num_targets=max(attack.num_targets, 1),
            shrinking_ball=attack.in_shrinking_ball,
            generator=generator,
        )
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
            targets=attack.num_targets or None,
            generator=generator,
        )
    if attack.method in RANDOM_SEARCH:
        search = square if attack.method == "square" else apgd_square
        return search(
            model,
            x,
            y,
            threat=threat,
            queries=attack.steps,
            restarts=attack.restarts,
            generator=generator,
        )
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
