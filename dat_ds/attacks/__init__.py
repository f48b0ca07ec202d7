"""Attacks: the inner maximisation, as pure functions that need only torch."""

from dat_ds.attacks.build import ATTACKS, Attack, build_attack, parse_length
from dat_ds.attacks.gradient import InputGradient
from dat_ds.attacks.losses import INNER_LOSSES, InnerLoss, cross_entropy
from dat_ds.attacks.modes import MODEL_MODES, attack_mode, preserved_buffers
from dat_ds.attacks.noise import SampleGenerator
from dat_ds.attacks.pgd import fgsm, fgsm_step_size, pgd
from dat_ds.attacks.projections import project_l2, project_linf
from dat_ds.attacks.threat import NORMS, ThreatModel

__all__ = [
    "ATTACKS",
    "INNER_LOSSES",
    "MODEL_MODES",
    "NORMS",
    "Attack",
    "InnerLoss",
    "InputGradient",
    "SampleGenerator",
    "ThreatModel",
    "attack_mode",
    "build_attack",
    "cross_entropy",
    "fgsm",
    "fgsm_step_size",
    "parse_length",
    "pgd",
    "preserved_buffers",
    "project_l2",
    "project_linf",
]
