"""Ensembles of evaluation attacks, taken apart into stages that see only samples still standing.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dat_ds.attacks.fab import fab
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import MIN_CLASSES, targeted_dlr, targeted_margin
from dat_ds.attacks.named import (
    FAB_TARGETS,
    NUM_TARGETS,
    EvaluationAttack,
    parse_evaluation_attack,
    run_apgd,
    run_attack,
)
from dat_ds.attacks.noise import SampleGenerator
from dat_ds.attacks.strong import MALT_GROUPS, STRONG, malt
from dat_ds.attacks.targets import likeliest_wrong
from dat_ds.attacks.threat import ThreatModel

RunStage = Callable[[Model, Tensor, Tensor, SampleGenerator], Tensor]
"""``(model, x, y, generator) -> x_adv``: what becomes of a sample does not depend on the others."""


@dataclass(frozen=True)
class Stage:
    """One pass of an ensemble over the samples that no stage before has broken.

    Args:
        attack: Name of the attack that it belongs to: ``"apgd-t-100"``.
        label: Its own name within the ensemble: ``"apgd-t-100 target 3"``.
        run: Makes adversarial images, inside the threat model.
        is_black_box: Whether it takes no gradient.
    """

    attack: str
    label: str
    run: RunStage
    is_black_box: bool = False


ENSEMBLES: dict[str, Callable[[ThreatModel], tuple[str, ...]]] = {
    "standard": lambda threat: (
        "apgd-ce-100-5" if threat.norm == "l1" else "apgd-ce-100",
        "apgd-t-100",
        "fab-t-100",
        "square-5000",
    ),
    "strong": lambda threat: STRONG,
}
"""Names of the attacks of each ensemble, in order."""


def attack_names(names: Sequence[str], threat: ThreatModel) -> list[str]:
    """Names of attacks with those of ensembles written out.

    Raises:
        ValueError: For a name that is neither, or that comes twice.
    """
    written = [
        n for name in names for n in (ENSEMBLES[name](threat) if name in ENSEMBLES else (name,))
    ]
    for name in written:
        parse_evaluation_attack(name)
    if len(set(written)) < len(written):
        raise ValueError(f"attacks={list(names)} names an attack twice.")
    return written


def stages_of(attack: EvaluationAttack, threat: ThreatModel, num_classes: int) -> list[Stage]:
    """The stages of an attack: one for each restart and, where it is targeted, each target.

    ``apgd-t`` on 2 or 3 classes, for which its loss is not defined, takes the margin to the target.

    Args:
        attack: The attack.
        threat: Allowed perturbations.
        num_classes: Classes of the model ``K``.
    """
    if attack.method == "malt":
        groups = ((first, last) for first, last in MALT_GROUPS if first < num_classes)
        return [
            _malt_stage(attack, threat, first, min(last, num_classes - 1)) for first, last in groups
        ]
    counts = {"apgd-t": NUM_TARGETS[threat.norm], "fab-t": FAB_TARGETS}
    single = dataclasses.replace(attack, restarts=1)
    stages = []
    for run in range(1, attack.restarts + 1):
        name = attack.name if attack.restarts == 1 else f"{attack.name} run {run}"
        if attack.method not in counts:
            stages.append(_plain_stage(name, attack, single, threat, run))
            continue
        for rank in range(1, min(counts[attack.method], num_classes - 1) + 1):
            stages.append(_targeted_stage(f"{name} target {rank}", single, threat, rank, run))
    return [dataclasses.replace(stage, attack=attack.name) for stage in stages]


def _plain_stage(
    label: str, attack: EvaluationAttack, single: EvaluationAttack, threat: ThreatModel, run: int
) -> Stage:
    """One run of an attack without targets."""

    def make(model: Model, x: Tensor, y: Tensor, generator: SampleGenerator) -> Tensor:
        if attack.method == "fab" and run > 1:
            return fab(
                model,
                x,
                y,
                threat=threat,
                steps=attack.steps,
                random_start=True,
                generator=generator,
            )
        return run_attack(model, x, y, threat, single, generator)

    return Stage(attack.name, label, make, is_black_box=attack.method == "square")


def _targeted_stage(
    label: str, single: EvaluationAttack, threat: ThreatModel, rank: int, run: int
) -> Stage:
    """One run towards the wrong class of this rank, from 1, by the logits of each image."""

    def make(model: Model, x: Tensor, y: Tensor, generator: SampleGenerator) -> Tensor:
        target = likeliest_wrong(model, x, y, rank)[:, rank - 1]
        if single.method == "fab-t":
            return fab(
                model,
                x,
                y,
                threat=threat,
                steps=single.steps,
                targets=target,
                random_start=run > 1,
                generator=generator,
            )

        def loss(logits: Tensor, classes: Tensor) -> Tensor:
            # With fewer than 4 classes the ratio of differences of logits is not defined.
            is_defined = logits.shape[1] >= MIN_CLASSES["dlr-targeted"]
            return (targeted_dlr if is_defined else targeted_margin)(logits, classes, target)

        return run_apgd(model, x, y, threat, single, generator, loss)

    return Stage(single.name, label, make)


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
