"""Rules that span sections, and agreement between our section and DeepSpeed's keys."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from dat_ds.attacks import (
    ATTACK_SETTINGS,
    FEATURE_LOSSES,
    FORMATS,
    MIN_CLASSES,
    NORMS,
    REQUIRED,
    ThreatModel,
    attack_options,
    fgsm_step_size,
    parse_length,
)
from dat_ds.compression import CODECS, build_codec, codec_options
from dat_ds.config.deepspeed_keys import (
    AUTOCAST_DEFAULTS,
    FP16_DEFAULTS,
    NOT_READ,
    ONE_BIT_OPTIMIZERS,
    OPTIMIZER_DEFAULTS,
    SCALAR_DEFAULTS,
    TOP_LEVEL_KEYS,
    adam_weight_decay,
)
from dat_ds.config.evaluation_attack import parse_evaluation_attack
from dat_ds.config.parse import did_you_mean, parse_section
from dat_ds.config.schema import (
    AttackConfig,
    CompressionConfig,
    DatConfig,
    GuardConfig,
    InnerLossName,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    WeightPerturbationConfig,
)
from dat_ds.errors import ConfigError
from dat_ds.length import Length
from dat_ds.objectives import (
    OBJECTIVES,
    Objective,
    default_attack_loss,
    objective_options,
    uses_unlabelled,
)
from dat_ds.optim import (
    OPTIMIZERS,
    PRESETS,
    CompressedOptimizer,
    build_optimizer,
    lr_scale,
    optimizer_options,
)

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
_OBJECTIVE_OPTIONS = (
    *("natural_weight", "beta", "gamma", "label_smoothing"),
    *("temperature", "crop_area", "color_jitter", "flip"),
)
_ATTACK_KEYS = frozenset(field.name for field in dataclasses.fields(AttackConfig))
ADAM_NAMES = ("adam", "adamw")
_FLOAT16 = ("float16", "fp16", "half", "torch.float16")
_WHOLE_LAYER_OPTIMIZERS = ("lamb", "lars", "adafactor", "lbfgs")


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
    if (schedule.scaling == "none") != (schedule.base_batch is None):
        problems.append(
            f"dat.schedule.scaling={schedule.scaling!r} and dat.schedule.base_batch="
            f"{schedule.base_batch} go together: write 'linear' or 'sqrt' and the global batch "
            "that the learning rate is for, such as 256, or neither."
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
    resolved = dataclasses.replace(
        dat,
        attack=_resolve_attack(dat, problems),
        objective=_resolve_objective(dat, problems),
        weight_perturbation=_resolve_weight_perturbation(dat, problems),
        guard=_resolve_guard(dat, problems),
        optimizer=_resolve_our_optimizer(dat, problems),
        compression=_resolve_compression(dat.compression, problems),
    )
    _check_labels(resolved, problems)
    _check_self_supervision(resolved, problems)
    num_classes = model.num_classes or dat.data.num_classes
    if num_classes is not None and OBJECTIVES[dat.objective.name].head == "classes":
        check_num_classes(resolved, num_classes, problems)
    return resolved


def _check_threat_model(dat: DatConfig, problems: list[str]) -> None:
    threat = dat.threat_model
    try:
        ThreatModel(**dataclasses.asdict(threat))
    except ValueError as error:
        # The message starts with "eps=..." or "lower=...": prefixing makes it a full path.
        problems.append(f"dat.threat_model.{error}")


def _resolve_attack(dat: DatConfig, problems: list[str]) -> AttackConfig:
    """Write out the attack's defaults; refuse keys that it does not take, and what has no sense."""
    attack, threat = dat.attack, dat.threat_model
    if attack.name == "none":
        return attack
    taken = {k: v for k, v in attack_options(attack.name).items() if k in _ATTACK_KEYS}
    for field in dataclasses.fields(attack):
        key, value = field.name, getattr(attack, field.name)
        if key in ("name", *ATTACK_SETTINGS) or key in taken or value is None:
            continue
        if (key, value) in (("steps", 1), ("model_mode", "eval")):
            continue  # what a resolved attack that takes no such key says
        problems.append(
            f"dat.attack.{key}={value!r} is no setting of the attack {attack.name!r}: remove it. "
            f"It takes {', '.join([*taken, *ATTACK_SETTINGS])}."
        )
    defaults = {key: value for key, value in taken.items() if value is not REQUIRED}
    single_step = "steps" not in taken
    defaults["steps"] = 1 if single_step else 10
    if "step_size" in taken:
        start = attack.name == "fgsm_rs" or bool(attack.random_start)
        defaults["step_size"] = (
            _scaled(threat.eps, fgsm_step_size(ThreatModel("linf", 1.0), start))
            if single_step
            else _scaled(threat.eps, 0.25)
        )
    chosen = {key: value for key, value in defaults.items() if getattr(attack, key) is None}
    loss = chosen.pop("loss", None)
    attack = dataclasses.replace(attack, **chosen)
    if loss is not None:
        # The divergence is flat at the image itself, and Auto-PGD has no such loss.
        moves = attack.name != "apgd" and _starts_at_random(attack)
        own = default_attack_loss(dat.objective.name)
        loss = own if moves or own in FEATURE_LOSSES else loss
        attack = dataclasses.replace(attack, loss=cast(InnerLossName, loss))
    _check_attack(attack, dat, problems)
    return attack


