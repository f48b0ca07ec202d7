"""Checks of a run config that need the device or the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from dat_ds.attacks import Attack
from dat_ds.config import (
    RunConfig,
    check_run,
    precision_of,
)
from dat_ds.engine import hooks
from dat_ds.errors import ConfigError
from dat_ds.models.batch_norm import has_batch_norm
from dat_ds.objectives import Objective


def attack_problems(
    attack: Attack, objective: Objective, run: RunConfig, accumulation: int
) -> list[str]:
    """Conflicts between an attack and the rest of a run, as messages to the user.

    Args:
        attack: From the config, or of the user's own.
        objective: From the config, or of the user's own.
        run: The run.
        accumulation: Micro-steps per optimizer step.
    """
    problems: list[str] = []
    check_run(
        run.dat,
        run.deepspeed,
        problems,
        attack=attack,
        objective=objective,
        accumulation=accumulation,
    )
    return problems


def evaluation_problems(attacks: Sequence[str], objective: Objective, run: RunConfig) -> list[str]:
    """Problems of attacks in the place of ``dat.evaluation.attacks``, as messages to the user.

    Args:
        attacks: Their names.
        objective: From the config, or of the user's own.
        run: The run; what is wrong with it already is not told again.
    """
    evaluation = dataclasses.replace(run.dat.evaluation, attacks=list(attacks))
    known: list[str] = []
    check_run(run.dat, {}, known, objective=objective)
    found = list(evaluation.problems())
    check_run(dataclasses.replace(run.dat, evaluation=evaluation), {}, found, objective=objective)
    return [problem for problem in found if problem not in known]


def check_precision(model: nn.Module, run: RunConfig) -> None:
    """Refuse precisions that the device lacks, or that DeepSpeed gets wrong for this model.

    Raises:
        ConfigError: With the working alternative.
    """
    precision = precision_of(run.deepspeed)
    if precision == "fp16" and not hooks.supports_fp16():
        raise ConfigError(
            "fp16.enabled=true: this device has no float16 arithmetic that DeepSpeed accepts. "
            'Write "bf16": {"enabled": true} or "torch_autocast": {"enabled": true} instead.'
        )
    if precision == "bf16" and not hooks.supports_bf16():
        raise ConfigError(
            "bf16.enabled=true: this device has no bfloat16 arithmetic (GPUs before Ampere have "
            'none). Write "fp16": {"enabled": true} instead, or leave it out and train in float32.'
        )
    buffer_dtype = run.deepspeed.get("data_types", {}).get("buffer_dtype")
    if precision in ("bf16", "fp16") and has_batch_norm(model) and buffer_dtype is None:
        raise ConfigError(
            f"{precision}.enabled=true with a BatchNorm network: DeepSpeed casts its parameters "
            'but not its statistics. Write "torch_autocast": {"enabled": true, "dtype": '
            f'"{"bfloat16" if precision == "bf16" else "float16"}"' + "} instead, which keeps "
            'BatchNorm in float32 (or "data_types": {"buffer_dtype": "..."} for 16-bit statistics).'
        )


def check_compiled(model: nn.Module, run: RunConfig) -> None:
    """Refuse a compiled model where DeepSpeed cannot run it.

    Raises:
        ConfigError: With the working alternative.
    """
    if run.zero_stage == 3 and any("_orig_mod" in m._modules for m in model.modules()):
        raise ConfigError(
            "zero_optimization.stage=3 with a model that torch.compile has wrapped: DeepSpeed "
            "cannot follow its parameters. Pass the model itself, and write "
            'dat.engine.compile="attack" or "all"; or call model.compile(), which wraps nothing.'
        )
