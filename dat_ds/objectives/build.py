"""Objectives by name, from the ``dat.objective`` section of a run config."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from dat_ds.objectives.adversarial_training import AdversarialTraining, Dat
from dat_ds.objectives.base import Objective
from dat_ds.objectives.consistency import Alp, Hat, Mart, Trades
from dat_ds.objectives.self_supervised import Contrastive, Fare, Rotation

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (AdversarialTraining, Dat, Trades, Mart, Alp, Hat, Rotation, Contrastive, Fare)
}
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "label_smoothing": ("must lie in [0, 1)", lambda value: 0 <= value < 1),
    "temperature": ("must be a finite number above 0", lambda value: 0 < value < math.inf),
    "crop_area": ("must lie in (0, 1]", lambda value: 0 < value <= 1),
    "color_jitter": ("must lie in [0, 1]", lambda value: 0 <= value <= 1),
    "flip": ("must lie in [0, 1]", lambda value: 0 <= value <= 1),
}
_WEIGHT = ("must be a finite number of at least 0", lambda value: 0 <= value < math.inf)


def objective_options(name: str) -> dict[str, Any]:
    """Options of an objective by name, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(OBJECTIVES[name])}


def default_attack_loss(name: str) -> str:
    """Inner loss that the attack maximises under an objective, unless told otherwise."""
    return OBJECTIVES[name].default_attack_loss


def uses_unlabelled(name: str) -> bool:
    """Whether images without a label add to the loss of an objective."""
    return OBJECTIVES[name].uses_unlabelled


def build_objective(config: Mapping[str, Any]) -> Objective:
    """Build an objective from the keys of ``dat.objective``.

    Args:
        config: ``name`` (default ``"at"``) and that objective's options; one that is None has its
            default.

    Raises:
        ValueError: For an unknown name or option, or a value out of range.
    """
    options = {key: value for key, value in config.items() if value is not None}
    name = options.pop("name", "at")
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r} is not one of {', '.join(OBJECTIVES)}.")
    known = objective_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"objective {name!r} has no option {', '.join(unknown)}: {', '.join(known)}."
        )
    values = {key: float(value) for key, value in options.items()}
    for key, value in values.items():
        words, is_valid = _RANGES.get(key, _WEIGHT)
        if not is_valid(value):
            raise ValueError(f"objective.{key}={value} {words}.")
    return OBJECTIVES[name](**values)
