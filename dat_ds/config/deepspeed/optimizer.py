"""The optimizer that a run names, in DeepSpeed's section or in ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.config.deepspeed.keys import (
    NOT_READ,
    ONE_BIT_OPTIMIZERS,
    OPTIMIZER_DEFAULTS,
    OPTIMIZER_KEYS,
    adam_weight_decay,
)
from dat_ds.config.deepspeed.precision import FLOAT16, enabled
from dat_ds.config.schema import DatConfig
from dat_ds.method import UnknownKey, did_you_mean, parse_section
from dat_ds.optim import OPTIMIZERS

ADAM_NAMES = ("adam", "adamw")


_WHOLE_LAYER_OPTIMIZERS = ("lamb", "lars", "adafactor", "lbfgs")


def take_automatic_freeze(config: dict[str, Any]) -> None:
    """Write ``freeze_step: "auto"``, which is ours and not Hugging Face's, as null."""
    section = config.get("optimizer")
    params = section.get("params") if isinstance(section, dict) else None
    if isinstance(params, dict) and one_bit_name(config) and params.get("freeze_step") == "auto":
        params["freeze_step"] = None


def resolve_optimizer(
    config: dict[str, Any],
    dat: DatConfig,
    stage: int,
    client_optimizer: bool,
    problems: list[str],
) -> None:
    """Check the optimizer, and write out the defaults of DeepSpeed's section."""
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
        for key in section:
            if key not in OPTIMIZER_KEYS:
                valid = (
                    f"Valid keys of 'optimizer': {', '.join(OPTIMIZER_KEYS)}; those of the "
                    "optimizer itself stand in params."
                )
                problems.append(UnknownKey("optimizer", key, OPTIMIZER_KEYS, valid))
        given_params = section.get("params", {})
        if not isinstance(given_params, dict):
            problems.append(f"optimizer.params={given_params!r} must be an object.")
            given_params = {}
        defaults = OPTIMIZER_DEFAULTS.get(name, {})
        if name in ONE_BIT_OPTIMIZERS:
            defaults = ONE_BIT_OPTIMIZERS[name][1]
        params = section["params"] = {**defaults, **given_params}
        if name in ONE_BIT_OPTIMIZERS:
            _check_one_bit_params(section["type"], params, problems)
        if name in ADAM_NAMES:
            params.setdefault("weight_decay", adam_weight_decay(name, params))
    if dat.finetuning.is_on:
        _check_finetuning(section, dat, client_optimizer, problems)
    if dat.schedule.scaling != "none":
        scaling = f"dat.schedule.scaling={dat.schedule.scaling!r}"
        if client_optimizer:
            problems.append(f"{scaling} with initialize(optimizer=...): scale its own lr instead.")
        elif isinstance(section, dict) and "lr" not in section.get("params", {}):
            problems.append(f"{scaling} has no learning rate to scale: write optimizer.params.lr.")
    if dat.optimizer is not None and dat.optimizer.needs_layers:
        check_layerwise(config, problems)
    if one_bit_name(config, dat):
        check_one_bit(config, dat, problems)
    elif stage > 0 and name in _WHOLE_LAYER_OPTIMIZERS:
        problems.append(
            f"optimizer.type={name!r} needs whole layers, but "
            f"zero_optimization.stage={stage} hands it slices across them, which silently trains "
            "something else: "
            + (
                f"write ours, dat.optimizer.name={name!r}, which knows them."
                if name in OPTIMIZERS
                else "write stage 0, or 'AdamW' or 'SGD'."
            )
        )
    elif stage > 0 and name not in ADAM_NAMES:
        # Element-wise ones work on any slice (the parity tests run SGD under every stage).
        config.setdefault("zero_allow_untested_optimizer", True)


def _check_finetuning(
    section: Any, dat: DatConfig, client_optimizer: bool, problems: list[str]
) -> None:
    """Refuse rates by parameter where the optimizer's groups are not ours to make."""
    tuned = dat.finetuning
    keys = [key for key in tuned.known_keys() if getattr(tuned, key)]
    if client_optimizer:
        problems.append(
            f"dat.finetuning.{keys[0]} with initialize(optimizer=...), whose parameters and rates "
            "are chosen already: name the optimizer in the config, or remove it."
        )
    params = section.get("params") if isinstance(section, dict) else None
    has_rates = tuned.layer_decay is not None or any(
        rule.lr is not None or rule.weight_decay is not None for rule in tuned.parameters
    )
    if not isinstance(params, dict) or not has_rates:
        return
    if "lr" not in params or {"muon_lr", "adam_lr"} & set(params):
        problems.append(
            f"dat.finetuning.{keys[0]} multiplies optimizer.params.lr, but optimizer.type="
            f"{section.get('type')!r} has "
            + ("others beside it" if "lr" in params else "none")
            + ": write lr alone, or an optimizer of ours (dat.optimizer.name)."
        )


def one_bit_name(config: Mapping[str, Any], dat: DatConfig | None = None) -> str | None:
    """Our name of the optimizer with compressed communication that a run has, if it has one."""
    section = config.get("optimizer")
    kind = str(section.get("type", "")).lower() if isinstance(section, Mapping) else ""
    if kind in ONE_BIT_OPTIMIZERS:
        return ONE_BIT_OPTIMIZERS[kind][0]
    optimizer = None if dat is None else dat.optimizer
    return optimizer.name if optimizer is not None and optimizer.compresses else None


