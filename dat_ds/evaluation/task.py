"""Evaluation tasks of models whose objective is not classification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dat_ds.attacks import InnerLoss, SampleGenerator
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


@dataclass(frozen=True)
class Task:
    """Evaluation task of a self-supervised model.

    Attributes:
        inputs: Images, labels and a source of random numbers to the images that the model is shown,
            ``num_views`` for each, and what its outputs are compared with.
        num_views: Images shown for each image.
        loss: Mean loss is measured in the place of accuracy, and attacked; None where outputs are
            logits of what ``inputs`` gives.
    """

    inputs: Callable[[Tensor, Tensor, SampleGenerator], tuple[Tensor, Tensor]]
    num_views: int = 1
    loss: InnerLoss | None = None
