"""One JSON per run: a DeepSpeed config plus our ``"dat"`` section."""

from dat_ds.config.build import attack_of, objective_of, threat_of
from dat_ds.config.evaluation_attack import EvaluationAttack, parse_evaluation_attack
from dat_ds.config.length import Length
from dat_ds.config.load import load_config
from dat_ds.config.reconcile import (
    adapt_to_device,
    check_num_classes,
    precision_of,
    resolve_batch,
)
from dat_ds.config.schema import DatConfig, RunConfig, plain

__all__ = [
    "DatConfig",
    "EvaluationAttack",
    "Length",
    "RunConfig",
    "adapt_to_device",
    "attack_of",
    "check_num_classes",
    "load_config",
    "objective_of",
    "parse_evaluation_attack",
    "plain",
    "precision_of",
    "resolve_batch",
    "threat_of",
]
