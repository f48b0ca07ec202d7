"""Checks of a finished evaluation from its files alone, as one table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dat_ds.attacks.named import RANDOM_SEARCH, parse_evaluation_attack
from dat_ds.evaluation.checks.data import judge_accuracy, judge_label_order
from dat_ds.evaluation.checks.finding import Check, Finding, Measured, verdict
from dat_ds.length import parse_length

_STEPS = re.compile(r"-([1-9]\d*)")
_FEWEST = 3  # samples that say more than chance
_SEARCH_SHARE = 0.05  # of what gradient attacks left
_FALLING_SHARE = 0.25  # of what an attack on another loss left
_LATE = 0.75  # of a stage's steps
_LATE_SHARE = 0.25  # of what the stage broke: a quarter of steps at a constant rate
_UNMOVED = 1e-3  # of the natural margin
_SLACK = 1e-4


@dataclass(frozen=True)
class Outcome:
    """An evaluation's files.

    Args:
        evaluation: ``evaluation.json``.
        samples: Lines of ``samples.jsonl``.
    """

    evaluation: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]

    @cached_property
    def attacks(self) -> list[Mapping[str, Any]]:
        """Entries of the attacks that had a sample to attack, in order."""
        return [a for a in self.evaluation.get("attacks", []) if a["attacked"]]

    @cached_property
    def by_gradient(self) -> list[Mapping[str, Any]]:
        """Those that follow gradients."""
        return [a for a in self.attacks if follows_gradients(a["name"])]

    @cached_property
    def eps(self) -> float:
        """Radius of the ball."""
        return float(parse_length(self.evaluation["threat_model"]["eps"]))

    @cached_property
    def standing(self) -> list[Mapping[str, Any]]:
        """Samples that withstood every attack."""
        return [sample for sample in self.samples if sample["robust"]]


def is_random_search(attack: str) -> bool:
    """Whether the evaluation attack of this name breaks samples without gradients."""
    return not is_own(attack) and parse_evaluation_attack(attack).method in RANDOM_SEARCH


def is_own(attack: str) -> bool:
    """Whether an evaluation attack is the user's own, of which it is not known what it follows."""
    return ":" in attack


def follows_gradients(attack: str) -> bool:
    """Whether the evaluation attack of this name is known to follow gradients."""
    return not is_own(attack) and not is_random_search(attack)


def measure_random_search(outcome: Outcome) -> Measured:
    """What random search breaks of what gradient attacks left."""
    seen_gradient, worst, found = False, 0.0, ""
    alarm = False
    for attack in outcome.attacks:
        if not is_random_search(attack["name"]):
            seen_gradient |= follows_gradients(attack["name"])
            continue
        share = attack["broken"] / attack["attacked"]
        if seen_gradient and share >= worst:
            worst = share
            alarm = attack["broken"] >= max(_FEWEST, _SEARCH_SHARE * attack["attacked"])
            found = (
                f"{attack['name']} breaks {attack['broken']} of the {attack['attacked']} samples "
                "that gradient attacks left"
            )
    if not found:
        return Measured("skipped", "no random search came after an attack that follows gradients")
    return verdict(alarm, found, worst, fails=worst > 0.5)


def measure_loss_dependence(outcome: Outcome) -> Measured:
    """What a later gradient attack breaks of what the first left."""
    if len(outcome.by_gradient) < 2:
        return Measured("skipped", "fewer than two gradient attacks had a sample to attack")
    worst = max(outcome.by_gradient[1:], key=lambda a: a["broken"] / a["attacked"])
    share = worst["broken"] / worst["attacked"]
    found = (
        f"{worst['name']} breaks {worst['broken']} of the {worst['attacked']} samples left to it"
    )
    alarm = worst["broken"] >= max(_FEWEST, _FALLING_SHARE * worst["attacked"])
    total = sum(a["broken"] for a in outcome.by_gradient)
    return verdict(alarm and worst["broken"] > total / 4, found, share)


def measure_late_breaks(outcome: Outcome) -> Measured:
    """Samples broken in the last quarter of a stage's steps."""
    broken = [s for s in outcome.samples if s["broken_by"] is not None and s["step"] is not None]
    late = total = 0
    for sample in broken:
        steps = _STEPS.search(sample["broken_by"])
        if steps is None or not follows_gradients(sample["broken_by"]):
            continue
        total += 1
        # A run of K steps is K + 1 forwards; restarts follow one another.
        within = (sample["step"] - 1) % (int(steps[1]) + 1) + 1
        late += within > _LATE * int(steps[1])
    if not total:
        return Measured("skipped", "no sample was broken by an attack that counts steps")
    found = f"{late} of {total} broken samples fell in the last quarter of the steps"
    alarm = late >= max(_FEWEST, _LATE_SHARE * total) and late > 0.02 * len(outcome.samples)
    return verdict(alarm, found, late / total)


def measure_verification(outcome: Outcome) -> Measured:
    """Adversarial images that a forward of their own did not confirm."""
    attacked = [sample for sample in outcome.samples if sample["verified"] is not None]
    if not attacked:
        return Measured("skipped", "no sample was reported as broken")
    lost = sum(not sample["verified"] for sample in attacked)
    found = f"{lost} of {len(attacked)} adversarial images are not confirmed when shown again"
    return verdict(lost > 0, found, lost / len(attacked), fails=lost > 0.1 * len(attacked))


