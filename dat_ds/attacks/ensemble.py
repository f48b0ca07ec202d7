"""Ensembles of evaluation attacks, taken apart into stages that see only samples still standing.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dat_ds.attacks.apgd import apgd
from dat_ds.attacks.fab import fab
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import InnerLoss, targeted_dlr, targeted_margin, towards
from dat_ds.attacks.named import EvaluationAttack, parse_evaluation_attack, run_attack
from dat_ds.attacks.noise import SampleGenerator
from dat_ds.attacks.strong import MALT_GROUPS, STRONG, STRONG_L1, malt
from dat_ds.attacks.targets import likeliest_wrong
from dat_ds.attacks.threat import ThreatModel

RunStage = Callable[[Model, Tensor, Tensor, SampleGenerator], Tensor]
"""``(model, x, y, generator) -> x_adv``: what becomes of a sample does not depend on the others,
and the generator is the stage's own."""


@dataclass(frozen=True)
class Stage:
    """One pass of an ensemble over the samples that no stage before has broken.

    Args:
        attack: Name of the attack that it belongs to: ``"apgd-t-100"``.
        label: Its own name within the ensemble: ``"apgd-t-100 target 3"``.
        run: Makes adversarial images, inside the threat model.
    """

    attack: str
    label: str
    run: RunStage


def _standard(threat: ThreatModel) -> tuple[str, ...]:
    """The budgets of AutoAttack's standard version."""
    if threat.norm == "l1":
        return "apgd-ce-l1-100-5", "apgd-t-l1-100", "fab-t-100", "square-5000"
    return "apgd-ce-100", "apgd-t-100", "fab-t-100", "square-5000"


ENSEMBLES: dict[str, Callable[[ThreatModel], tuple[str, ...]]] = {
    "standard": _standard,
    "strong": lambda threat: STRONG_L1 if threat.norm == "l1" else STRONG,
}
"""Names of the attacks of each ensemble, in order."""


def attack_names(names: Sequence[str], threat: ThreatModel) -> list[str]:
    """Names of attacks with those of ensembles written out.

    Raises:
        ValueError: For a name that is neither, that comes twice, or that is for another norm.
    """
    written = [
        n for name in names for n in (ENSEMBLES[name](threat) if name in ENSEMBLES else (name,))
    ]
    problems = (parse_evaluation_attack(name).problem_with(threat.norm) for name in written)
    found = [problem for problem in problems if problem is not None]
    if len(set(written)) < len(written):
        found.append(f"attacks={list(names)} names an attack twice.")
    if found:
        raise ValueError("\n".join(found))
    return written


def stages_of(attack: EvaluationAttack, threat: ThreatModel, num_classes: int) -> list[Stage]:
    """The stages of an attack: one for each restart and, where it is targeted, each target.

    The target of a stage is the class of its rank among each sample's wrong classes, likeliest
    first, which takes a forward. There are at most ``num_classes - 1`` of them. With fewer than 4
    classes, for which the targeted DLR loss is not defined, targeted APGD maximises its numerator,
    the margin ``z_t - z_y``; AutoAttack itself refuses such models.

    Args:
        attack: The attack.
        threat: Allowed perturbations.
        num_classes: Classes of the model ``K``, at least 2.
    """
    if attack.method == "malt":
        groups = ((first, last) for first, last in MALT_GROUPS if first < num_classes)
        return [
            _malt_stage(attack, threat, first, min(last, num_classes - 1)) for first, last in groups
        ]
    ranks = range(min(attack.num_targets, num_classes - 1)) if attack.num_targets else [None]
    stages = []
    for rank in ranks:
        for restart in range(attack.restarts):
            parts = [attack.name]
            if rank is not None:
                parts.append(f"target {rank + 1}")
            if attack.restarts > 1:
                parts.append(f"restart {restart + 1}")
            run = _Run(attack, threat, rank, restart, num_classes)
            stages.append(Stage(attack.name, " ".join(parts), run))
    return stages


@dataclass(frozen=True)
class _Run:
    """One restart of an attack, towards one target where it has any.

    Args:
        attack: The attack.
        threat: Allowed perturbations.
        rank: The target's among the wrong classes, from 0; None where it is untargeted.
        restart: Number of the restart, from 0.
        num_classes: Classes of the model.
    """

    attack: EvaluationAttack
    threat: ThreatModel
    rank: int | None
    restart: int
    num_classes: int

    def __call__(self, model: Model, x: Tensor, y: Tensor, generator: SampleGenerator) -> Tensor:
        """Adversarial images of the stage."""
        target = None
        if self.rank is not None:
            target = likeliest_wrong(model, x, y, self.rank + 1)[:, self.rank]
        if self.attack.method in ("fab", "fab-t"):
            return fab(
                model,
                x,
                y,
                threat=self.threat,
                steps=self.attack.steps,
                targets=target,
                random_start=self.restart > 0,
                generator=generator,
            )
        if target is None:
            once = dataclasses.replace(self.attack, restarts=1)
            return run_attack(model, x, y, self.threat, once, generator)
        return apgd(
            model,
            x,
            y,
            threat=self.threat,
            steps=self.attack.steps,
            loss=self._loss_towards(target),
            shrinking_ball=self.attack.in_shrinking_ball,
            generator=generator,
        )

    def _loss_towards(self, target: Tensor) -> InnerLoss:
        is_defined = self.num_classes >= self.attack.needed_classes
        loss = targeted_dlr if is_defined else targeted_margin
        return towards(loss, target)


def _malt_stage(attack: EvaluationAttack, threat: ThreatModel, first: int, last: int) -> Stage:
    """The attack on its target classes from ``first`` to ``last``, counted from 1."""

    def run(model: Model, x: Tensor, y: Tensor, generator: SampleGenerator) -> Tensor:
        return malt(
            model,
            x,
            y,
            threat=threat,
            steps=attack.steps,
            first_target=first - 1,
            num_targets=last - first + 1,
            restarts=attack.restarts,
            generator=generator,
        )

    places = f"target {first}" if first == last else f"targets {first} to {last}"
    return Stage(attack.name, f"{attack.name} {places}", run)
