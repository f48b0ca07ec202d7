"""``dat_ds.initialize``: what ``deepspeed.initialize`` is, for adversarial training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import ConcatDataset, Dataset, Subset

from dat_ds.assembly import build_loader, build_schedule
from dat_ds.attacks import Attack, CallableAttack, UserAttack, build_attack, misfits
from dat_ds.config import (
    DatConfig,
    RunConfig,
    adapt_to_device,
    attack_of,
    check_layerwise,
    check_one_bit,
    counts_traffic,
    load_config,
    one_bit_name,
    one_bit_options,
    resolve_batch,
    scale_learning_rate,
    threat_of,
    without_monitors,
)
from dat_ds.data import CollateFunction, Loader
from dat_ds.data.transforms import KeyedDataset
from dat_ds.engine import hooks
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.deepspeed_part import REFUSALS, check_deepspeed
from dat_ds.engine.launch import setup_ranks
from dat_ds.engine.monitor import Monitor
from dat_ds.engine.validate import (
    attack_problems,
    check_compiled,
    check_precision,
)
from dat_ds.errors import ConfigError, UserError
from dat_ds.finetuning.plan import prepare
from dat_ds.method import Section, shown
from dat_ds.minmax import frozen_copy, settle
from dat_ds.models import PixelModel, load
from dat_ds.objectives import Objective
from dat_ds.optim import (
    OPTIMIZERS,
    CompressedOptimizer,
    LayerwiseOptimizer,
    ParameterOptions,
    split_groups,
    usual_scaling,
)
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")


def initialize(
    *,
    model: nn.Module,
    config: str | Path | Mapping[str, Any] | RunConfig,
    training_data: Dataset[Any] | None = None,
    collate_fn: CollateFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    attack: Attack | UserAttack | str | Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    ranks: Ranks | None = None,
) -> tuple[AdversarialEngine, torch.optim.Optimizer, Loader | None, LRScheduler | None]:
    """Set up adversarial training of ``model`` under DeepSpeed.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``; normalisation is inside it.
            Every rank passes the same weights (or rank 0's are broadcast by DeepSpeed).
        config: Path or content of a DeepSpeed JSON with our ``"dat"`` section.
        training_data: Dataset of ``(image, label)`` or of dicts; images are tensors, arrays or PIL
            images (:class:`dat_ds.data.samples.Collator`). Gives a loader that cuts every epoch
            into global batches, and the schedule its length. A stream (``IterableDataset``), which
            every rank reads whole, needs ``dat.schedule.max_steps``.
        collate_fn: A function from a list of samples to ``(x, y)``, ``x`` pixels
            ``(B, C, H, W)``; None stacks samples. It is called with one sample beforehand.
        optimizer: A torch optimizer over the model's parameters, instead of the config's.
        attack: Instead of ``dat.attack``: a name, such as ``"fgsm"``, or its keys as in JSON, such
            as ``{"name": "pgd", "steps": 3}``; an attack; or a function
            ``(model, x, y, generator) -> x_adv``, which gets a frozen model and does the same
            number of forwards on every rank.
        objective: A subclass of :class:`dat_ds.objectives.Objective`, instead of
            ``dat.objective``.
        ranks: The processes of the run; None sets them up from the launcher's environment.

    Returns:
        ``(engine, optimizer, loader, scheduler)``; loader and scheduler are None without
        ``training_data``, and then the learning rate stays at its peak unless
        ``dat.schedule.max_steps`` gives the run a length.

    Raises:
        ConfigError: With all problems of the config.
        DataError: For training data that give no batches; on all ranks.
    """
    ranks = setup_ranks() if ranks is None else ranks
    run = adapt_to_device(
        load_config(config, client_optimizer=optimizer is not None), ranks.device.type
    )
    check_deepspeed(run.deepspeed)
    micro_batch, accumulation = resolve_batch(run.deepspeed, ranks.count)
    check_precision(model, run)
    check_compiled(model, run)
    if ranks.is_main:
        for note in run.notes:
            logger.info("Note: %s", note)
        _warn_of_unread_keys(run.dat, model, training_data)
    objective = run.dat.objective if objective is None else objective
    problems: list[str] = []
    if collate_fn is not None and training_data is None:
        problems.append("collate_fn makes batches of training_data: pass both, or neither.")
    attack = attack_of(run.dat, objective) if attack is None else _own_attack(attack, run, problems)
    if attack is not None:
        problems += attack_problems(attack, objective, run, accumulation) + misfits(attack, model)
    if problems:
        raise ConfigError("\n".join(problems))
    helper = None
    helper_model = getattr(run.dat.objective, "helper_model", None)
    if helper_model is not None:
        with ranks.together():
            helper = load(helper_model, map_location=ranks.device)
    if objective.compares_samples and micro_batch < 2:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu={micro_batch}: dat.objective.name={objective.name!r} "
            "compares the images of a batch, in the attack those of a rank. Write at least 2."
        )
    reference = None
    if objective.needs_reference:
        remedy = "build it without deepspeed.zero.Init."
        reference = frozen_copy(model, run.dat.objective.name, remedy=remedy)
    options = prepare(model, run.dat.finetuning, seed=run.dat.seed)
    loader = None
    if training_data is not None:
        with ranks.together():
            loader = build_loader(
                training_data,
                run.dat,
                ranks,
                micro_batch,
                accumulation,
                replays=1 if attack is None else attack.strategy().replays,
                collate_fn=collate_fn,
            )
    schedule = build_schedule(run.dat, None if loader is None else loader.steps_per_epoch)
    if schedule is None:
        _refuse_shares_of_the_run(run.dat)
    global_batch = micro_batch * accumulation * ranks.count
    scaled, words = scale_learning_rate(run, global_batch)
    if words and ranks.is_main:
        logger.info("%s", words)
        _warn_of_unusual_scaling(run)
    is_tested = optimizer is None or isinstance(
        optimizer, (LayerwiseOptimizer, CompressedOptimizer)
    )
    if optimizer is None:
        optimizer = _optimizer_of(model, scaled, options)
    settings = _deepspeeds(scaled)
    settings.update(
        train_batch_size=global_batch,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
    )
    _check_optimizer(optimizer, run)
    ours = optimizer
    if isinstance(ours, LayerwiseOptimizer):
        ours.await_layout()
    averaging = ours if isinstance(ours, CompressedOptimizer) else None
    if averaging is not None:
        settings.pop("optimizer", None)
        if ranks.is_main and schedule is not None:
            _warn_of_late_freeze(averaging, schedule.total_steps)
    monitor = Monitor(run, ranks, global_batch=global_batch)
    with (
        contextlib.nullcontext() if averaging is None else averaging.paused(),
        hooks.tested_optimizer() if is_tested else contextlib.nullcontext(),
        _refusals_told(settings),
    ):
        engine, optimizer, _, scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=_parameters_of(model, scaled, options),
            lr_scheduler=None if schedule is None else schedule.scheduler,
            config=settings,
            dist_init_required=False,
        )
    if reference is not None:
        settle(reference, engine.module, ranks.device)
    if isinstance(ours, LayerwiseOptimizer):
        hooks.attach_layers(engine, ours)
    if averaging is not None:
        hooks.skip_huge_gradients_together(engine)
    adversarial = AdversarialEngine(
        engine,
        run=run,
        ranks=ranks,
        attack=attack,
        objective=objective,
        total_steps=None if schedule is None else schedule.total_steps,
        helper=helper,
        reference=reference,
        loader=loader,
        averaging_optimizer=averaging,
        monitor=monitor,
    )
    return adversarial, optimizer, loader, scheduler


@contextlib.contextmanager
def _refusals_told(settings: Mapping[str, Any]) -> Iterator[None]:
    """Turn what DeepSpeed raises while it starts into a :class:`ConfigError`.

    Its config is checked by then; what is left depends on the model and the machine.
    """
    try:
        yield
    except UserError:
        raise
    except REFUSALS as error:
        logger.debug("DeepSpeed does not start.", exc_info=True)
        kept = ("optimizer", "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
        shown = {key: settings[key] for key in kept if settings.get(key)}
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"DeepSpeed does not start with this model, on this machine, and {shown}: "
            f"{type(error).__name__}: {reason}."
        ) from error


def _deepspeeds(run: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own settings, without what would cost time in every pass of an attack."""
    settings = copy.deepcopy(without_monitors(run.deepspeed))
    # Its throughput waits for the device before every forward, and knows of no attack.
    settings["timers"] = {"throughput": {"enabled": False}}
    if not counts_traffic(run.deepspeed):
        settings.pop("comms_logger", None)  # DeepSpeed takes the section itself for a yes
    return settings


def _own_attack(
    attack: Attack | UserAttack | str | Mapping[str, Any], run: RunConfig, problems: list[str]
) -> Attack:
    """An attack that was given to :func:`initialize`; what is wrong with that is appended."""
    if run.dat.attack.precision is not None:
        problems.append(
            f"dat.attack.precision={run.dat.attack.precision!r} with an attack given to "
            "initialize, which brings its own: remove it, or build_attack({..., 'precision': ...})."
        )
    if isinstance(attack, (str, Mapping)):
        keys = {"name": attack} if isinstance(attack, str) else attack
        return build_attack({"threat_model": threat_of(run.dat), **keys})
    if isinstance(attack, Attack):
        return attack
    return CallableAttack(threat=threat_of(run.dat), user_function=attack)


def _optimizer_of(
    model: nn.Module, run: RunConfig, options: Mapping[Tensor, ParameterOptions]
) -> torch.optim.Optimizer | None:
    """The run's optimizer where it is ours; None where DeepSpeed builds it."""
    if run.dat.optimizer is not None:
        try:
            return run.dat.optimizer.build(model, options)
        except ValueError as error:  # what only the model can tell
            raise ConfigError(f"dat.optimizer: {error}") from None
    name = one_bit_name(run.deepspeed)
    if name is None:
        return None
    method = OPTIMIZERS[name](**one_bit_options(run.deepspeed))
    parameters = _parameters_of(model, run, options)
    return method.optimizer(parameters if options else [{"params": parameters}])


def _parameters_of(
    model: nn.Module, run: RunConfig, options: Mapping[Tensor, ParameterOptions]
) -> list[Any]:
    """What DeepSpeed's own section optimises: one group, all of it decayed, or parts of it."""
    params = [p for p in model.parameters() if p.requires_grad]
    section = run.deepspeed.get("optimizer")
    if not options or section is None:
        return params
    return split_groups([{"params": params}], options, lambda group: section["params"]["lr"])


def _check_optimizer(optimizer: torch.optim.Optimizer | None, run: RunConfig) -> None:
    """Refuse what cannot be combined with an optimizer of ours, also with a caller's own."""
    problems: list[str] = []
    if isinstance(optimizer, LayerwiseOptimizer):
        check_layerwise(run.deepspeed, problems)
    if isinstance(optimizer, CompressedOptimizer):
        check_one_bit(run.deepspeed, run.dat, problems)
    if problems:
        raise ConfigError("\n".join(problems))


# What changes the images and weights that a run builds for itself.
_OF_BUILT_DATA = (
    *("augment", "rand_augment", "trivial_augment", "color_jitter", "random_erasing"),
    *("mixup", "cutmix", "progressive_from", "img_size", "extra", "pseudo_labels", "damaged"),
)
_OF_BUILT_MODEL = ("pretrained", "activation_checkpointing", "stem")


def _warn_of_unread_keys(
    dat: DatConfig, model: nn.Module, training_data: Dataset[Any] | None
) -> None:
    """Name the keys that have no effect on a model and data of the user's own."""
    while isinstance(training_data, Subset):
        training_data = training_data.dataset
    if training_data is not None and not isinstance(training_data, KeyedDataset | ConcatDataset):
        remedy = "training_data, which is passed: make it by dat_ds.data.build_data"
        _warn_of_effect("data", dat.data, _OF_BUILT_DATA, remedy)
    if not any(isinstance(module, PixelModel) for module in model.modules()):
        remedy = "the model, which is passed: make it by dat_ds.models.build_model"
        _warn_of_effect("model", dat.model, _OF_BUILT_MODEL, remedy)


def _warn_of_effect(name: str, section: Section, keys: tuple[str, ...], remedy: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    given = [
        f"dat.{name}.{key}={shown(getattr(section, key))}"
        for key in keys
        if key in defaults and getattr(section, key) != defaults[key]
    ]
    if given:
        logger.warning(
            "%s: no effect on %s, or remove the key%s.",
            ", ".join(given),
            remedy,
            "s"[len(given) == 1 :],
        )


def _warn_of_late_freeze(optimizer: CompressedOptimizer, total_steps: int) -> None:
    if optimizer.earliest_freeze >= total_steps:
        logger.warning(
            "The variance of %s is frozen after step %d at the earliest, and the run has %d: "
            "momentum is never compressed. Write a smaller freeze_step (0/1 Adam: var_freeze_step) "
            "or, for the rule that chooses it, a smaller beta2.",
            type(optimizer).__name__,
            optimizer.earliest_freeze,
            total_steps,
        )


def _refuse_shares_of_the_run(dat: DatConfig) -> None:
    """Refuse keys that are shares of a run whose length is unknown."""
    shares = {
        "dat.attack.eps_warmup": dat.attack.eps_warmup,
        "dat.attack.steps_from": getattr(dat.attack, "steps_from", None),
        "dat.weight_perturbation.start": dat.weight_perturbation.start,
    }
    given = [f"{key}={value}" for key, value in shares.items() if value]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} needs the length of the run: pass training_data, or write "
            "dat.schedule.max_steps."
        )


def _warn_of_unusual_scaling(run: RunConfig) -> None:
    ours, scaling = run.dat.optimizer, run.dat.schedule.scaling
    name = run.deepspeed["optimizer"]["type"] if ours is None else ours.name
    usual = usual_scaling(name)
    if usual not in (None, scaling):
        logger.warning(
            "dat.schedule.scaling=%r is unusual for %s, whose learning rate goes by %r.",
            scaling,
            name,
            usual,
        )