def measure_accuracy(outcome: Outcome) -> Measured:
    """Natural accuracy against chance."""
    evaluation = outcome.evaluation
    chance = 1 / max(evaluation["num_classes"], 2)
    return judge_accuracy(evaluation["natural_acc"], evaluation["num_examples"], chance)


def measure_label_order(outcome: Outcome) -> Measured:
    """Whether other classes would fit the labels better."""
    predicted = [sample["predicted"] for sample in outcome.samples]
    labels = [sample["label"] for sample in outcome.samples]
    if not labels:
        return Measured("skipped", "there are no samples")
    return judge_label_order(predicted, labels, outcome.evaluation["num_classes"])


def measure_unmoved_margins(outcome: Outcome) -> Measured:
    """Margins that no attack moved at all."""
    moved = [s for s in outcome.standing if s["margin"] is not None]
    if not moved or not outcome.attacks or outcome.eps == 0:
        return Measured("skipped", "no sample withstood an attack")
    unmoved = sum(
        s["natural_margin"] - s["margin"] <= _UNMOVED * abs(s["natural_margin"]) for s in moved
    )
    share = unmoved / len(moved)
    found = f"the attacks left the margin of {unmoved} of {len(moved)} standing samples as it was"
    alarm = unmoved >= max(_FEWEST, 0.25 * len(moved))
    return verdict(alarm, found, share, fails=share > 0.5)


def measure_consistency(outcome: Outcome) -> Measured:
    """Whether the files agree with each other."""
    samples, evaluation = outcome.samples, outcome.evaluation
    count = len(samples)
    natural = sum(s["correct"] for s in samples)
    broken = sum(s["broken_by"] is not None for s in samples)
    problems = []
    if count != evaluation["num_examples"]:
        problems.append(f"{count} samples for num_examples={evaluation['num_examples']}")
    if abs(natural - evaluation["natural_acc"] * count) > 0.5:
        problems.append(f"{natural} samples are correct, natural_acc={evaluation['natural_acc']}")
    if abs(len(outcome.standing) - evaluation["robust_acc"]["all"] * count) > 0.5:
        problems.append(f"{len(outcome.standing)} samples stand, robust_acc is another")
    if broken != natural - len(outcome.standing):
        problems.append(f"{natural} correct samples less {broken} broken ones do not stand")
    if any(s["robust"] and not s["correct"] for s in samples):
        problems.append("a misclassified sample counts as robust")
    if any((s["predicted"] == s["label"]) != s["correct"] for s in samples):
        problems.append("a sample's label and prediction contradict what counts as correct")
    reach = outcome.eps * (1 + _SLACK) + 1e-6
    outside = [s["index"] for s in samples if (s["distance"] or 0) > reach]
    if outside:
        problems.append(f"sample {outside[0]} was broken outside the ball")
    found = "; ".join(problems) or "samples.jsonl and evaluation.json agree"
    return verdict(bool(problems), found, float(len(problems)), fails=True)


OUTCOME_CHECKS: tuple[Check[Outcome], ...] = (
    Check(
        "outcome_consistency",
        measure_consistency,
        "The two files do not describe the same evaluation, or one was changed.",
        "Evaluate again into an empty folder.",
    ),
    Check(
        "outcome_accuracy",
        measure_accuracy,
        "The model does not classify these images, so its robustness says nothing.",
        "Check that the weights are the trained ones, and the data and normalisation the model's.",
    ),
    Check(
        "outcome_label_order",
        measure_label_order,
        "The classes of the data are in another order than the model's outputs.",
        "Sort the classes as in training; map the labels with the class names of both.",
    ),
    Check(
        "outcome_verification",
        measure_verification,
        "The model decides differently about the same image: randomness, dependence on the batch, "
        "or 16-bit rounding. Unconfirmed images do not count as broken, so robust accuracy is too "
        "high.",
        "Remove the cause, or evaluate the expectation of the model over its draws.",
    ),
    Check(
        "outcome_random_search",
        measure_random_search,
        "Random search succeeds where gradients failed (gradient masking): robust accuracy is too "
        "high.",
        "Find what masks the gradient (dat-ds doctor) and attack around it (BPDA, EOT).",
    ),
    Check(
        "outcome_unmoved_margins",
        measure_unmoved_margins,
        "The attacks did not move the logits at all: there was no usable gradient.",
        "Find what masks the gradient (dat-ds doctor) and attack around it (BPDA, EOT).",
    ),
    Check(
        "outcome_loss_dependence",
        measure_loss_dependence,
        "A later gradient attack succeeds where an earlier one failed: the loss of that one is "
        "flat on this model, as it is with logits of unusual scale.",
        "Report the worst case alone; check the logits' scale (dat-ds doctor).",
    ),
    Check(
        "outcome_late_breaks",
        measure_late_breaks,
        "Samples still fell when the steps ended: the attack has not converged, and robust "
        "accuracy is too high.",
        "Use more steps or the ensemble 'strong' until accuracy stays.",
    ),
)
"""Checks in order."""


def check_outcome(
    evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Look for what makes a finished evaluation untrustworthy, in its files alone.

    Args:
        evaluation: Contents of ``evaluation.json``.
        samples: Lines of ``samples.jsonl``.

    Returns:
        One finding for each of :data:`OUTCOME_CHECKS`, in that order.
    """
    outcome = Outcome(evaluation, samples)
    return [check.finding(check.measure(outcome)) for check in OUTCOME_CHECKS]
