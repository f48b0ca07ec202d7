"""Robust objectives: what the outer minimisation minimises, from logits or features."""

from dat_ds.objectives.alp import Alp
from dat_ds.objectives.at import AdversarialTraining, Dat
from dat_ds.objectives.base import Objective, Outputs
from dat_ds.objectives.build import OBJECTIVES, build_objective
from dat_ds.objectives.contrastive import Contrastive
from dat_ds.objectives.fare import Fare
from dat_ds.objectives.grad_align import AlignmentProbes, alignment_probes
from dat_ds.objectives.hat import Hat, helper_images
from dat_ds.objectives.mart import Mart
from dat_ds.objectives.rotation import Rotation
from dat_ds.objectives.trades import Trades
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
    "Outputs",
    "Rotation",
    "Trades",
    "alignment_probes",
    "build_objective",
    "helper_images",
    "random_view",
    "rotations",
]
