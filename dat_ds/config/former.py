"""Former keys, and configs that version 0.1 wrote beside its checkpoints and records.

Version 0.1 wrote every key of a section, also those that the chosen method does not take: as null,
or with the default of the methods that do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dat_ds.attacks import ATTACKS
from dat_ds.data import DATASETS
from dat_ds.method import Table
from dat_ds.objectives import OBJECTIVES
from dat_ds.optim import SCHEDULES

_SECTIONS: dict[str, tuple[Table[Any], tuple[str, ...]]] = {
    # Keys that no method takes together, and 0.1 always wrote.
    "attack": (ATTACKS, ("momentum", "noise_scale", "extra_steps", "num_targets", "eps_warmup")),
    "objective": (
        OBJECTIVES,
        ("natural_weight", "beta", "gamma", "label_smoothing", "helper_model"),
    ),
    "data": (DATASETS, ("path", "num_train", "num_test", "image_shape", "validation_fraction")),
    "schedule": (SCHEDULES, ("final_ratio", "milestones", "decay_factor")),
}


def without_foreign_keys(ours: Any) -> Any:
    """A ``"dat"`` section without what 0.1 wrote of methods that it had not chosen.

    Sections that a user wrote hold no such set of keys, and are returned as they are.
    """
    if not isinstance(ours, Mapping):
        return ours
    cleaned = dict(ours)
    for key, (table, together) in _SECTIONS.items():
        section = ours.get(key)
        if not isinstance(section, Mapping) or not set(together) <= set(section):
            continue
        method = table.get(str(section.get("name", table.default)))
        if method is not None:
            taken = {"name", *method.known_keys()}
            cleaned[key] = {
                k: value for k, value in section.items() if k in taken or not table.takers(k)
            }
    return cleaned


_LOGGING_OF_0_1 = {"every_steps", "progress", "tensorboard"}  # of which it wrote all


def without_former_keys(ours: Any, problems: list[str]) -> Any:
    """A ``"dat"`` section without keys that others have replaced.

    Args:
        ours: The section.
        problems: Receives one message per key, with what to write; what 0.1 wrote of a whole
            section is translated.
    """
    logs = ours.get("logging") if isinstance(ours, Mapping) else None
    if not isinstance(logs, Mapping) or "tensorboard" not in logs:
        return ours
    trackers = ["tensorboard"] if logs["tensorboard"] else []
    translated = {key: value for key, value in logs.items() if key != "tensorboard"}
    if set(logs) == _LOGGING_OF_0_1:
        translated["trackers"] = trackers
    else:
        problems.append(
            f"dat.logging.tensorboard={json.dumps(logs['tensorboard'])} is dat.logging.trackers="
            f"{json.dumps(trackers)} now: write that."
        )
    return {**ours, "logging": translated}
