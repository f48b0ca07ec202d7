"""Robust objectives: what the outer minimisation minimises, from logits or features."""

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
from dat_ds.objectives.grad_align import AlignmentProbes, alignment_probes
from dat_ds.objectives.self_supervised import Contrastive, Fare, Rotation
from dat_ds.objectives.views import random_view, rotations

__all__ = [
    "OBJECTIVES",
    "AdversarialTraining",
    "AlignmentProbes",
    "Alp",
    "Contrastive",
    "Dat",
    "Fare",
    "Hat",
    "Mart",
    "Objective",
    "Rotation",
    "Trades",
    "alignment_probes",
    "build_objective",
    "default_attack_loss",
    "helper_images",
    "objective_options",
    "random_view",
    "rotations",
    "uses_unlabelled",
]
