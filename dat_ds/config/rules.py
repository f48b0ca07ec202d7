"""Rules for combinations in a run, by traits, and defaults that depend on other sections."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dat_ds.attacks import (
    FEATURE_LOSSES,
    MIN_CLASSES,
    Attack,
    EvaluationAttack,
    NoAttack,
    parse_evaluation_attack,
)
from dat_ds.config.deepspeed.precision import FLOAT16, enabled, precision_of
from dat_ds.config.schema import DatConfig, GuardConfig, WeightPerturbationConfig
from dat_ds.method import Method, Rule, Section, Trait, broken
from dat_ds.objectives import OBJECTIVES, Objective

_MANY_IN_TRAINING, _MANY_IN_EVALUATION = 500, 10_000
"""Passes above those of every published method, AutoAttack's 5000 queries included."""
_LABEL = (
    "Write dat.data.pseudo_labels='runs/natural' (a model that labels them), or what needs no "
    "label (dat.objective.name='trades' with dat.attack.name='pgd'), or leave them out "
    "(dat.data.drop_unlabelled=true)."
)
_PGD = "Write dat.attack.name='pgd'."
_TRUE_CLASS = "Write dat.attack.loss='ce' or dat.objective.name='trades', or remove the mixing."
RULES = (
    Rule(
        Trait.LOOKS_AT_CLASSES,
        Trait.KNOWS_NO_CLASSES,
        "Write dat.attack.name='pgd' without restarts (or dat.attack.combine='average'); for "
        "evaluation 'pgd-20'.",
    ),
    Rule(Trait.LOSS_OF_CLASSES, Trait.KNOWS_NO_CLASSES),
    Rule(Trait.COMPARES_ACCURACIES, Trait.KNOWS_NO_CLASSES),
    Rule(Trait.SUPPORTS_CLASSES, Trait.LEARNS_NO_CLASSES, "Remove it."),
    Rule(Trait.CONCERNS_LABELS, Trait.LEARNS_NO_CLASSES, "Remove it."),
    Rule(
        Trait.CONCERNS_UNLABELLED,
        Trait.HAS_NO_UNLABELLED,
        "Write dat.data.labelled_fraction or dat.data.unlabelled_path, or remove it.",
    ),
    Rule(Trait.NEEDS_LABELS, Trait.LACKS_LABELS, _LABEL),
    Rule(Trait.NEEDS_TRUE_CLASS, Trait.MIXES_LABELS, _TRUE_CLASS),
    Rule(
        Trait.FLAT_AT_THE_IMAGE,
        Trait.STARTS_AT_THE_IMAGE,
        "Write dat.attack.random_start=true or dat.attack.name='pgd', or dat.attack.loss='ce'.",
    ),
    Rule(
        Trait.NEEDS_ADVERSARIAL,
        Trait.MAKES_NO_IMAGES,
        "Write dat.objective.name='at', dat.weight_perturbation.name='sam', or an attack.",
    ),
    Rule(Trait.COMPARES_WITH_STRONGER, Trait.HAS_NO_STRONGER, "Remove dat.guard."),
    Rule(Trait.COPIES_IMAGES, Trait.COMPARES_SAMPLES, _PGD),
    Rule(Trait.CARRIES_PERTURBATIONS, Trait.SHOWS_OTHER_VIEWS, _PGD),
    Rule(Trait.CARRIES_PERTURBATIONS, Trait.CHANGES_SIZES, _PGD),
    Rule(
        Trait.TAKES_GRADIENTS_APART,
        Trait.REFUSES_PLAIN_GRADIENTS,
        "Write dat.model.activation_checkpointing='non_reentrant'.",
    ),
    Rule(
        Trait.DROPS_GRADIENTS,
        Trait.FREEZES,
        "Write dat.model.activation_checkpointing='non_reentrant'.",
    ),
    Rule(Trait.NEEDS_GRADIENT_LENGTHS, Trait.UNDERFLOWS, "Write bf16 or torch_autocast."),
    Rule(Trait.COMPILES, Trait.CHANGES_THE_MODEL),
    Rule(Trait.COMPILES_THE_UPDATE, Trait.SPLITS_BATCH_NORM),
    Rule(Trait.FOLDS_WEIGHTS, Trait.GATHERS_PARAMETERS),
    Rule(Trait.OWN_PRECISION, Trait.SHORT_MODEL),
    Rule(Trait.RECORDS_THE_ATTACK, Trait.GATHERS_PARAMETERS),
    Rule(Trait.RECORDS_THE_ATTACK, Trait.GOES_BY_THE_BATCH),
    Rule(Trait.RECORDS_THE_ATTACK, Trait.ASKS_THE_HOST),
    Rule(Trait.RECORDS_THE_ATTACK, Trait.SAVES_RANDOM_STATES),
    Rule(Trait.GROUPS_MICRO_BATCHES, Trait.CARRIES_PERTURBATIONS),
    Rule(Trait.NEEDS_START, Trait.TELLS_NO_START, "Choose an attack that goes with it."),
    Rule(Trait.GROUPS_MICRO_BATCHES, Trait.GOES_BY_THE_BATCH),
    Rule(Trait.GROUPS_MICRO_BATCHES, Trait.COMPARES_SAMPLES),
)
"""Pairs of traits that do not go together; methods bring traits, and are never named here."""