def _check_attack(attack: AttackConfig, dat: DatConfig, problems: list[str]) -> None:
    """Refuse combinations of attack, threat model and objective that make no sense."""
    norm, name = dat.threat_model.norm, attack.name
    if name in ("fgsm", "fgsm_rs") and norm == "l1":
        problems.append(
            f"dat.attack.name={name!r} takes a sign step, which dat.threat_model.norm='l1' has "
            "not: write dat.attack.name='pgd' or 'apgd'."
        )
    if name == "n_fgsm" and norm != "linf":
        problems.append(
            f"dat.attack.name='n_fgsm' is defined for dat.threat_model.norm='linf', not {norm!r}: "
            "write dat.attack.name='pgd'."
        )
    if attack.loss == "dlr-targeted" and name != "apgd":
        problems.append(
            f"dat.attack.loss='dlr-targeted' belongs to dat.attack.name='apgd', not {name!r}: "
            "write 'dlr', or that attack."
        )
    if attack.loss == "kl" and (name == "apgd" or not _starts_at_random(attack)):
        problems.append(
            f"dat.attack.loss='kl' with dat.attack.name={name!r}"
            + (
                ": APGD has no such loss; write dat.attack.loss='ce' or dat.attack.name='pgd'."
                if name == "apgd"
                else " and no random start: its gradient at the image itself is zero. Write "
                "dat.attack.random_start=true or dat.attack.loss='ce'."
            )
        )
    if dat.objective.name == "fare" and not _starts_at_random(attack):
        problems.append(
            f"dat.objective.name='fare' with dat.attack.name={name!r} and no random start: at the "
            "image itself nothing pulls its features away. Write dat.attack.random_start=true, or "
            "dat.attack.name='pgd'."
        )
    for key in ("precision", "fold_batch_norm", "resolution", "keep_tokens"):
        if name == "free" and getattr(attack, key) not in (None, False):
            problems.append(
                f"dat.attack.{key}={getattr(attack, key)!r} makes the attack cheaper than the "
                "update, of which dat.attack.name='free' is a part: remove it."
            )
    if attack.fold_batch_norm and attack.model_mode == "train":
        problems.append(
            "dat.attack.fold_batch_norm=true with dat.attack.model_mode='train': batch statistics "
            "are known only in the forward. Write dat.attack.model_mode='eval'."
        )
    if attack.steps_from is not None and "steps" not in attack_options(name):
        problems.append(
            f"dat.attack.steps_from={attack.steps_from} makes no sense for {name!r}, which takes "
            "one step: remove it."
        )
    if name == "multi_norm":
        _check_other_norms(attack.other_norms, norm, problems)


