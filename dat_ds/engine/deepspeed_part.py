"""DeepSpeed's own verdict on its part of a run config, before anything is built, by dotted key."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeeds_logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from torch import nn

from dat_ds.config import one_bit_name
from dat_ds.config.deepspeed.batch import BATCH_KEYS, batch_problems
from dat_ds.config.deepspeed.optimizer import ADAM_NAMES
from dat_ds.errors import ConfigError
from dat_ds.method import UnknownKey, did_you_mean, shown

_MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
"""Sections that DeepSpeed checks by a model; the package ``config.deepspeed`` checks the others."""

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DeepSpeedConfigError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
"""What DeepSpeed raises for a config that it cannot go by, whatever the device and the disk do."""

_NEED_MUP = ("muadam", "muadamw", "musgd")
_FUSED_ONLY = {
    "lamb": "Write ours, dat.optimizer.name='lamb'",
    "lion": "Write optimizer.type='AdamW'",
}
"""Optimizers whose kernels DeepSpeed has for accelerators alone, and what to write on a CPU."""


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Let DeepSpeed check its part of a resolved run config, and its optimizer's parameters.

    Builds no engine and talks to no other rank: the verdict is the same wherever it is asked for.

    Args:
        settings: DeepSpeed's part, with or without an optimizer.

    Raises:
        ConfigError: With one line for each problem, which names the dotted key.
    """
    problems = batch_problems(settings)
    # Whether the sizes go together depends on the number of ranks; ``resolve_batch`` sees to it.
    values = {key: value for key, value in settings.items() if key not in BATCH_KEYS}
    values["train_micro_batch_size_per_gpu"] = 1
    with _warned_later():
        if (error := _refusal(values)) is not None:
            problems += _model_problems(values) or _without(values, error, _refusal)
    problems += _switches_as_numbers(values)
    problems += _zero_problems(settings)
    problems += _autocast_problems(settings)
    section = settings.get("optimizer")
    if section is not None and one_bit_name(settings) is None:
        problems += _optimizer_problems(section["type"], section["params"])
    if problems:
        lines = "\n".join(dict.fromkeys(problems))
        raise ConfigError(f"DeepSpeed refuses its part of the config:\n{lines}")


@contextlib.contextmanager
def _warned_later() -> Iterator[None]:
    """DeepSpeed reads the config again when it starts, and then says what it has to say of it."""
    level = deepspeeds_logger.level
    deepspeeds_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deepspeeds_logger.setLevel(level)


def _refusal(values: Mapping[str, Any]) -> Exception | None:
    """What DeepSpeed raises for a config; None where it accepts it."""
    try:
        DeepSpeedConfig(copy.deepcopy(dict(values)))
    except REFUSALS as error:
        return error
    return None


# ---- sections with a model


