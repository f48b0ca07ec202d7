"""Attacks: the inner maximisation, as pure functions that need only torch."""

from dat_ds.attacks.apgd import apgd
from dat_ds.attacks.attack import Attack, CallableAttack, IteratedAttack, NoAttack, UserAttack
from dat_ds.attacks.build import ATTACKS, build_attack
from dat_ds.attacks.door import already_checked
from dat_ds.attacks.fab import fab
from dat_ds.attacks.fat import fat
from dat_ds.attacks.fgsm import fgsm, fgsm_rs, fgsm_step_size
from dat_ds.attacks.free import FreeAttack, FreePerturbation
from dat_ds.attacks.gradient import InputGradient, finite_samples
from dat_ds.attacks.losses import (
    FEATURE_LOSSES,
    INNER_LOSSES,
    MIN_CLASSES,
    InnerLoss,
    cross_entropy,
    cw_margin,
    dlr,
    feature_distance,
    kl_divergence,
    nt_xent,
    targeted_dlr,
)
from dat_ds.attacks.mim import mim
from dat_ds.attacks.misfits import misfits
from dat_ds.attacks.modes import MODEL_MODES, attack_mode, preserved_buffers
from dat_ds.attacks.multi_norm import multi_norm, threat_like
from dat_ds.attacks.n_fgsm import n_fgsm
from dat_ds.attacks.named import EvaluationAttack, parse_evaluation_attack, run_attack, stream_of
from dat_ds.attacks.noise import Generator, SampleGenerator, rand_like
from dat_ds.attacks.passes.folding import folded_batch_norm
from dat_ds.attacks.passes.graphs import AttackGraphs
from dat_ds.attacks.passes.precision import (
    PRECISIONS,
    Precision,
    check_device,
    gradient_speedup,
    product_speedup,
)
from dat_ds.attacks.passes.quantized import FORMATS
from dat_ds.attacks.passes.tokens import dropped_tokens, patch_tokens
from dat_ds.attacks.pgd import pgd
from dat_ds.attacks.projections import project_l1, project_l1_box, project_l2, project_linf
from dat_ds.attacks.square import square
from dat_ds.attacks.threat import NORMS, ThreatModel
from dat_ds.length import parse_length

__all__ = [
    "ATTACKS",
    "FEATURE_LOSSES",
    "FORMATS",
    "INNER_LOSSES",
    "MIN_CLASSES",
    "MODEL_MODES",
    "NORMS",
    "PRECISIONS",
    "Attack",
    "AttackGraphs",
    "CallableAttack",
    "EvaluationAttack",
    "FreeAttack",
    "FreePerturbation",
    "Generator",
    "InnerLoss",
    "InputGradient",
    "IteratedAttack",
    "NoAttack",
    "Precision",
    "SampleGenerator",
    "ThreatModel",
    "UserAttack",
    "already_checked",
    "apgd",
    "attack_mode",
    "build_attack",
    "check_device",
    "cross_entropy",
    "cw_margin",
    "dlr",
    "dropped_tokens",
    "fab",
    "fat",
    "feature_distance",
    "fgsm",
    "fgsm_rs",
    "fgsm_step_size",
    "finite_samples",
    "folded_batch_norm",
    "gradient_speedup",
    "kl_divergence",
    "mim",
    "misfits",
    "multi_norm",
    "n_fgsm",
    "nt_xent",
    "parse_evaluation_attack",
    "parse_length",
    "patch_tokens",
    "pgd",
    "preserved_buffers",
    "product_speedup",
    "project_l1",
    "project_l1_box",
    "project_l2",
    "project_linf",
    "rand_like",
    "run_attack",
    "square",
    "stream_of",
    "targeted_dlr",
    "threat_like",
]
