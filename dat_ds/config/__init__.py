"""One JSON per run: a DeepSpeed config plus our ``"dat"`` section."""

from dat_ds.attacks import EvaluationAttack, parse_evaluation_attack
from dat_ds.config.build import attack_of, threat_of
from dat_ds.config.deepspeed.batch import resolve_batch
from dat_ds.config.deepspeed.logs import counts_traffic
from dat_ds.config.deepspeed.optimizer import (
    check_layerwise,
    check_one_bit,
    one_bit_name,
    one_bit_options,
)
from dat_ds.config.deepspeed.precision import precision_of
from dat_ds.config.deepspeed.resolve import adapt_to_device
from dat_ds.config.deepspeed.sections import (
    MONITORS,
    check_sections,
    enabled_monitors,
    without_monitors,
)
from dat_ds.config.load import load_config
from dat_ds.config.rules import check_num_classes, check_run
from dat_ds.config.scaling import scale_learning_rate
from dat_ds.config.schema import DatConfig, RunConfig
from dat_ds.length import Length
from dat_ds.method import plain

__all__ = [
    "MONITORS",
    "DatConfig",
    "EvaluationAttack",
    "Length",
    "RunConfig",
    "adapt_to_device",
    "attack_of",
    "check_layerwise",
    "check_num_classes",
    "check_one_bit",
    "check_run",
    "check_sections",
    "counts_traffic",
    "enabled_monitors",
    "load_config",
    "one_bit_name",
    "one_bit_options",
    "parse_evaluation_attack",
    "plain",
    "precision_of",
    "resolve_batch",
    "scale_learning_rate",
    "threat_of",
    "without_monitors",
]