def _check_labels(dat: DatConfig, problems: list[str]) -> None:
    """Refuse labels that are missing, or mixed, where attack or objective need them."""
    data, attack, objective = dat.data, dat.attack, dat.objective
    if data.mixes:
        key = "mixup" if data.mixup else "cutmix"
        mixes = f"dat.data.{key}={getattr(data, key):g} makes labels probabilities, but "
        if attack.loss in ("cw", "dlr", "dlr-targeted"):
            problems.append(
                f"{mixes}dat.attack.loss={attack.loss!r} needs a true class: write 'ce' or 'kl', "
                f"or remove dat.data.{key}."
            )
        if objective.name == "mart":
            problems.append(
                f"{mixes}dat.objective.name='mart' needs a true class: write 'trades', or remove "
                f"dat.data.{key}."
            )
        if data.has_unlabelled:
            problems.append(f"{mixes}unlabelled images have none to mix: remove dat.data.{key}.")
    if data.drop_unlabelled and data.labelled_fraction == 1:
        problems.append(
            "dat.data.drop_unlabelled=true has nothing to drop: write dat.data.labelled_fraction, "
            "such as 0.1, or remove it."
        )
    if not data.has_unlabelled:
        for path, value, default in (
            ("data.pseudo_labels", data.pseudo_labels, None),
            ("data.labelled_repeats", data.labelled_repeats, 1),
            ("objective.unlabelled_weight", objective.unlabelled_weight, 1.0),
        ):
            if value != default:
                problems.append(
                    f"dat.{path}={value!r} concerns unlabelled images, but there are none: write "
                    "dat.data.labelled_fraction or dat.data.unlabelled_path, or remove it."
                )
    elif data.pseudo_labels is None and OBJECTIVES[objective.name].head == "classes":
        where = (
            f"dat.data.unlabelled_path={data.unlabelled_path!r}"
            if data.unlabelled_path is not None
            else f"dat.data.labelled_fraction={data.labelled_fraction:g}"
        )
        if objective.grad_align:
            problems.append(
                f"{where}: dat.objective.grad_align={objective.grad_align:g} needs labels: write "
                "dat.data.pseudo_labels, or remove it."
            )
        remedy = "Write dat.data.pseudo_labels='runs/natural' (a model that labels them)"
        if not uses_unlabelled(objective.name):
            problems.append(
                f"{where}: dat.objective.name={objective.name!r} has no use for images without "
                f"labels. {remedy}, or dat.objective.name='trades', or leave them out "
                "(dat.data.drop_unlabelled=true)."
            )
        elif attack.name in ("apgd", "fat") or attack.loss not in (None, "kl"):
            problems.append(
                f"{where}: dat.attack.name={attack.name!r} with loss {attack.loss!r} needs labels. "
                f"{remedy}, or dat.attack.name='pgd' with dat.attack.loss='kl'."
            )


def _starts_at_random(attack: AttackConfig) -> bool:
    return attack.name in ("fgsm_rs", "n_fgsm") or bool(attack.random_start)


def _check_other_norms(other_norms: dict[str, Any] | None, norm: str, problems: list[str]) -> None:
    example = "write such as {'l2': 0.5, 'l1': 12}"
    if not other_norms:
        problems.append(f"dat.attack.other_norms={other_norms!r} names no further norm: {example}.")
        return
    for other, eps in other_norms.items():
        path = f"dat.attack.other_norms.{other}={eps!r}"
        if other not in NORMS or other == norm:
            others = [n for n in NORMS if n != norm]
            problems.append(f"{path}: the further norms are {', '.join(others)}; {example}.")
            continue
        try:
            ThreatModel(other, parse_length(eps))  # type: ignore[arg-type]
        except ValueError as error:
            problems.append(f"{path}: {error}")


def _resolve_objective(dat: DatConfig, problems: list[str]) -> ObjectiveConfig:
    """Write out the objective's defaults; refuse keys that it does not take."""
    objective = dat.objective
    taken = objective_options(objective.name)
    for key in _OBJECTIVE_OPTIONS:
        value = getattr(objective, key)
        if value is not None and key not in taken:
            problems.append(
                f"dat.objective.{key}={value!r} is no setting of the objective "
                f"{objective.name!r}: remove it. It takes {', '.join(taken) or 'none'}."
            )
    without_attack = ("at", "dat", "rotation", "contrastive")
    if dat.attack.name == "none" and objective.name not in without_attack:
        problems.append(
            f"dat.objective.name={objective.name!r} compares natural and adversarial images, but "
            "dat.attack.name='none' makes none: write dat.objective.name='at', or an attack."
        )
    if objective.grad_align and dat.attack.name == "none":
        problems.append(
            f"dat.objective.grad_align={objective.grad_align:g} regularises adversarial training, "
            "but dat.attack.name='none' has no attack: remove it."
        )
    if objective.grad_align and dat.model.activation_checkpointing == "reentrant":
        problems.append(
            f"dat.objective.grad_align={objective.grad_align:g} with "
            "dat.model.activation_checkpointing='reentrant', which refuses plain input gradients: "
            "write 'non_reentrant'."
        )
    is_hat = objective.name == "hat"
    if is_hat != (objective.helper_model is not None):
        problems.append(
            "dat.objective.helper_model is missing: 'hat' needs the run folder or checkpoint of a "
            "naturally trained model (train one with dat.attack.name='none')."
            if is_hat
            else f"dat.objective.helper_model={objective.helper_model!r} belongs to the objective "
            "'hat': remove it."
        )
    chosen = {key: value for key, value in taken.items() if getattr(objective, key) is None}
    if dat.attack.name == "none" and objective.name == "contrastive":
        # Both terms would be the same one.
        chosen.update({"natural_weight": 0.0} if objective.natural_weight is None else {})
    return dataclasses.replace(objective, **chosen)


