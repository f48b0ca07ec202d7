"""One JSON per run: a DeepSpeed config plus our ``"dat"`` section."""

from dat_ds.config.build import attack_of, objective_of, threat_of
from dat_ds.config.evaluation_attack import EvaluationAttack, parse_evaluation_attack
from dat_ds.config.load import load_config
from dat_ds.config.reconcile import (
    adapt_to_device,
    check_attack_batch,
    check_attack_passes,
    check_layerwise,
    check_num_classes,
    check_one_bit,
    one_bit_name,
    one_bit_options,
    precision_of,
    resolve_batch,
    scale_learning_rate,
)
from dat_ds.config.schema import DatConfig, RunConfig, plain
from dat_ds.length import Length

__all__ = [
    "DatConfig",
    "EvaluationAttack",
    "Length",
    "RunConfig",
    "adapt_to_device",
    "attack_of",
    "check_attack_batch",
    "check_attack_passes",
    "check_layerwise",
    "check_num_classes",
    "check_one_bit",
    "load_config",
    "objective_of",
    "one_bit_name",
    "one_bit_options",
    "parse_evaluation_attack",
    "plain",
    "precision_of",
    "resolve_batch",
    "scale_learning_rate",
    "threat_of",
]
