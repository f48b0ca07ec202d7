"""``dat_ds.initialize``: what ``deepspeed.initialize`` is, for adversarial training."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from dat_ds.attacks import Attack, CallableAttack, FreeAttack, UserAttack, patch_tokens
from dat_ds.config import (
    DatConfig,
    RunConfig,
    adapt_to_device,
    attack_of,
    load_config,
    objective_of,
    precision_of,
    resolve_batch,
    threat_of,
)
from dat_ds.data import DistributedLoader
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.distributed import Ranks, setup_ranks
from dat_ds.engine.monitor import MONITOR_KEYS
from dat_ds.engine.validate import check_deepspeed, check_precision
from dat_ds.errors import ConfigError
from dat_ds.models import load
from dat_ds.objectives import Objective
from dat_ds.optim import Schedule, build_optimizer

logger = logging.getLogger("dat_ds")


def initialize(
    *,
    model: nn.Module,
    config: str | Path | Mapping[str, Any] | RunConfig,
    training_data: Dataset[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    attack: Attack | UserAttack | None = None,
    objective: Objective | None = None,
    ranks: Ranks | None = None,
) -> tuple[AdversarialEngine, torch.optim.Optimizer, DistributedLoader | None, LRScheduler | None]:
    """Set up adversarial training of ``model`` under DeepSpeed.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``; normalisation is inside it.
            Every rank passes the same weights (or rank 0's are broadcast by DeepSpeed).
        config: Path or content of a DeepSpeed JSON with our ``"dat"`` section.
        training_data: Dataset of ``(x, y)`` with ``x`` float pixels ``(C, H, W)``. Gives a loader
            that cuts every epoch into global batches, and the schedule its length.
        optimizer: A torch optimizer over the model's parameters, instead of the config's.
        attack: An attack, or a function ``(model, x, y, generator) -> x_adv``, instead of
            ``dat.attack``. A function gets a frozen model and does the same number of forwards on
            every rank.
        objective: A subclass of :class:`dat_ds.objectives.Objective`, instead of
            ``dat.objective``.
        ranks: The processes of the run; None sets them up from the launcher's environment.

    Returns:
        ``(engine, optimizer, loader, scheduler)``; loader and scheduler are None without
        ``training_data``, and then the learning rate stays at its peak unless
        ``dat.schedule.max_steps`` gives the run a length.

    Raises:
        ConfigError: With all problems of the config.
    """
    ranks = setup_ranks() if ranks is None else ranks
    run = adapt_to_device(
        load_config(config, client_optimizer=optimizer is not None), ranks.device.type
    )
    micro_batch, accumulation = resolve_batch(run.deepspeed, ranks.count)
    check_precision(model, run)
    if ranks.is_main:
        for note in run.notes:
            logger.info("Note: %s", note)
    objective = objective_of(run.dat) if objective is None else objective
    if attack is None:
        attack = attack_of(run.dat, objective)
    elif not isinstance(attack, Attack):
        name = getattr(attack, "__name__", "callable")
        attack = CallableAttack(name, threat_of(run.dat), function=attack)
    if attack is not None and attack.keep_tokens is not None and patch_tokens(model) is None:
        raise ConfigError(
            f"dat.attack.keep_tokens={attack.keep_tokens:g} needs a vision transformer: timm's "
            f"VisionTransformer, or Hugging Face's ViT, DeiT or DINOv2, not this model "
            f"({run.dat.model.name}). Remove it, or write dat.attack.resolution."
        )
    helper = None
    if run.dat.objective.helper_model is not None:
        with ranks.together():
            helper = load(run.dat.objective.helper_model, map_location=ranks.device)
    if objective.compares_samples and micro_batch < 2:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu={micro_batch}: dat.objective.name={objective.name!r} "
            "compares the images of a batch, in the attack those of a rank. Write at least 2."
        )
    reference = _frozen_copy(model, run, ranks) if objective.needs_reference else None
    loader = None
    if training_data is not None:
        replays = attack.replays if isinstance(attack, FreeAttack) else 1
        loader = _build_loader(training_data, run.dat, ranks, micro_batch, accumulation, replays)
    schedule = build_schedule(run.dat, None if loader is None else loader.steps_per_epoch)
    if schedule is None:
        _refuse_shares_of_the_run(run.dat)
    if optimizer is None and run.dat.optimizer is not None:
        optimizer = build_optimizer(model, dataclasses.asdict(run.dat.optimizer))
    settings = {k: copy.deepcopy(v) for k, v in run.deepspeed.items() if k not in MONITOR_KEYS}
    settings.update(
        train_batch_size=micro_batch * accumulation * ranks.count,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
    )
    check_deepspeed(run.deepspeed)
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        lr_scheduler=None if schedule is None else schedule.scheduler,
        config=settings,
        dist_init_required=False,
    )
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
    )
    return adversarial, optimizer, loader, scheduler


def _refuse_shares_of_the_run(dat: DatConfig) -> None:
    """Refuse keys that are shares of a run whose length is unknown."""
    shares = {
        "dat.attack.eps_warmup": dat.attack.eps_warmup,
        "dat.attack.steps_from": dat.attack.steps_from,
        "dat.weight_perturbation.start": dat.weight_perturbation.start,
    }
    given = [f"{key}={value}" for key, value in shares.items() if value]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} needs the length of the run: pass training_data, or write "
            "dat.schedule.max_steps."
        )


def _frozen_copy(model: nn.Module, run: RunConfig, ranks: Ranks) -> nn.Module:
    """Rank 0's model as it is now, on every rank's device, in the run's precision."""
    if any(hasattr(p, "ds_status") for p in model.parameters()):
        raise ConfigError(
            f"dat.objective.name={run.dat.objective.name!r} copies the model before training: "
            "build it without deepspeed.zero.Init."
        )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    copied = copy.deepcopy(model).to(ranks.device, dtype=half.get(precision_of(run.deepspeed)))
    for tensor in copied.state_dict().values():
        if ranks.count > 1:
            dist.broadcast(tensor, src=0)
    return copied.requires_grad_(False).eval()


def build_schedule(dat: DatConfig, steps_per_epoch: int | None) -> Schedule | None:
    """The learning-rate schedule of a run; None where its length is unknown."""
    config = dat.schedule
    if steps_per_epoch is None:
        if config.max_steps is None:
            return None
        total, warmup_share = config.max_steps, config.warmup_epochs / config.epochs
        warmup = round(warmup_share * total)
    else:
        total = max(1, math.ceil(config.epochs * steps_per_epoch))
        total = total if config.max_steps is None else min(total, config.max_steps)
        warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    return Schedule(
        config.name,
        total_steps=total,
        warmup_steps=warmup,
        final_ratio=config.final_ratio,
        milestones=tuple(config.milestones),
        decay_factor=config.decay_factor,
    )


def _build_loader(
    data: Dataset[Any],
    dat: DatConfig,
    ranks: Ranks,
    micro_batch: int,
    accumulation: int,
    replays: int,
) -> DistributedLoader:
    pin_memory = dat.data.pin_memory
    return DistributedLoader(
        data,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=ranks.rank,
        ranks=ranks.count,
        seed=dat.seed,
        num_workers=dat.data.num_workers,
        pin_memory=ranks.device.type != "cpu" if pin_memory is None else pin_memory,
        replays=replays,
    )