def _check_self_supervision(dat: DatConfig, problems: list[str]) -> None:
    """Refuse what a self-supervised objective has no use for, and its losses elsewhere."""
    objective, attack = OBJECTIVES[dat.objective.name], dat.attack
    path = f"dat.objective.name={objective.name!r}"
    if attack.loss in FEATURE_LOSSES and attack.loss != objective.default_attack_loss:
        owner = next(o.name for o in OBJECTIVES.values() if o.default_attack_loss == attack.loss)
        problems.append(
            f"dat.attack.loss={attack.loss!r} belongs to dat.objective.name={owner!r}, not "
            f"{objective.name!r}: remove it."
        )
    if objective.head == "classes":
        return
    if dat.model.num_classes is not None:
        problems.append(
            f"dat.model.num_classes={dat.model.num_classes} with {path}, which learns no classes: "
            "remove it. They come with fine-tuning."
        )
    if dat.evaluation.natural_twin:
        problems.append(
            f"dat.evaluation.natural_twin=true with {path}: a natural twin learns classes, and "
            "does not compare with it. Remove it."
        )
    for key, value, default in (
        ("data.mixup", dat.data.mixup, 0.0),
        ("data.cutmix", dat.data.cutmix, 0.0),
        ("data.pseudo_labels", dat.data.pseudo_labels, None),
        ("objective.unlabelled_weight", dat.objective.unlabelled_weight, 1.0),
    ):
        if value != default:
            problems.append(
                f"dat.{key}={value!r} concerns labels, which {path} does not read: remove it."
            )
    if objective.classifies:
        return
    if attack.loss not in (None, *FEATURE_LOSSES):
        problems.append(
            f"dat.attack.loss={attack.loss!r} is a loss of class logits, which {path} does not "
            f"have: remove it, and the attack maximises {objective.default_attack_loss!r}."
        )
    if dat.objective.grad_align:
        problems.append(
            f"dat.objective.grad_align={dat.objective.grad_align:g} aligns gradients of the "
            f"classes' cross-entropy, which {path} does not have: remove it."
        )
    if dat.guard.action != "none":
        problems.append(
            f"dat.guard.action={dat.guard.action!r} compares accuracies, which {path} does not "
            "have: remove it."
        )
    averages = attack.name == "multi_norm" and attack.combine == "average"
    if attack.name in ("apgd", "fat") or (attack.name == "multi_norm" and not averages):
        problems.append(
            f"dat.attack.name={attack.name!r} looks at which images are misclassified, and {path} "
            "knows no classes: write dat.attack.name='pgd'"
            + ("." if attack.name != "multi_norm" else " or dat.attack.combine='average'.")
        )
    elif averages and objective.compares_samples:
        problems.append(
            f"dat.attack.name='multi_norm' with {path}: images of one ball would be compared with "
            "their own copies in the others. Write dat.attack.name='pgd'."
        )
    if attack.name == "free" and objective.compares_samples:
        problems.append(
            f"dat.attack.name='free' with {path}: every step sees other views, to which the "
            "perturbation of the last one does not fit. Write dat.attack.name='pgd'."
        )
    if attack.restarts not in (None, 1):
        problems.append(
            f"dat.attack.restarts={attack.restarts} keeps the worst of several runs, a "
            f"misclassified image first, and {path} knows no classes: remove it."
        )
    for name in dict.fromkeys((*dat.evaluation.attacks, dat.evaluation.validation_attack)):
        try:
            chosen = parse_evaluation_attack(name)
        except ValueError:
            continue  # reported already
        if chosen.method != "pgd" or chosen.restarts > 1:
            problems.append(
                f"dat.evaluation: {name!r} looks for misclassified images, and {path} knows no "
                f"classes: write 'pgd-{chosen.steps}'."
            )


