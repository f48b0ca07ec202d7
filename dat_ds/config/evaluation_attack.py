"""Names of evaluation attacks: ``pgd-20`` and ``pgd-50-10``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"pgd-([1-9]\d*)(?:-([1-9]\d*))?")


@dataclass(frozen=True)
class EvaluationAttack:
    """PGD for evaluation: random start, step size ``2.5 eps / steps`` (Madry et al. 2018, sec. 4).

    Args:
        name: As written in the config and the record.
        steps: Gradient steps.
        restarts: Random restarts; the worst is kept.
    """

    name: str
    steps: int
    restarts: int

    def step_size(self, eps: float) -> float:
        """Step length in pixel units for a ball of radius ``eps``."""
        return 2.5 * eps / self.steps


def parse_evaluation_attack(name: str) -> EvaluationAttack:
    """Read ``pgd-STEPS`` or ``pgd-STEPS-RESTARTS``.

    Raises:
        ValueError: For anything else.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not an evaluation attack: write 'pgd-STEPS' or 'pgd-STEPS-RESTARTS', "
            "such as 'pgd-20' or 'pgd-50-10'."
        )
    return EvaluationAttack(name, int(match[1]), int(match[2] or 1))
