"""Rules that span sections, and agreement between our section and DeepSpeed's keys."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from dat_ds.attacks import ThreatModel, fgsm_step_size
from dat_ds.config.deepspeed_keys import (
    AUTOCAST_DEFAULTS,
    FP16_DEFAULTS,
    OPTIMIZER_DEFAULTS,
    SCALAR_DEFAULTS,
    TOP_LEVEL_KEYS,
    adam_weight_decay,
)
from dat_ds.config.evaluation_attack import parse_evaluation_attack
from dat_ds.config.length import Length
from dat_ds.config.parse import did_you_mean
from dat_ds.config.schema import AttackConfig, DatConfig, RunConfig
from dat_ds.errors import ConfigError
from dat_ds.objectives import DEFAULT_NATURAL_WEIGHT

_REFUSED_KEYS = {
    "scheduler": "the learning rate follows dat.schedule: move it there",
    "dataloader_drop_last": "our loader drops no sample: remove it",
    "managed_gradient_accumulation": "the engine counts micro-steps itself: remove it",
    "hybrid_engine": "it is for text generation: remove it",
    "pipeline": "pipeline parallelism is not supported: use zero_optimization",
    "tensor_parallel": "tensor parallelism is not supported: use zero_optimization",
    "expert_parallel": "expert parallelism is not supported: remove it",
    "sequence_parallel_size": "sequence parallelism is not supported: remove it",
    "data_efficiency": "it replaces the data loader: remove it",
}
_SECTIONS = {
    "zero_optimization": '{"stage": 2}',
    "bf16": '{"enabled": true}',
    "bfloat16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
    "torch_autocast": '{"enabled": true}',
    "optimizer": '{"type": "AdamW", "params": {"lr": 0.001}}',
}
ADAM_NAMES = ("adam", "adamw")
_WHOLE_LAYER_OPTIMIZERS = ("lamb", "lars", "adafactor", "lbfgs")
_REMOVED_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam")


def resolve_dat(dat: DatConfig, problems: list[str]) -> DatConfig:
    """Fill in the defaults that depend on other keys and check the rules between keys.

    Args:
        dat: The parsed section.
        problems: Receives one message per problem found.

    Returns:
        The section with every such default written out.
    """
    _check_threat_model(dat, problems)
    schedule, model, evaluation = dat.schedule, dat.model, dat.evaluation
    if schedule.warmup_epochs >= schedule.epochs:
        problems.append(
            f"dat.schedule.warmup_epochs={schedule.warmup_epochs:g} must be below "
            f"dat.schedule.epochs={schedule.epochs:g}, of which it is a part."
        )
    if (model.mean is None) != (model.std is None):
        problems.append("dat.model.mean and dat.model.std go together: give both or neither.")
    if model.std is not None and min(model.std, default=0) <= 0:
        problems.append(f"dat.model.std={model.std} must hold positive numbers.")
    if len(set(evaluation.attacks)) < len(evaluation.attacks):
        problems.append(f"dat.evaluation.attacks={evaluation.attacks} names an attack twice.")
    for path, name in [
        *((f"dat.evaluation.attacks[{i}]", a) for i, a in enumerate(evaluation.attacks)),
        ("dat.evaluation.validation_attack", evaluation.validation_attack),
    ]:
        try:
            parse_evaluation_attack(name)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    objective = dat.objective
    if objective.natural_weight is None:
        weight = DEFAULT_NATURAL_WEIGHT[objective.name]
        objective = dataclasses.replace(objective, natural_weight=weight)
    return dataclasses.replace(dat, attack=_resolve_attack(dat, problems), objective=objective)


def _check_threat_model(dat: DatConfig, problems: list[str]) -> None:
    threat = dat.threat_model
    try:
        ThreatModel(**dataclasses.asdict(threat))
    except ValueError as error:
        # The message starts with "eps=..." or "lower=...": prefixing makes it a full path.
        problems.append(f"dat.threat_model.{error}")


def _resolve_attack(dat: DatConfig, problems: list[str]) -> AttackConfig:
    attack, eps = dat.attack, dat.threat_model.eps
    if attack.name == "none":
        return attack
    if attack.name == "fgsm":
        if attack.steps not in (None, 1):
            problems.append(
                f"dat.attack.steps={attack.steps} makes no sense for 'fgsm', which takes one step: "
                "remove it, or write dat.attack.name='pgd'."
            )
        start = bool(attack.random_start)
        size = attack.step_size
        if size is None:
            threat = ThreatModel("linf", min(float(eps), 1.0))
            size = _scaled(eps, fgsm_step_size(threat, start) / threat.eps if threat.eps else 1.0)
        return dataclasses.replace(attack, steps=1, step_size=size, random_start=start)
    return dataclasses.replace(
        attack,
        steps=10 if attack.steps is None else attack.steps,
        step_size=_scaled(eps, 0.25) if attack.step_size is None else attack.step_size,
        random_start=True if attack.random_start is None else attack.random_start,
    )


def _scaled(length: Length, factor: float) -> Length:
    """``factor * length``, written as a fraction where ``length`` is."""
    if isinstance(length.text, str) and "/" in length.text:
        numerator, denominator = length.text.split("/")
        return Length(f"{float(numerator) * factor:g}/{denominator.strip()}")
    return Length(float(length) * factor)


def resolve_deepspeed(
    values: Mapping[str, Any],
    dat: DatConfig,
    problems: list[str],
    *,
    client_optimizer: bool = False,
) -> dict[str, Any]:
    """Check DeepSpeed's part of the config and write out its defaults that change results.

    Args:
        values: The JSON without our section.
        dat: Our section.
        problems: Receives one message per problem found.
        client_optimizer: The caller brings an optimizer of its own.

    Returns:
        A new dict for ``deepspeed.initialize``.
    """
    config = copy.deepcopy(dict(values))
    for key in values:
        if key not in TOP_LEVEL_KEYS:
            problems.append(
                f"Unknown top-level key {key!r}{did_you_mean(key, [*TOP_LEVEL_KEYS, 'dat'])}. "
                "Neither DeepSpeed nor dat_ds reads it (ours live under 'dat')."
            )
        elif key in _REFUSED_KEYS:
            problems.append(f"Key {key!r} is refused: {_REFUSED_KEYS[key]}.")
    _find_auto(config, "", problems)
    if isinstance(config.get("zero_optimization"), bool):
        config["zero_optimization"] = {"stage": int(config["zero_optimization"])}
    _check_objects(config, problems)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else 0
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage={stage!r} is not valid: write 0, 1, 2 or 3.")
        stage = 0
    for key, default in SCALAR_DEFAULTS.items():
        config.setdefault(key, default)
    both_sizes = {"train_batch_size", "train_micro_batch_size_per_gpu"} <= set(values)
    if both_sizes and "gradient_accumulation_steps" not in values:
        del config["gradient_accumulation_steps"]  # follows from them and the number of ranks
    if config["gradient_allreduce_op"] != "mean":
        problems.append(
            f"gradient_allreduce_op={config['gradient_allreduce_op']!r} is refused: losses are "
            "weighted for the mean over ranks. Remove it."
        )
    _check_precision(config, stage, problems)
    _resolve_optimizer(config, dat, stage, client_optimizer, problems)
    return config


def _check_objects(config: dict[str, Any], problems: list[str]) -> None:
    for key, example in _SECTIONS.items():
        value = config.get(key, {})
        if not isinstance(value, dict):
            problems.append(f'{key}={value!r} must be an object, such as "{key}": {example}.')


def _find_auto(value: Any, path: str, problems: list[str]) -> None:
    if value == "auto":
        problems.append(f"{path}='auto' is a value of Hugging Face's Trainer: write a number here.")
    elif isinstance(value, dict):
        for key, item in value.items():
            _find_auto(item, f"{path}.{key}" if path else key, problems)


def _enabled(config: Mapping[str, Any], key: str) -> bool:
    section = config.get(key)
    return isinstance(section, Mapping) and bool(section.get("enabled"))


def precision_of(config: Mapping[str, Any]) -> str:
    """``"float32"``, ``"bf16"``, ``"fp16"`` or ``"autocast"``: how DeepSpeed runs the model."""
    if _enabled(config, "torch_autocast"):
        return "autocast"
    if _enabled(config, "bf16") or _enabled(config, "bfloat16"):
        return "bf16"
    return "fp16" if _enabled(config, "fp16") else "float32"


def _check_precision(config: dict[str, Any], stage: int, problems: list[str]) -> None:
    keys = ("bf16", "bfloat16", "fp16", "torch_autocast")
    enabled = [key for key in keys if _enabled(config, key)]
    if len(enabled) > 1:
        problems.append(f"{' and '.join(enabled)} are enabled together: enable one of them.")
    if "torch_autocast" in enabled:
        config["torch_autocast"] = {**AUTOCAST_DEFAULTS, **config["torch_autocast"]}
    if "fp16" in enabled:
        config["fp16"] = {**FP16_DEFAULTS, **config["fp16"]}
        if config["fp16"]["auto_cast"]:
            problems.append(
                "fp16.auto_cast=true is refused: it would round the pixels before normalisation. "
                "Remove it; the model casts after normalising."
            )
        if stage == 0:
            problems.append(
                "fp16.enabled with zero_optimization.stage=0 is refused: this DeepSpeed divides "
                "the update by a loss scale that it never applied. Write zero_optimization.stage=1 "
                "(same results, less memory), or bf16 or torch_autocast instead of fp16."
            )


def _resolve_optimizer(
    config: dict[str, Any],
    dat: DatConfig,
    stage: int,
    client_optimizer: bool,
    problems: list[str],
) -> None:
    section = config.get("optimizer")
    given = {
        "'optimizer'": section is not None,
        "'dat.optimizer'": dat.optimizer is not None,
        "initialize(optimizer=...)": client_optimizer,
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        problems.append(f"{' and '.join(names)} are given together: keep one of them.")
    if not names:
        problems.append(
            "No optimizer: write DeepSpeed's "
            '"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, '
            'or ours "dat": {"optimizer": {"name": "adamw", "lr": 0.001}}.'
        )
    name = ""
    if isinstance(section, dict):
        name = str(section.get("type", "")).lower()
        if not isinstance(section.get("type"), str):
            problems.append("optimizer.type is missing: write 'AdamW' or 'SGD'.")
        if name in _REMOVED_OPTIMIZERS:
            problems.append(
                f"optimizer.type={section['type']!r} is not in DeepSpeed since 0.19.7 and not yet "
                "in dat_ds: write 'AdamW' or 'SGD'."
            )
        given_params = section.get("params", {})
        if not isinstance(given_params, dict):
            problems.append(f"optimizer.params={given_params!r} must be an object.")
            given_params = {}
        params = section["params"] = {**OPTIMIZER_DEFAULTS.get(name, {}), **given_params}
        if name in ADAM_NAMES:
            params.setdefault("weight_decay", adam_weight_decay(name, params))
    if stage > 0 and name in _WHOLE_LAYER_OPTIMIZERS:
        problems.append(
            f"optimizer.type={name!r} needs whole layers, but "
            f"zero_optimization.stage={stage} hands it slices across them, which silently trains "
            "something else: write stage 0, or 'AdamW' or 'SGD'."
        )
    elif stage > 0 and name not in ADAM_NAMES:
        # Element-wise ones work on any slice (the parity tests run SGD under every stage).
        config.setdefault("zero_allow_untested_optimizer", True)


def adapt_to_device(run: RunConfig, device_type: str) -> RunConfig:
    """Choose, on a CPU, DeepSpeed optimizers that need no compilation, and note it.

    DeepSpeed's Adam kernels are compiled on first use, which takes over a minute on a CPU, where
    torch's own do the same work.

    Args:
        run: A resolved run.
        device_type: Where the model runs, such as ``"cpu"`` or ``"cuda"``.

    Returns:
        The run for that device, with one note per change.
    """
    section = run.deepspeed.get("optimizer")
    config, notes = copy.deepcopy(run.deepspeed), []
    if device_type != "cpu" and section is not None:
        return run
    params = {} if section is None else config["optimizer"]["params"]
    is_adam = device_type == "cpu" and section is not None and section["type"].lower() in ADAM_NAMES
    if is_adam and "torch_adam" not in params:
        params["torch_adam"] = True
        notes.append("optimizer.params.torch_adam=true: on a CPU DeepSpeed's is compiled first")
    offloads = bool(config["zero_optimization"].get("offload_optimizer"))
    if offloads and "zero_force_ds_cpu_optimizer" not in config:
        config["zero_force_ds_cpu_optimizer"] = False
        notes.append("zero_force_ds_cpu_optimizer=false: offloaded states are updated by torch")
    return dataclasses.replace(run, deepspeed=config, notes=(*run.notes, *notes))


def resolve_batch(config: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Micro-batch per rank and accumulation steps, by DeepSpeed's rule.

    ``train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks``.

    Args:
        config: DeepSpeed's part of a resolved run config.
        ranks: Number of data-parallel ranks.

    Returns:
        ``(micro_batch, accumulation)``.

    Raises:
        ConfigError: Where the three do not agree.
    """
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    named = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    for key, value in named.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not is_count:
            raise ConfigError(f"{key}={value!r} is not valid: write an integer of at least 1.")
    if micro is None and total is None:
        raise ConfigError("No batch size: write train_micro_batch_size_per_gpu, such as 64.")
    if accumulation is None:
        accumulation = 1 if total is None or micro is None else max(1, total // (micro * ranks))
    if micro is None:
        assert total is not None
        micro = max(1, total // (accumulation * ranks))
    if total is not None and total != micro * accumulation * ranks:
        raise ConfigError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accumulation} x {ranks} ranks = "
            f"{micro * accumulation * ranks}: change one of them, or leave one out."
        )
    return micro, accumulation