def facts_of(dat: DatConfig) -> Iterator[tuple[Trait, str]]:
    """Traits of a resolved section, with the keys that bring them."""
    for key in dat.known_keys():
        part = getattr(dat, key)
        if isinstance(part, Section):
            yield from part.facts(f"dat.{key}")
    data = dat.data
    if not data.has_unlabelled:
        yield Trait.HAS_NO_UNLABELLED, "dat.data.labelled_fraction=1"
    elif data.pseudo_labels is None and dat.objective.head == "classes":
        yield (
            Trait.LACKS_LABELS,
            f"dat.data.unlabelled_path={data.unlabelled_path!r}"
            if data.unlabelled_path is not None
            else f"dat.data.labelled_fraction={data.labelled_fraction:g}",
        )


def facts_of_deepspeed(config: Mapping[str, Any]) -> Iterator[tuple[Trait, str]]:
    """Traits of DeepSpeed's part, with the keys that bring them."""
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("stage") == 3:
        yield Trait.GATHERS_PARAMETERS, "zero_optimization.stage=3"
    precision = precision_of(config)
    if precision in ("bf16", "fp16"):
        yield Trait.SHORT_MODEL, f"{precision}.enabled"
    if precision == "fp16":
        yield Trait.UNDERFLOWS, "fp16.enabled"
        yield Trait.ASKS_THE_HOST, "fp16.enabled"
    if enabled(config, "torch_autocast") and config["torch_autocast"].get("dtype") in FLOAT16:
        yield Trait.ASKS_THE_HOST, "torch_autocast.dtype='float16'"


def check_run(
    dat: DatConfig,
    config: Mapping[str, Any],
    problems: list[str],
    *,
    attack: Attack | None = None,
    objective: Objective | None = None,
    accumulation: object = None,
) -> None:
    """Refuse what does not go together.

    Args:
        dat: Our section, resolved.
        config: DeepSpeed's part; may be empty.
        problems: Receives one message per problem that is not there yet.
        attack: An attack in the place of the section's.
        objective: An objective in the place of the section's.
        accumulation: Micro-steps per optimizer step; anything but an integer is not known yet.
    """
    if attack is not None or objective is not None:
        dat = dataclasses.replace(
            dat, attack=attack or dat.attack, objective=objective or dat.objective
        )
    found = list(broken(RULES, [*facts_of(dat), *facts_of_deepspeed(config)]))
    size = dat.engine.attack_micro_batches
    has_attack = not isinstance(dat.attack, NoAttack)
    if has_attack and isinstance(accumulation, int) and accumulation % size:
        valid = [str(n) for n in range(1, accumulation + 1) if accumulation % n == 0]
        found.append(
            f"dat.engine.attack_micro_batches={size} does not divide "
            f"gradient_accumulation_steps={accumulation}: write {', '.join(valid)}, or accumulate "
            "over another number of micro-batches."
        )
    misfits = (attack.problem_with(dat.threat_model.norm) for attack in _evaluation_attacks(dat))
    found += [f"dat.evaluation: {misfit}" for misfit in misfits if misfit is not None]
    problems += [problem for problem in found if problem not in problems]