def _resolve_weight_perturbation(dat: DatConfig, problems: list[str]) -> WeightPerturbationConfig:
    perturbation = dat.weight_perturbation
    if perturbation.name == "none":
        return perturbation
    if dat.attack.name == "none" and perturbation.name == "awp":
        problems.append(
            "dat.weight_perturbation.name='awp' perturbs weights against adversarial images, but "
            "dat.attack.name='none' makes none: write 'sam', or an attack."
        )
    if dat.model.activation_checkpointing == "reentrant":
        problems.append(
            f"dat.weight_perturbation.name={perturbation.name!r} with "
            "dat.model.activation_checkpointing='reentrant': its gradient cannot be taken apart "
            "from the update's. Write 'non_reentrant'."
        )
    radius = perturbation.radius
    if radius is None:
        radius = 0.005 if perturbation.name == "awp" else 0.05
    return dataclasses.replace(perturbation, radius=radius)


def _resolve_guard(dat: DatConfig, problems: list[str]) -> GuardConfig:
    action, attack = dat.guard.action, dat.attack.name
    has_probe = attack not in ("none", "multi_norm", "free")
    if not has_probe and action not in (None, "none"):
        problems.append(
            f"dat.guard.action={action!r} compares the training attack with a stronger one in the "
            f"same ball, which dat.attack.name={attack!r} does not allow: remove it."
        )
    if action is None:
        has_probe &= OBJECTIVES[dat.objective.name].classifies
        single_step = has_probe and ("steps" not in attack_options(attack) or dat.attack.steps == 1)
        action = "rollback" if single_step else "none"
    return dataclasses.replace(dat.guard, action=action)


def _resolve_our_optimizer(dat: DatConfig, problems: list[str]) -> OptimizerConfig | None:
    """Write out the optimizer's defaults; refuse keys that it does not take."""
    optimizer = dat.optimizer
    if optimizer is None:
        return None
    taken = optimizer_options(optimizer.name, optimizer.preset)
    refused = len(problems)
    for field in dataclasses.fields(optimizer):
        key, value = field.name, getattr(optimizer, field.name)
        if key != "name" and value is not None and key not in taken:
            problems.append(
                f"dat.optimizer.{key}={value!r} is no setting of the optimizer "
                f"{optimizer.name!r}: remove it. It takes {', '.join(taken)}."
            )
    chosen = {key: value for key, value in taken.items() if getattr(optimizer, key) is None}
    optimizer = dataclasses.replace(optimizer, **chosen)
    if len(problems) == refused:
        try:
            build_optimizer(nn.Linear(1, 1), dataclasses.asdict(optimizer))
        except ValueError as error:
            problems.append(f"dat.optimizer: {error}")
    return optimizer


def _resolve_compression(config: CompressionConfig, problems: list[str]) -> CompressionConfig:
    """Write out the codec's defaults; refuse keys that it does not take, and what cannot work."""
    general = () if config.name == "none" else ("sides", "error_feedback", "bucket_mb")
    options = {} if config.name == "none" else codec_options(config.name)
    for field in dataclasses.fields(config):
        key, value = field.name, getattr(config, field.name)
        if key == "name" or value is None or key in options or key in general:
            continue
        takes = f"It takes {', '.join([*options, *general])}." if general else "Write a codec."
        problems.append(
            f"dat.compression.{key}={value!r} is no setting of {config.name!r}: remove it. {takes}"
        )
    if config.name == "none":
        return config
    chosen = {key: value for key, value in options.items() if getattr(config, key) is None}
    unbiased = CODECS[config.name].unbiased
    if config.error_feedback is None:
        chosen["error_feedback"] = not unbiased
    if config.bucket_mb is None:
        chosen["bucket_mb"] = 8.0
    config = dataclasses.replace(config, **chosen)
    _check_error_feedback(config, list(options), problems)
    return config


def _check_error_feedback(
    config: CompressionConfig, options: list[str], problems: list[str]
) -> None:
    if not CODECS[config.name].unbiased and not config.error_feedback:
        problems.append(
            f"dat.compression.error_feedback=false: {config.name!r} is biased, and training with "
            "what it leaves out stalls or diverges. Remove it."
        )
    values = {key: getattr(config, key) or None for key in options}
    try:
        bound = build_codec(config.name, **values).variance_bound(2**20)
    except ValueError:
        return  # a value out of range, reported already
    if CODECS[config.name].unbiased and config.error_feedback and bound >= 1:
        problems.append(
            f"dat.compression.error_feedback=true: what {config.name!r} loses may be longer than "
            f"the gradient (squared, up to {bound:g} times) and would grow from step to step. "
            "Remove it, or give more levels or smaller blocks."
        )


