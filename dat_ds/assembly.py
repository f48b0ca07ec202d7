"""Builds the parts of a run from its config: data, model, loader, schedule, codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dat_ds.config import DatConfig, RunConfig, check_num_classes, threat_of
from dat_ds.data import (
    CollateFunction,
    DataSplits,
    DistributedLoader,
    Loader,
    StreamLoader,
    is_stream,
    splits_of,
)
from dat_ds.data.samples import refuse_no_dataset
from dat_ds.errors import ConfigError, ModelError
from dat_ds.evaluation import Record, Task, evaluate
from dat_ds.models import PixelModel, build_model, check_takes_images
from dat_ds.optim import Schedule
from dat_ds.ranks import Ranks


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
    return Schedule(config, total_steps=total, warmup_steps=warmup)


def build_loader(
    data: Dataset[Any],
    dat: DatConfig,
    ranks: Ranks,
    micro_batch: int,
    accumulation: int,
    *,
    replays: int = 1,
    collate_fn: CollateFunction | None = None,
) -> Loader:
    """The loader of a run's training data, which hands out each batch ``replays`` times.

    Raises:
        ConfigError: Where the config does not go along with a stream.
        DataError: For data that give no batches.
    """
    refuse_no_dataset(data)
    pin_memory = dat.data.pin_memory
    pin_memory = ranks.device.type != "cpu" if pin_memory is None else pin_memory
    if is_stream(data):
        _check_stream(dat)
        return StreamLoader(
            cast("IterableDataset[Any]", data),
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=ranks.rank,
            ranks=ranks.count,
            in_worker=dat.data.num_workers > 0,
            pin_memory=pin_memory,
            replays=replays,
            collate_fn=collate_fn,
        )
    return DistributedLoader(
        data,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=ranks.rank,
        ranks=ranks.count,
        seed=dat.seed,
        num_workers=dat.data.num_workers,
        pin_memory=pin_memory,
        replays=replays,
        collate_fn=collate_fn,
    )


def _check_stream(dat: DatConfig) -> None:
    problems = []
    if dat.schedule.max_steps is None:
        problems.append(
            "training_data is a stream, whose length is not known: write "
            "dat.schedule.max_steps, the number of optimizer steps of the run."
        )
    if dat.data.num_workers > 1:
        problems.append(
            f"dat.data.num_workers={dat.data.num_workers} with a stream, which one process reads "
            "from its beginning: write 1, or 0 to read it in the training process."
        )
    if problems:
        raise ConfigError("\n".join(problems))


PROJECTION_WIDTH = 128  # Chen et al., ICML 2020, arXiv 2002.05709, sec. 2.1


def build_data_of(run: RunConfig) -> DataSplits:
    """The dataset of a run."""
    return splits_of(run.dat.data, run.dat.seed)


def build_model_of(run: RunConfig, splits: DataSplits, *, on_meta: bool = False) -> PixelModel:
    """The model of a run, for its data; the same weights on every rank.

    Args:
        run: The run.
        splits: Its data.
        on_meta: Build it on the meta device, where it has shapes and no weights.
    """
    if on_meta:
        with torch.device("meta"):
            return _build_model(run, splits, pretrained=None, seed=None)
    return _build_model(run, splits, pretrained=run.dat.model.pretrained, seed=run.dat.seed)


def _build_model(
    run: RunConfig, splits: DataSplits, *, pretrained: str | None, seed: int | None
) -> PixelModel:
    config = run.dat.model
    channels, height, width = splits.image_shape
    _check_fit(run, splits)
    num_outputs = _num_outputs(run, splits)
    # Published weights expect the statistics they were trained with, not those of this data.
    own_statistics = (
        config.mean is not None or config.pretrained is not None or config.name.startswith("hf:")
    )
    model = build_model(
        config.name,
        num_classes=num_outputs,
        in_chans=channels,
        mean=config.mean if own_statistics else splits.mean,
        std=config.std if own_statistics else splits.std,
        img_size=height if height == width else (height, width),
        **config.overrides(),
        head=run.dat.objective.head,
        pretrained=pretrained,
        class_names=splits.class_names if run.dat.objective.head == "classes" else None,
        options=config.options,
        activation_checkpointing=config.activation_checkpointing,
        seed=seed,
    )
    check_takes_images(model, splits.image_shape)
    for side in splits.sides:
        try:
            check_takes_images(model, (channels, side, side))
        except ModelError as error:
            reason = str(error).split(": write ")[0].rstrip(".")
            raise ConfigError(
                f"dat.data.progressive_from={run.dat.data.progressive_from}: {reason}. Write "
                "dat.model.options.dynamic_img_size=true for a vision transformer of timm and a "
                "multiple of its patch as dat.data.progressive_step, or choose a model that takes "
                "any size."
            ) from None
    return model


def _check_fit(run: RunConfig, splits: DataSplits) -> None:
    """Refuse images of other channels, size or classes than ``dat.model`` is written for.

    Raises:
        ConfigError: With all that differ, and the keys to write.
    """
    config = run.dat.model
    channels, height, width = splits.image_shape
    problems = []
    if config.mean is not None and len(config.mean) != channels:
        problems.append(
            f"dat.model.mean={config.mean} is for images of {len(config.mean)} channel(s), and "
            f"those of {splits.name} have {channels}: write as many values into dat.model.mean and "
            "dat.model.std, or null into both for those of the data."
        )
    if config.img_size is not None and {height, width} != {config.img_size}:
        problems.append(
            f"dat.model.img_size={config.img_size}, but the images of {splits.name} have "
            f"{height} x {width} pixels: write dat.data.img_size={config.img_size}, which resizes "
            "them, or leave dat.model.img_size out."
        )
    if config.num_classes is not None and config.num_classes != splits.num_classes:
        more = (
            f"; or, where its images lack some, dat.data.num_classes={config.num_classes}"
            if config.num_classes > splits.num_classes
            else ""
        )
        problems.append(
            f"dat.model.num_classes={config.num_classes}, but {splits.name} has "
            f"{splits.num_classes} classes: write dat.model.num_classes={splits.num_classes} or "
            f"leave it out{more}."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _num_outputs(run: RunConfig, splits: DataSplits) -> int:
    """Outputs that the objective needs of the model, after checking that the data give them."""
    objective, model = run.dat.objective, run.dat.model
    _, height, width = splits.image_shape
    problems: list[str] = []
    num_classes = splits.num_classes  # those of dat.model are as many
    if objective.head == "classes" and num_classes < 2:
        problems.append(
            f"All labels of {splits.name} are 0, and a classifier needs at least two classes: add "
            "images of another one, or write dat.data.num_classes=2 where the data lack it."
        )
    elif objective.head == "classes":
        check_num_classes(run.dat, num_classes, problems)
    if objective.head == "rotation" and height != width:
        problems.append(
            f"dat.objective.name={objective.name!r} turns images by 90 degrees, but those of "
            f"{splits.name} are {height} x {width}: give square ones, with "
            f"dat.data.img_size={height}."
        )
    if objective.needs_reference and model.pretrained is None and not model.name.startswith("hf:"):
        problems.append(
            f"dat.objective.name={objective.name!r} keeps the features that the model starts with, "
            "and those of random weights are worth nothing: give dat.model.pretrained, or a model "
            "'hf:PATH'."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    outputs = {"classes": num_classes, "rotation": 4, "projection": PROJECTION_WIDTH, "features": 0}
    return outputs[objective.head]


def evaluate_model(
    model: Callable[[Tensor], Tensor],
    data: Dataset[Any],
    run: RunConfig,
    ranks: Ranks,
    task: Task | None,
    *,
    attacks: Sequence[str] | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Record:
    """Evaluate a model, sharded over the ranks; a collective.

    What is None is as ``dat.evaluation`` and ``dat.seed`` say.
    """
    config = run.dat.evaluation
    return evaluate(
        model,
        data,
        threat_of(run.dat),
        config.attacks if attacks is None else attacks,
        num_examples=config.num_examples if num_examples is None else num_examples,
        batch_size=config.batch_size if batch_size is None else batch_size,
        seed=run.dat.seed if seed is None else seed,
        device=ranks.device,
        rank=ranks.rank,
        ranks=ranks.count,
        gather=ranks.gather,
        num_workers=run.dat.data.num_workers,
        task=task,
    )
