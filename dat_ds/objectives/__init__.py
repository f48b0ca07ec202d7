"""Robust objectives: what the outer minimisation minimises. They see logits, nothing else."""

from dat_ds.objectives.adversarial_training import AdversarialTraining, Dat
from dat_ds.objectives.base import Objective
from dat_ds.objectives.build import (
    OBJECTIVES,
    build_objective,
    default_attack_loss,
    objective_options,
    uses_unlabelled,
)
from dat_ds.objectives.consistency import Alp, Hat, Mart, Trades, helper_images

__all__ = [
    "OBJECTIVES",
    "AdversarialTraining",
    "Alp",
    "Dat",
    "Hat",
    "Mart",
    "Objective",
    "Trades",
    "build_objective",
    "default_attack_loss",
    "helper_images",
    "objective_options",
    "uses_unlabelled",
]