def check_num_classes(dat: DatConfig, num_classes: int, problems: list[str]) -> None:
    """Refuse losses that need more classes than there are.

    Args:
        dat: A resolved section.
        num_classes: Classes of the model.
        problems: Receives one message per problem found.
    """
    needed = MIN_CLASSES.get(dat.attack.loss or "", 0)
    if num_classes < needed:
        problems.append(
            f"dat.attack.loss={dat.attack.loss!r} compares the {needed} largest logits, but there "
            f"are {num_classes} classes: write dat.attack.loss='ce' or 'cw'."
        )
    for name in (*dat.evaluation.attacks, dat.evaluation.validation_attack):
        try:
            few = num_classes < parse_evaluation_attack(name).needed_classes
        except ValueError:
            continue  # reported already
        if few:
            problems.append(
                f"dat.evaluation: {name!r} compares the largest logits, but there are "
                f"{num_classes} classes: write 'apgd-ce-100' or 'pgd-100-10'."
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
    _take_automatic_freeze(config)
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
    _check_precision(config, problems)
    check_attack_passes(dat.attack, config, dat, problems)
    if dat.attack.name != "none":
        accumulation = config.get("gradient_accumulation_steps")
        objective = OBJECTIVES[dat.objective.name]
        check_attack_batch(dat.attack.name, objective, accumulation, dat, problems)
    if dat.objective.grad_align and precision_of(config) == "fp16":
        problems.append(
            f"dat.objective.grad_align={dat.objective.grad_align:g} with fp16.enabled: it needs "
            "the length of input gradients, which underflow there. Write bf16 or torch_autocast."
        )
    _resolve_optimizer(config, dat, stage, client_optimizer, problems)
    if dat.compression.name != "none":
        _resolve_reductions(config, dat, stage, problems)
    return config


class AttackPasses(Protocol):
    """How an attack calls the model: an ``AttackConfig``, or an ``Attack``."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def precision(self) -> str | None: ...  # noqa: D102
    @property
    def fold_batch_norm(self) -> bool: ...  # noqa: D102
    @property
    def keep_tokens(self) -> float | None: ...  # noqa: D102


def check_attack_passes(
    attack: AttackPasses, config: Mapping[str, Any], dat: DatConfig, problems: list[str]
) -> None:
    """Refuse ways of calling the model that the rest of the run cannot go along with.

    Args:
        attack: The run's, from its config or given to ``initialize``.
        config: DeepSpeed's part.
        dat: Ours.
        problems: What is wrong is appended.
    """
    zero = config.get("zero_optimization")
    is_sharded = isinstance(zero, Mapping) and zero.get("stage") == 3
    if attack.fold_batch_norm and is_sharded:
        problems.append(
            "dat.attack.fold_batch_norm=true with zero_optimization.stage=3, under which weights "
            "are not there before the forward: remove one of them."
        )
    if attack.precision is not None and precision_of(config) in ("bf16", "fp16"):
        problems.append(
            f"dat.attack.precision={attack.precision!r} with {precision_of(config)}.enabled: "
            "the whole model has that precision, the attack too. Remove one of them."
        )
    compiled = dat.engine.compile
    changing = {
        "dat.attack.keep_tokens": attack.keep_tokens is not None,
        "dat.attack.fold_batch_norm": attack.fold_batch_norm,
        "dat.attack.precision": attack.precision in FORMATS,
        "dat.model.activation_checkpointing": dat.model.activation_checkpointing == "reentrant",
        "dat.objective.batch_norm": compiled == "all" and dat.objective.batch_norm == "split",
    }
    problems += [
        f"dat.engine.compile={compiled!r} with {key}, which changes the model from call to call: "
        "remove one of them."
        for key, is_given in changing.items()
        if is_given and compiled != "none"
    ]
    if not dat.engine.cuda_graphs:
        return
    autocast = config["torch_autocast"] if _enabled(config, "torch_autocast") else {}
    of_host = "leaves decisions to the host"
    saves = "saves and restores random states in every pass"
    reasons = {
        "zero_optimization.stage=3": (is_sharded, "gathers parameters into other memory"),
        "dat.attack.model_mode='train'": (
            dat.attack.model_mode == "train",
            "gives the model other buffers in every attack",
        ),
        f"the attack {attack.name!r}": (attack.name in ("fat", "free"), of_host),
        "the attack's precision 'fp16'": (attack.precision == "fp16", of_host),
        "fp16.enabled": (precision_of(config) == "fp16", of_host),
        "torch_autocast.dtype='float16'": (autocast.get("dtype") in _FLOAT16, of_host),
        f"dat.model.activation_checkpointing={dat.model.activation_checkpointing!r}": (
            dat.model.activation_checkpointing != "none",
            saves,
        ),
    }
    problems += [
        f"dat.engine.cuda_graphs=true with {what}, which {reason}: remove one of them."
        for what, (is_given, reason) in reasons.items()
        if is_given
    ]


def check_attack_batch(
    attack: str,
    objective: Objective | type[Objective],
    accumulation: object,
    dat: DatConfig,
    problems: list[str],
) -> None:
    """Refuse to attack several micro-batches as one where it would be another attack.

    Args:
        attack: Name of the run's attack, from its config or given to ``initialize``.
        objective: The run's objective, likewise.
        accumulation: Micro-steps per optimizer step; anything but an integer is not known yet.
        dat: Our section.
        problems: What is wrong is appended.
    """
    size = dat.engine.attack_micro_batches
    if size == 1:
        return
    words = f"dat.engine.attack_micro_batches={size}"
    if isinstance(accumulation, int) and accumulation % size:
        valid = [str(n) for n in range(1, accumulation + 1) if accumulation % n == 0]
        problems.append(
            f"{words} does not divide gradient_accumulation_steps={accumulation}: write "
            f"{', '.join(valid)}, or accumulate over another number of micro-batches."
        )
    reasons = {
        "the attack 'free', which is the training step itself": attack == "free",
        "dat.attack.model_mode='train', whose BatchNorm and dropout go by the batch": (
            dat.attack.model_mode == "train"
        ),
        f"the objective {objective.name!r}, which compares the images of a batch": (
            objective.compares_samples
        ),
    }
    problems += [
        f"{words} with {what}: remove one of them."
        for what, is_given in reasons.items()
        if is_given
    ]


def _resolve_reductions(
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
        "compile.deepcompile": bool((config.get("compile") or {}).get("deepcompile")),
    }
    if stage in (1, 2):
        refused["zero_optimization.reduce_scatter"] = zero.get("reduce_scatter") is True
        refused["zero_optimization.contiguous_gradients"] = not zero.get(
            "contiguous_gradients", True
        )
        zero["reduce_scatter"] = False
    elif stage == 3:
        refused["zero_optimization.reduce_scatter"] = not zero.get("reduce_scatter", True)
        if dat.compression.sides == "double":
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


def _check_objects(config: dict[str, Any], problems: list[str]) -> None:
    for key, example in _SECTIONS.items():
        value = config.get(key, {})
        if not isinstance(value, dict):
            problems.append(f'{key}={value!r} must be an object, such as "{key}": {example}.')


def _take_automatic_freeze(config: dict[str, Any]) -> None:
    """Write ``freeze_step: "auto"``, which is ours and not Hugging Face's, as null."""
    section = config.get("optimizer")
    params = section.get("params") if isinstance(section, dict) else None
    if isinstance(params, dict) and one_bit_name(config) and params.get("freeze_step") == "auto":
        params["freeze_step"] = None


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


def _check_precision(config: dict[str, Any], problems: list[str]) -> None:
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
    if dat.schedule.scaling != "none":
        scaling = f"dat.schedule.scaling={dat.schedule.scaling!r}"
        if client_optimizer:
            problems.append(f"{scaling} with initialize(optimizer=...): scale its own lr instead.")
        elif isinstance(section, dict) and "lr" not in section.get("params", {}):
            problems.append(f"{scaling} has no learning rate to scale: write optimizer.params.lr.")
    if dat.optimizer is not None and dat.optimizer.name in PRESETS:
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
                if name in PRESETS
                else "write stage 0, or 'AdamW' or 'SGD'."
            )
        )
    elif stage > 0 and name not in ADAM_NAMES:
        # Element-wise ones work on any slice (the parity tests run SGD under every stage).
        config.setdefault("zero_allow_untested_optimizer", True)