def one_bit_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ours from DeepSpeed's section, of a resolved run that has such a one."""
    params = config["optimizer"]["params"]
    return {key: value for key, value in params.items() if key not in NOT_READ}


def _check_one_bit_params(kind: str, params: dict[str, Any], problems: list[str]) -> None:
    """Check the parameters of DeepSpeed's section for an optimizer that is ours now."""
    name = ONE_BIT_OPTIMIZERS[kind.lower()][0]
    method = OPTIMIZERS[name]
    taken = [*method.known_keys(), *NOT_READ]
    for key in sorted(set(params) - set(taken)):
        if key == "max_grad_norm":
            problems.append(
                f"optimizer.params.max_grad_norm={params[key]!r} is refused, as DeepSpeed does: "
                f'write "gradient_clipping": {params[key]!r} at the top level.'
            )
            continue
        problems.append(
            f"optimizer.params.{key}={params[key]!r} is not a parameter of {kind!r}"
            f"{did_you_mean(key, taken)}: remove it. It takes {', '.join(taken)}."
        )
    for key, reason in {
        "amsgrad": "there is no such variant",
        "eps_inside_sqrt": "DeepSpeed never read it: eps is added to the root",
    }.items():
        if params[key] not in (False, None):
            problems.append(
                f"optimizer.params.{key}={params[key]!r} is refused: {reason}. Remove it."
            )
    known = {key: value for key, value in params.items() if key in method.known_keys()}
    parse_section(method, known, "optimizer.params", problems)


def check_one_bit(config: Mapping[str, Any], dat: DatConfig, problems: list[str]) -> None:
    """Refuse what cannot be combined with an optimizer with compressed communication.

    Args:
        config: DeepSpeed's part of a config with such an optimizer.
        dat: Our section.
        problems: Receives one message per problem found.
    """
    zero = config["zero_optimization"]
    stage = zero.get("stage") if isinstance(zero, Mapping) else 0
    if stage:
        problems.append(
            f"zero_optimization.stage={stage} with an optimizer that compresses its momentum: "
            "every rank needs its own gradient of the whole model, and the errors of compression "
            "are as large as the shards would save. Write zero_optimization.stage=0, or another "
            "optimizer."
        )
    if enabled(config, "torch_autocast") and config["torch_autocast"]["dtype"] in FLOAT16:
        problems.append(
            "torch_autocast.dtype='float16' with an optimizer that compresses its momentum: each "
            "rank's loss scaler would skip steps by itself, and ranks would fall out of step. "
            "Write torch_autocast.dtype='bfloat16'."
        )
    if dat.compression.name != "none":
        problems.append(
            f"dat.compression.name={dat.compression.name!r} with an optimizer that compresses its "
            "momentum: gradients travel only while the variance is measured, which a codec's noise "
            "would raise. Write dat.compression.name='none', or another optimizer."
        )


def notes_on(config: Mapping[str, Any], dat: DatConfig) -> tuple[str, ...]:
    """Notes on behaviour that a resolved config does not spell out, to be logged once."""
    name = one_bit_name(config, dat)
    if name is None:
        return ()
    notes = []
    if dat.optimizer is None:
        section = config["optimizer"]
        notes.append(
            f"optimizer.type={section['type']!r} is dat_ds's own {name!r}: DeepSpeed removed its "
            "optimizer in 0.19.7"
        )
        if section["params"]["cuda_aware"] or section["params"]["comm_backend_name"] != "nccl":
            notes.append(
                "optimizer.params.cuda_aware and comm_backend_name are not used: collectives are "
                "those of torch.distributed"
            )
    if config["gradient_clipping"]:
        notes.append(
            f"gradient_clipping={config['gradient_clipping']} acts on each rank's own gradient "
            "where no gradient is averaged: once the variance is frozen"
        )
    return tuple(notes)


def check_layerwise(config: Mapping[str, Any], problems: list[str]) -> None:
    """Refuse what cannot be combined with an optimizer that needs whole layers.

    Args:
        config: DeepSpeed's part of a config with such an optimizer: ours by the name of LAMB, say.
        problems: Receives one message per problem found.
    """
    zero = config["zero_optimization"]
    zero = zero if isinstance(zero, Mapping) else {}  # reported already
    offload = zero.get("offload_optimizer") or {}
    found = {
        f"zero_optimization.{key}.device='nvme'": "write 'cpu'"
        for key in ("offload_optimizer", "offload_param")
        if (zero.get(key) or {}).get("device") == "nvme"
    }
    if offload.get("ratio", 1) != 1:
        found[f"zero_optimization.offload_optimizer.ratio={offload['ratio']}"] = "remove it"
    if offload.get("super_offload"):
        found["zero_optimization.offload_optimizer.super_offload=true"] = "remove it"
    if zero.get("zenflow"):
        found["zero_optimization.zenflow"] = "remove it"
    problems += [
        f"{key} with a layer-wise optimizer: it needs all shards of a step before any is "
        f"updated, but this moves them one by one. Instead, {remedy}."
        for key, remedy in found.items()
    ]
