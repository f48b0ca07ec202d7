"""Whether the trackers of a run can be told, and by one way alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dat_ds.config.deepspeed.sections import enabled_monitors, is_installed


def check_trackers(
    names: Sequence[str], config: Mapping[str, Any], problems: list[str], *, here: bool
) -> None:
    """Refuse trackers without their package, and those that a section of DeepSpeed's tells too.

    Args:
        names: ``dat.logging.trackers``.
        config: DeepSpeed's part of the run config.
        problems: Receives one message per problem found.
        here: Whether the run is to be carried out on this machine.
    """
    for name in names:
        if name == "tensorboard" and name in config:
            continue  # DeepSpeed's section takes its place
        others = json.dumps([other for other in names if other != name])
        at = f"dat.logging.trackers names {name!r}"
        if here and not is_installed(name):
            problems.append(
                f"{at}, but the package {name!r} is not installed: pip install {name}, or write "
                f"dat.logging.trackers={others}."
            )
        if name == "wandb" and name in enabled_monitors(config):
            problems.append(
                f"{at}, and {name}.enabled=true is DeepSpeed's own monitor for it: remove the "
                f"section {name!r} (dat.logging.project names the project, WANDB_ENTITY the team), "
                f"or write dat.logging.trackers={others}."
            )