def one_bit_name(config: Mapping[str, Any], dat: DatConfig | None = None) -> str | None:
    """Our name of the optimizer with compressed communication that a run has, if it has one."""
    section = config.get("optimizer")
    kind = str(section.get("type", "")).lower() if isinstance(section, Mapping) else ""
    if kind in ONE_BIT_OPTIMIZERS:
        return ONE_BIT_OPTIMIZERS[kind][0]
    optimizer = None if dat is None else dat.optimizer
    is_ours = optimizer is not None and _is_compressed(optimizer.name)
    return optimizer.name if optimizer is not None and is_ours else None


def _is_compressed(name: str) -> bool:
    kind = OPTIMIZERS[name]
    return isinstance(kind, type) and issubclass(kind, CompressedOptimizer)


def one_bit_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ours from DeepSpeed's section, of a resolved run that has such a one."""
    params = config["optimizer"]["params"]
    return {key: value for key, value in params.items() if key not in NOT_READ}


def _check_one_bit_params(kind: str, params: dict[str, Any], problems: list[str]) -> None:
    """Check the parameters of DeepSpeed's section for an optimizer that is ours now."""
    name = ONE_BIT_OPTIMIZERS[kind.lower()][0]
    taken = [*optimizer_options(name), *NOT_READ]
    for key in sorted(set(params) - set(taken)):
        if key == "max_grad_norm":
            problems.append(
                f"optimizer.params.max_grad_norm={params[key]!r} is refused, as DeepSpeed does: "
                f'write "gradient_clipping": {params[key]!r} at the top level.'
            )
            continue
        problems.append(
            f"optimizer.params.{key}={params[key]!r} is no parameter of {kind!r}"
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
    known = {key: value for key, value in params.items() if key in optimizer_options(name)}
    so_far = len(problems)
    parse_section(OptimizerConfig, {"name": name, **known}, "optimizer.params", problems)
    if len(problems) == so_far:
        try:
            OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **known)
        except ValueError as error:
            problems.append(f"optimizer.params.{error}")