def resolve_dat(dat: DatConfig, problems: list[str]) -> DatConfig:
    """Fill in the defaults that depend on other sections, and check the rules between them.

    Args:
        dat: The parsed section.
        problems: Receives one message per problem found.

    Returns:
        The section with every such default written out.
    """
    attack = dat.attack.resolved(dat.threat_model.eps, dat.objective.default_attack_loss)
    problems += [f"dat.attack.{problem}" for problem in attack.norm_problems(dat.threat_model.norm)]
    objective = dat.objective.resolved(not isinstance(attack, NoAttack))
    problems += [
        f"dat.{section}.{key} is missing: {method.name!r} needs {what}."
        for section in dat.known_keys()
        if isinstance(method := getattr(dat, section), Method)
        for key, what in method.required.items()
        if getattr(method, key) is None
    ]
    resolved = dataclasses.replace(
        dat,
        attack=attack,
        objective=objective,
        weight_perturbation=_resolved_weight_perturbation(dat.weight_perturbation),
        guard=_resolved_guard(dat.guard, attack, objective),
        compression=dat.compression.resolved(),
    )
    loss = getattr(attack, "loss", None)
    if loss in FEATURE_LOSSES and loss != objective.default_attack_loss:
        owners = [n for n, other in OBJECTIVES.items() if other.default_attack_loss == loss]
        problems.append(
            f"dat.attack.loss={loss!r} belongs to dat.objective.name={owners[0]!r}, not "
            f"{objective.name!r}: remove it."
        )
    elif (
        loss in FEATURE_LOSSES
        and loss not in attack.losses
        and Trait.LOOKS_AT_CLASSES not in attack.traits  # a rule refuses those
    ):
        problems.append(
            f"dat.objective.name={objective.name!r} has its attack maximise {loss!r}, which "
            f"dat.attack.name={attack.name!r} does not. Write dat.attack.name='pgd'."
        )
    check_run(resolved, {}, problems)
    num_classes = dat.model.num_classes or dat.data.num_classes
    if num_classes is not None and objective.head == "classes":
        check_num_classes(resolved, num_classes, problems)
    return resolved


def _resolved_weight_perturbation(
    perturbation: WeightPerturbationConfig,
) -> WeightPerturbationConfig:
    if perturbation.name == "none" or perturbation.radius is not None:
        return perturbation
    return dataclasses.replace(perturbation, radius=0.005 if perturbation.name == "awp" else 0.05)


def _resolved_guard(guard: GuardConfig, attack: Attack, objective: Objective) -> GuardConfig:
    if guard.action is not None:
        return guard
    has_probe = Trait.HAS_NO_STRONGER not in attack.traits and objective.classifies
    fires = has_probe and attack.is_single_step
    return dataclasses.replace(guard, action="rollback" if fires else "none")


def cost_notes(dat: DatConfig) -> tuple[str, ...]:
    """Notes on attacks of so many passes that a run may seem to hang, to be logged once.

    Args:
        dat: A resolved section.
    """
    counts = {
        "dat.attack": (getattr(dat.attack, "steps", 1), getattr(dat.attack, "restarts", 1)),
        **{
            f"dat.evaluation: {attack.name!r}": (attack.steps, attack.restarts)
            for attack in _evaluation_attacks(dat)
        },
    }
    if dat.guard.action != "none":
        counts["dat.guard"] = (dat.guard.probe_steps, 1)
    return tuple(
        f"{key}: {steps} steps x {restarts} restarts are {steps * restarts} passes of the model "
        "for every batch"
        for key, (steps, restarts) in counts.items()
        if steps * restarts
        > (_MANY_IN_EVALUATION if key.startswith("dat.evaluation") else _MANY_IN_TRAINING)
    )


def step_notes(dat: DatConfig) -> tuple[str, ...]:
    """Notes on steps that do not suit the ball, as when ``eps`` alone was changed.

    Args:
        dat: A resolved section.
    """
    attack, eps = dat.attack, dat.threat_model.eps
    size, steps = getattr(attack, "step_size", None), getattr(attack, "steps", 1)
    if size is None or not eps:
        return ()
    at = f"dat.attack.step_size={size}"
    if steps * size < eps * (1 - 1e-9):
        ends, least = ("it does", "eps") if steps == 1 else (f"{steps} steps do", f"eps/{steps}")
        return (f"{at}: {ends} not reach the end of the ball of radius {eps}; write '{least}'",)
    if steps > 1 and size > eps:
        return (f"{at} is longer than the radius {eps} of the ball; a usual size is 'eps/4'",)
    return ()


def check_num_classes(dat: DatConfig, num_classes: int, problems: list[str]) -> None:
    """Refuse losses that need more classes than there are.

    Args:
        dat: A resolved section.
        num_classes: Classes of the model.
        problems: Receives one message per problem found.
    """
    loss = getattr(dat.attack, "loss", None)
    needed = MIN_CLASSES.get(loss or "", 0)
    if num_classes < needed:
        problems.append(
            f"dat.attack.loss={loss!r} compares the {needed} largest logits, but there are "
            f"{num_classes} classes: write dat.attack.loss='ce' or 'cw'."
        )
    found = (attack.problem_with_classes(num_classes) for attack in _evaluation_attacks(dat))
    problems += [f"dat.evaluation: {problem}" for problem in found if problem is not None]


def _evaluation_attacks(dat: DatConfig) -> Iterator[EvaluationAttack]:
    """The attacks of evaluation; names of none are reported elsewhere."""
    for name in (*dat.evaluation.attacks, dat.evaluation.validation_attack):
        with contextlib.suppress(ValueError):
            yield parse_evaluation_attack(name)
