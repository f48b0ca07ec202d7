"""Checks of a run config that need DeepSpeed, the device or the model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from torch import nn

from dat_ds.attacks import Attack
from dat_ds.config import (
    RunConfig,
    check_run,
    one_bit_name,
    precision_of,
)
from dat_ds.config.deepspeed.optimizer import ADAM_NAMES
from dat_ds.engine import hooks
from dat_ds.errors import ConfigError
from dat_ds.method import did_you_mean
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


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Let DeepSpeed check its part of the config, and its optimizer's parameters.

    Raises:
        ConfigError: With what DeepSpeed says.
    """
    problems = []
    try:
        DeepSpeedConfig(copy.deepcopy(dict(settings)))
        get_monitor_config(dict(settings))
    except ValidationError as error:  # pydantic's, one entry per key
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"])
            problems.append(f"{error.title}: {path}={item['input']!r}: {item['msg']}.")
    except (AssertionError, AttributeError, DeepSpeedConfigError, TypeError, ValueError) as error:
        problems.append(str(error))
    section = settings.get("optimizer")
    if section is not None and one_bit_name(settings) is None:
        problems += _optimizer_problems(section["type"], section["params"])
    if problems:
        raise ConfigError("DeepSpeed refuses its part of the config:\n" + "\n".join(problems))


def _optimizer_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Problems of an optimizer that DeepSpeed takes from torch, by name."""
    if name.lower() in DEEPSPEED_OPTIMIZERS and name.lower() not in ADAM_NAMES:
        return []  # its own implementation, with parameters of its own
    torch_name = {"adam": "Adam", "adamw": "AdamW"}.get(name.lower(), name)
    kind = getattr(torch.optim, torch_name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        near = did_you_mean(name, [n for n in dir(torch.optim) if n[0].isupper()])
        return [f"optimizer.type={name!r} is neither DeepSpeed's nor torch.optim's{near}."]
    known = set(inspect.signature(kind).parameters) - {"params"}
    if name.lower() in ADAM_NAMES:
        known |= {"torch_adam", "adam_w_mode", "bias_correction", "set_grad_none"}
    unknown = [
        f"optimizer.params.{key} is no parameter of {name}{did_you_mean(key, known)}."
        for key in params
        if key not in known
    ]
    return unknown or _value_problems(kind, params)


def _value_problems(kind: type[torch.optim.Optimizer], params: Mapping[str, Any]) -> list[str]:
    """The optimizer's own errors about its values, found by building it for one parameter."""
    signature = inspect.signature(kind).parameters
    try:
        kind([nn.Parameter(torch.zeros(1))], **{k: v for k, v in params.items() if k in signature})
    except (TypeError, ValueError) as error:
        return [f"optimizer.params={dict(params)}: {error}."]
    return []


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
