"""DeepSpeed's part: checks, and the defaults that change results."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from dat_ds.config.deepspeed.batch import count_problems
from dat_ds.config.deepspeed.keys import SCALAR_DEFAULTS, TOP_LEVEL_KEYS
from dat_ds.config.deepspeed.logs import check_logs
from dat_ds.config.deepspeed.optimizer import ADAM_NAMES, resolve_optimizer, take_automatic_freeze
from dat_ds.config.deepspeed.precision import check_precision_keys
from dat_ds.config.deepspeed.reductions import resolve_reductions
from dat_ds.config.deepspeed.sections import check_sections
from dat_ds.config.schema import DatConfig, RunConfig
from dat_ds.method import did_you_mean

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
    "seq_parallel_communication_data_type": "sequence parallelism is not supported: remove it",
    "use_data_before_expert_parallelism": "expert parallelism is not supported: remove it",
    "vocabulary_size": "images have no vocabulary: remove it",
    "weight_quantization": "the model is built before DeepSpeed sees it: remove it",
    "disable_allgather": "DeepSpeed does nothing with it: remove it",
    "datastates_ckpt": (
        "a checkpoint is published when it is complete, and this one writes on: remove it"
    ),
}


_SECTIONS = {
    "zero_optimization": '{"stage": 2}',
    "bf16": '{"enabled": true}',
    "bfloat16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
    "optimizer": '{"type": "AdamW", "params": {"lr": 0.001}}',
}


def resolve_deepspeed(
    values: Mapping[str, Any],
    dat: DatConfig,
    problems: list[str],
    *,
    client_optimizer: bool = False,
    here: bool = True,
) -> dict[str, Any]:
    """Check DeepSpeed's part of the config and write out its defaults that change results.

    Args:
        values: The JSON without our section.
        dat: Our section.
        problems: Receives one message per problem found.
        client_optimizer: The caller brings an optimizer of its own.
        here: Whether the run is to be carried out on this machine.

    Returns:
        A new dict for ``deepspeed.initialize``.
    """
    config = copy.deepcopy(dict(values))
    for key in values:
        if key in dat.known_keys() and key not in TOP_LEVEL_KEYS:
            problems.append(f"Unknown top-level key {key!r}: it belongs under 'dat', as dat.{key}.")
        elif key not in TOP_LEVEL_KEYS:
            problems.append(
                f"Unknown top-level key {key!r}{did_you_mean(key, [*TOP_LEVEL_KEYS, 'dat'])}. "
                "Neither DeepSpeed nor dat_ds reads it (ours live under 'dat')."
            )
        elif key in _REFUSED_KEYS:
            problems.append(f"Key {key!r} is refused: {_REFUSED_KEYS[key]}.")
    take_automatic_freeze(config)
    _find_auto(config, "", problems)
    if isinstance(config.get("zero_optimization"), bool):
        config["zero_optimization"] = {"stage": int(config["zero_optimization"])}
    _check_objects(config, problems)
    check_sections(config, problems, here=here)
    check_logs(config, problems)
    problems += count_problems({k: v for k, v in config.items() if v != "auto"})  # told above
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
    check_precision_keys(config, problems)
    resolve_optimizer(config, dat, stage, client_optimizer, problems)
    if dat.compression.name != "none":
        resolve_reductions(config, dat, stage, problems)
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
