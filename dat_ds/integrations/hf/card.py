"""What a Trainer's model card tells of robustness."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

import dat_ds
from dat_ds.evaluation.record import norm_in_words
from dat_ds.integrations.hf.settings import Settings

_TAGS = ("adversarial-robustness", "adversarial-training", "dat_ds")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What one evaluation found.

    Attributes:
        step: Optimizer steps that the weights had seen.
        num_examples: Images attacked; None where an earlier process counted them.
        metrics: ``natural_accuracy``, ``robust_accuracy`` and their like, without a prefix.
    """

    step: int
    num_examples: int | None
    metrics: Mapping[str, float]


def add_robustness(trainer: Trainer, section: Callable[[], str]) -> None:
    """Have ``trainer.create_model_card``, and so ``push_to_hub``, add a section to ``README.md``.

    Args:
        trainer: Any.
        section: Markdown of the section, asked for when a card is written.
    """
    create = trainer.create_model_card
    if hasattr(create, "adds_robustness"):
        return

    @functools.wraps(create)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        given = inspect.signature(create).bind(*args, **kwargs).arguments
        tags = given.get("tags") or []
        given["tags"] = [*([tags] if isinstance(tags, str) else tags), *_TAGS]
        create(**given)
        if trainer.is_world_process_zero():
            path = Path(trainer.args.output_dir) / "README.md"
            before, heading, rest = path.read_text(encoding="utf-8").partition(_BEFORE)
            text = f"{before}{section()}\n\n{heading}{rest}"
            path.write_text(text, encoding="utf-8")

    create_model_card.adds_robustness = True  # type: ignore[attr-defined]
    trainer.create_model_card = create_model_card


_BEFORE = "## Model description"  # transformers' heading; without it, ours is the last


def robustness(settings: Settings, evaluated: Mapping[str, Evaluated], weights_step: int) -> str:
    """The section of a card.

    Args:
        settings: Of the training.
        evaluated: The latest evaluation by its prefix, such as ``"eval"``.
        weights_step: Optimizer steps that the weights in the model have seen.
    """
    threat, eps = settings.threat, settings.dat.threat_model.to_dict()["eps"]
    ball = f"{norm_in_words(threat.norm)}, eps {eps}"
    lines = [
        "## Robustness",
        "",
        f"{_training(settings)} Threat model: {ball}, of pixels in [{threat.lower:g}, "
        f"{threat.upper:g}]. Trained with dat_ds {dat_ds.__version__}.",
        "",
    ]
    if not evaluated:
        return "\n".join([*lines, "Robust accuracy has not been measured."])
    attacks = ", ".join(settings.dat.evaluation.attacks)
    lines += ["| measured | on | images | step | value |", "| --- | --- | --- | --- | --- |"]
    for prefix, found in evaluated.items():
        for name, value in found.metrics.items():
            kind, _, attack = name.partition("_accuracy")
            robust = f"robust accuracy, {attack.removeprefix('_') or attacks} ({ball})"
            words = {"natural": "clean accuracy", "robust": robust}
            shown = f"{value:.1%}" if kind in words else f"{value:.4g}"
            lines.append(
                f"| {words.get(kind, name)} | {prefix} | {found.num_examples or ''} | {found.step} "
                f"| {shown} |"
            )
    lines += [
        "",
        f"The weights are those of step {weights_step}; a list of results above is of the last "
        "evaluation in training. Accuracy under an attack is an upper bound of robust accuracy.",
    ]
    return "\n".join(lines)


def _training(settings: Settings) -> str:
    """Attack, objective and weight perturbation in a sentence."""
    objective = f"objective `{settings.objective.name}`"
    if settings.attack is None:
        return f"Trained without an attack, {objective}."
    values = settings.attack.to_dict()
    options = [f"{key} {values[key]}" for key in ("steps", "step_size") if values.get(key)]
    shown = f" ({', '.join(options)})" if options else ""
    perturbation = settings.dat.weight_perturbation.name
    weights = "" if perturbation == "none" else f", weight perturbation `{perturbation}`"
    return f"Trained with the attack `{values['name']}`{shown}, {objective}{weights}."
