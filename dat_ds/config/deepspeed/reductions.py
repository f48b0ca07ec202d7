"""How DeepSpeed reduces gradients, where a codec replaces that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.config.schema import DatConfig


def resolve_reductions(
    config: dict[str, Any], dat: DatConfig, stage: int, problems: list[str]
) -> None:
    """Set how DeepSpeed reduces gradients to what compression replaces; refuse the rest."""
    zero = config["zero_optimization"]
    zero = zero if isinstance(zero, dict) else {}
    name = f"dat.compression.name={dat.compression.name!r}"
    refused = {
        "communication_data_type": config.get("communication_data_type") is not None,
        "prescale_gradients": config["prescale_gradients"],
        "gradient_predivide_factor": config["gradient_predivide_factor"] != 1,
        "zero_optimization.zenflow": bool(zero.get("zenflow")),
        "zero_optimization.zero_quantized_gradients": bool(zero.get("zero_quantized_gradients")),
    }
    if stage in (1, 2):
        refused["zero_optimization.reduce_scatter"] = zero.get("reduce_scatter") is True
        refused["zero_optimization.contiguous_gradients"] = not zero.get(
            "contiguous_gradients", True
        )
        zero["reduce_scatter"] = False
    elif stage == 3:
        refused["zero_optimization.reduce_scatter"] = not zero.get("reduce_scatter", True)
        if getattr(dat.compression, "sides", None) == "double":
            _check_parameter_half(dat, zero, problems)
    problems += [
        f"{key} with {name}, which averages gradients in its own way: remove one of them."
        for key, is_given in refused.items()
        if is_given
    ]


def _check_parameter_half(dat: DatConfig, zero: Mapping[str, Any], problems: list[str]) -> None:
    """Refuse what parameters that travel as int8 would spoil, or what sends them otherwise."""
    sides = "dat.compression.sides='double' with zero_optimization.stage=3"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            problems.append(f"zero_optimization.{key} with {sides}: remove one of them.")
    if zero.get("zero_hpz_partition_size", 1) > 1:
        problems.append(
            f"zero_optimization.zero_hpz_partition_size with {sides}: parameters would come from "
            "secondary shards. Remove one of them."
        )
    if dat.weight_perturbation.name != "none":
        problems.append(
            f"dat.weight_perturbation.name={dat.weight_perturbation.name!r} with {sides}: rounding "
            "parameters for the way moves them as far as the perturbation. Write 'single'."
        )
