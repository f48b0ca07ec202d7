"""Parameters that have a learning rate or a weight decay of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ParameterOptions:
    """What one parameter does differently from the rest of its group.

    Attributes:
        rate: Factor on the group's learning rate.
        weight_decay: In the place of the group's; None for the group's.
    """

    rate: float = 1.0
    weight_decay: float | None = None


def split_groups(
    groups: Sequence[Mapping[str, Any]],
    options: Mapping[Tensor, ParameterOptions],
    rate_of: Callable[[Mapping[str, Any]], float],
) -> list[dict[str, Any]]:
    """Parameter groups within which all parameters have the same options.

    Schedules multiply the rate of every group, so that ratios between them stay.

    Args:
        groups: Groups for a torch optimizer.
        options: Of some of their parameters; the others have none.
        rate_of: A group's learning rate, which it need not name.

    Returns:
        Each group in parts, the fastest first, with everything else that it says.
    """
    split = []
    for group in groups:
        members: dict[ParameterOptions, list[Tensor]] = {}
        for parameter in group["params"]:
            members.setdefault(options.get(parameter, ParameterOptions()), []).append(parameter)
        for own in sorted(members, key=lambda own: -own.rate):
            part = {**group, "params": members[own], "lr": rate_of(group) * own.rate}
            if own.weight_decay is not None:
                part["weight_decay"] = own.weight_decay
            split.append(part)
    return split
