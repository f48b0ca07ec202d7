"""What the model of an objective is judged by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dat_ds.evaluation.accuracy import Task
from dat_ds.objectives import Objective


def task_of(objective: Objective, reference: Callable[[Tensor], Tensor] | None) -> Task | None:
    """The task of a self-supervised objective; None where the model classifies images.

    Args:
        objective: The objective.
        reference: The model as it was at the start, where the objective needs it.
    """
    if objective.head == "classes":
        return None
    return Task(
        inputs=lambda x, y, generator: objective.inputs(
            x, y, generator=generator, reference=reference
        ),
        num_views=objective.num_views,
        loss=None if objective.classifies else objective.inner_loss,
    )