def _modelled(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    """The sections that have a pydantic model: dotted key, content, model."""
    for path, model in _MODELS.items():
        section: Any = values
        for key in path.split("."):
            section = section.get(key) if isinstance(section, Mapping) else None
        if section is not None:
            yield path, section, model


def _switches_as_numbers(values: Mapping[str, Any]) -> list[str]:
    """Problems of numbers that are true or false, which pydantic takes for 1 or 0."""
    return [
        f"{path}.{key}={shown(section[key])} is not valid: write a number."
        for path, section, model in _modelled(values)
        for key, field in _fields_of(model).items()
        if field.annotation in (int, float)
        and isinstance(section, Mapping)
        and isinstance(section.get(key), bool)
    ]


def _model_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems of the sections that have a pydantic model, as messages."""
    problems = []
    for path, section, model in _modelled(values):
        if not isinstance(section, Mapping):
            problems.append(f"{path}={shown(section)} must be an object.")
            continue
        try:
            model(**copy.deepcopy(dict(section)))
        except ValidationError as error:
            problems += [_told(item, path, section, model) for item in error.errors()]
        except REFUSALS:
            continue  # told with the whole
    return problems


def _told(item: Mapping[str, Any], path: str, section: Any, model: type[BaseModel] | None) -> str:
    """One entry of pydantic's error, as a message with the dotted key."""
    above = path
    for part in item["loc"]:
        if not isinstance(section, Mapping) or part not in section:
            break  # pydantic's name of a type that it tried
        above, path, section = path, f"{path}.{part}", section[part]
        if part != item["loc"][-1]:
            model = _model_below(model, str(part))
    if item["type"] == "extra_forbidden":
        valid = [] if model is None else sorted(_fields_of(model))
        listed = f"Valid keys of {above!r}: {', '.join(valid)}." if valid else ""
        return UnknownKey(above, path.rpartition(".")[2], valid, listed)
    reason = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{path}={shown(section)} is not valid: {reason}."


def _model_below(model: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    """The model of a key's own section; None where it has none."""
    field = None if model is None else _fields_of(model).get(key)
    hint = None if field is None else field.annotation
    kinds = (hint, *get_args(hint))
    return next((k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)), None)


def _fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the key that DeepSpeed documents, deprecated ones left out."""
    return {
        field.alias or name: field
        for name, field in model.model_fields.items()
        if not (isinstance(more := field.json_schema_extra, Mapping) and more.get("deprecated"))
    }


def _without(
    values: Mapping[str, Any],
    error: Exception,
    refusal: Callable[[Mapping[str, Any]], Exception | None],
    prefix: str = "",
) -> list[str]:
    """Name the keys without which an error is gone, for an error that may name none."""

    def culprits(path: tuple[str, ...], inside: Mapping[str, Any]) -> Iterator[str]:
        for key, value in inside.items():
            changed = copy.deepcopy(dict(values))
            below: Any = changed
            for part in path:
                below = below[part]
            del below[key]
            if refusal(changed) is None:
                at = (*path, key)
                deeper = list(culprits(at, value)) if isinstance(value, Mapping) else []
                yield from deeper or [f"{prefix}{'.'.join(at)}={shown(value)}"]

    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    found = " with ".join(culprits((), values)) or f"{prefix.rstrip('.') or 'This part'}"
    return [f"{found} is not valid: {reason}."]


def _zero_problems(settings: Mapping[str, Any]) -> list[str]:
    """Combinations that DeepSpeed notices only when it builds its optimizer."""
    zero = settings["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    device = offload.get("device", "none") if isinstance(offload, Mapping) else "none"
    needed = "zero_optimization.offload_optimizer.device='cpu'"
    needs_offload = []
    if zero.get("zenflow") is not None:
        needs_offload.append(f"zero_optimization.zenflow={shown(zero['zenflow'])}")
    problems = []
    power = (settings.get("fp16") or {}).get("initial_scale_power", 16)
    if not (isinstance(power, int) and 0 <= power <= 127):
        problems.append(
            f"fp16.initial_scale_power={shown(power)} is not valid: write an integer from 0 to 127."
        )
    for kind in ("bf16", "fp16"):
        section = settings.get(kind)
        key = f"{kind}_master_weights_and_grads"
        if _on(section, key) and not _on(section, "bf16_optimizer_states"):
            needs_offload.append(f"{kind}.{key}=true")
    if device != "cpu":
        problems += [
            f"{key} needs {needed}, and not {device!r}: write that, or remove it."
            for key in needs_offload
        ]
    if _on(offload, "super_offload") and get_accelerator().device_name() != "cuda":
        problems.append(
            "zero_optimization.offload_optimizer.super_offload=true needs NVIDIA's GPUs, and there "
            "is none here: remove it."
        )
    if zero.get("stage") in (2, 3) and zero.get("reduce_scatter", True):
        divides = {
            "prescale_gradients=true": settings["prescale_gradients"],
            f"gradient_predivide_factor={settings['gradient_predivide_factor']}": (
                settings["gradient_predivide_factor"] != 1
            ),
        }
        problems += [
            f"{key} goes with zero_optimization.stage={zero['stage']} only where "
            "zero_optimization.reduce_scatter=false: write that, or remove it."
            for key, is_given in divides.items()
            if is_given
        ]
    return problems


def _on(section: Any, key: str) -> bool:
    return isinstance(section, Mapping) and bool(section.get(key))


def _autocast_problems(settings: Mapping[str, Any]) -> list[str]:
    """Classes for autocast that are none; modules that nothing has imported stay so."""
    names = (settings.get("torch_autocast") or {}).get("lower_precision_safe_modules") or []
    problems = []
    for i, name in enumerate(names):
        module, _, kind = name.rpartition(".")
        if not isinstance(getattr(sys.modules.get(module), kind, None), type):
            problems.append(
                f"torch_autocast.lower_precision_safe_modules[{i}]={shown(name)} is not a class of "
                "a module that is imported: write one such as 'torch.nn.Linear', or import yours "
                "(dat-ds --import MODULE)."
            )
    return problems


# ---- the optimizer


def _optimizer_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Problems of an optimizer that DeepSpeed has or takes from torch, by name."""
    kind_name = name.lower()
    if kind_name in _NEED_MUP and importlib.util.find_spec("mup") is None:
        return [
            f"optimizer.type={name!r}, but the package 'mup' is not installed: pip install mup, "
            "or write 'AdamW' or 'SGD'."
        ]
    if kind_name in _FUSED_ONLY and get_accelerator().device_name() == "cpu":
        return [
            f"optimizer.type={name!r}: DeepSpeed has its kernel for accelerators alone, and this "
            f"is a CPU. {_FUSED_ONLY[kind_name]}."
        ]
    own = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad"}
    if kind_name in DEEPSPEED_OPTIMIZERS and kind_name not in own:
        return []  # its own implementation, with parameters of its own
    kind = getattr(torch.optim, own.get(kind_name, name), None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        near = did_you_mean(name, [n for n in dir(torch.optim) if n[0].isupper()])
        return [f"optimizer.type={name!r} is neither DeepSpeed's nor torch.optim's{near}."]
    known = set(inspect.signature(kind).parameters) - {"params"}
    if kind_name in ADAM_NAMES:
        known |= {"torch_adam", "adam_w_mode", "bias_correction", "set_grad_none"}
    unknown = [
        f"optimizer.params.{key} is not a parameter of {name}{did_you_mean(key, known)}."
        for key in params
        if key not in known
    ]
    return unknown or _value_problems(kind, params)


def _value_problems(kind: type[torch.optim.Optimizer], params: Mapping[str, Any]) -> list[str]:
    """The optimizer's own errors about its values, found by a step of it for one parameter."""
    signature = inspect.signature(kind).parameters

    def refusal(values: Mapping[str, Any]) -> Exception | None:
        weight = nn.Parameter(torch.zeros(1, 1))
        weight.grad = torch.zeros(1, 1)
        try:
            kind([weight], **{k: v for k, v in values.items() if k in signature}).step()
        except (*REFUSALS, RuntimeError) as error:
            return error
        return None

    error = refusal(params)
    return [] if error is None else _without(params, error, refusal, "optimizer.params.")