def check_one_bit(config: Mapping[str, Any], dat: DatConfig, problems: list[str]) -> None:
    """Refuse what cannot be combined with an optimizer with compressed communication.

    Args:
        config: DeepSpeed's part of a config with such an optimizer.
        dat: Our section.
        problems: Receives one message per problem found.
    """
    stage = config["zero_optimization"]["stage"]
    if stage:
        problems.append(
            f"zero_optimization.stage={stage} with an optimizer that compresses its momentum: "
            "every rank needs its own gradient of the whole model, and the errors of compression "
            "are as large as the shards would save. Write zero_optimization.stage=0, or another "
            "optimizer."
        )
    if _enabled(config, "torch_autocast") and config["torch_autocast"]["dtype"] in _FLOAT16:
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
    """What a resolved config does that its words do not say, to be said once."""
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
    """Refuse what cannot be combined with trust ratios of whole layers.

    Args:
        config: DeepSpeed's part of a config with an optimizer such as ours by the name of LAMB.
        problems: Receives one message per problem found.
    """
    zero = config["zero_optimization"]
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
        f"{key} with a layer-wise optimizer: its trust ratios need all shards of a step before any "
        f"is updated, but this moves them one by one. Instead, {remedy}."
        for key, remedy in found.items()
    ]


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


def scale_learning_rate(run: RunConfig, global_batch: int) -> tuple[RunConfig, str]:
    """Scale the learning rate to the global batch, as ``dat.schedule.scaling`` says.

    Args:
        run: A resolved run; the learning rate is our optimizer's or DeepSpeed's.
        global_batch: Images per optimizer step.

    Returns:
        The run to build the optimizer from, and what was done, in words; none where nothing was.
    """
    schedule = run.dat.schedule
    if schedule.scaling == "none":
        return run, ""
    assert schedule.base_batch is not None
    factor = lr_scale(schedule.scaling, global_batch, schedule.base_batch)
    config, ours = copy.deepcopy(run.deepspeed), run.dat.optimizer
    if ours is not None:
        assert ours.lr is not None
        lr = ours.lr
        ours = dataclasses.replace(ours, lr=lr * factor)
    else:
        params = config["optimizer"]["params"]
        lr = params["lr"]
        for key in ("lr", "muon_lr", "adam_lr"):
            if key in params:
                params[key] *= factor
    words = (
        f"Learning rate {lr * factor:.6g} = {lr:g} x {factor:.4g}, scaled "
        f"({schedule.scaling}) from a global batch of {schedule.base_batch} to {global_batch}."
    )
    dat = dataclasses.replace(run.dat, optimizer=ours)
    return dataclasses.replace(run, deepspeed=config, dat=dat), words


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
