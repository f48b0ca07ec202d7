"""A whole run: data, model, engine, training, evaluation, record."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from dat_ds.config import (
    RunConfig,
    adapt_to_device,
    check_num_classes,
    objective_of,
    plain,
    threat_of,
)
from dat_ds.config.schema import (
    AttackConfig,
    DataConfig,
    ObjectiveConfig,
    WeightPerturbationConfig,
)
from dat_ds.data import DataSplits, build_data, evaluation_batches
from dat_ds.engine.build import initialize
from dat_ds.engine.checkpoint import REFERENCE, Checkpoints
from dat_ds.engine.distributed import Ranks, setup_ranks
from dat_ds.engine.stopping import StopSignal
from dat_ds.engine.trainer import Trainer
from dat_ds.errors import CheckpointError, ConfigError
from dat_ds.evaluation import (
    Record,
    Task,
    commit,
    describe,
    describe_training,
    draw_examples,
    evaluate,
    hardware,
    task_of,
    versions,
)
from dat_ds.files import write_json
from dat_ds.models import PixelModel, build_model, load
from dat_ds.objectives import OBJECTIVES, rotations

logger = logging.getLogger("dat_ds")

TWIN_FOLDER = "natural_twin"
PROJECTION_WIDTH = 128  # Chen et al., ICML 2020, arXiv 2002.05709, sec. 2.1


def train(run: RunConfig, *, resume: str = "none") -> dict[str, Any] | None:
    """Carry out a run from its config to its ``record.json``.

    Args:
        run: The run.
        resume: ``"none"`` starts anew; ``"auto"`` continues from the newest checkpoint of the
            run's folder, or starts anew where there is none; a path continues from that
            checkpoint or run folder.

    Returns:
        The record, or None where SIGTERM stopped the run, which ``resume="auto"`` continues.

    Raises:
        UserError: For every mistake in what was asked, on all ranks.
    """
    stop = StopSignal()
    with stop.listening():
        return _train(run, resume, stop)


def _train(run: RunConfig, resume: str, stop: StopSignal) -> dict[str, Any] | None:
    ranks = setup_ranks()
    run = adapt_to_device(run, ranks.device.type)
    chosen = ""
    with ranks.together():
        if ranks.is_main:
            chosen = _choose_output(run, resume)
    output = Path(str(ranks.gather(chosen)[0]))
    record = _train_one(run, ranks, output, resume, stop)
    if record is None:
        return None
    twin = None
    if run.dat.evaluation.natural_twin and run.dat.attack.name != "none":
        if ranks.is_main:
            logger.info("Training the natural twin, for comparison.")
        twin_resume = "none" if resume == "none" else "auto"
        twin_output = output / TWIN_FOLDER
        twin = _train_one(natural_twin_of(run), ranks, twin_output, twin_resume, stop)
        if twin is None:
            return None
    with ranks.together():
        if ranks.is_main:
            _draw(run, output, ranks.device, twin is not None)
    if ranks.is_main:
        logger.info("%s", describe(record, twin))
        logger.info("Record: %s", output / "record.json")
    return record


def natural_twin_of(run: RunConfig) -> RunConfig:
    """The same run without its attack."""
    dat = dataclasses.replace(
        run.dat,
        attack=AttackConfig(name="none"),
        objective=ObjectiveConfig(
            natural_weight=0.0, label_smoothing=run.dat.objective.label_smoothing
        ),
        data=_labelled_only(run.dat.data),
        weight_perturbation=WeightPerturbationConfig(),
        evaluation=dataclasses.replace(run.dat.evaluation, natural_twin=False),
    )
    return dataclasses.replace(run, dat=dat, notes=())


def _labelled_only(data: DataConfig) -> DataConfig:
    """The same data without the images that natural training could not use."""
    if not data.has_unlabelled or data.pseudo_labels is not None:
        return data
    hides = data.labelled_fraction < 1
    return dataclasses.replace(
        data, drop_unlabelled=hides, unlabelled_path=None, labelled_repeats=1
    )


def build_data_of(run: RunConfig) -> DataSplits:
    """The dataset of a run."""
    config = run.dat.data
    return build_data(
        config.name,
        path=config.path,
        validation_fraction=config.validation_fraction,
        augment=config.augment,
        img_size=config.img_size,
        num_classes=config.num_classes,
        num_train=config.num_train,
        num_test=config.num_test,
        image_shape=cast("tuple[int, int, int] | None", config.image_shape),
        mixup=config.mixup,
        cutmix=config.cutmix,
        labelled_fraction=config.labelled_fraction,
        drop_unlabelled=config.drop_unlabelled,
        unlabelled_path=config.unlabelled_path,
        labelled_repeats=config.labelled_repeats,
        seed=run.dat.seed,
    )


def build_model_of(run: RunConfig, splits: DataSplits) -> PixelModel:
    """The model of a run, for its data; the same weights on every rank."""
    config = run.dat.model
    channels, height, _ = splits.image_shape
    if config.num_classes is not None and config.num_classes < splits.num_classes:
        raise ConfigError(
            f"dat.model.num_classes={config.num_classes} is less than the {splits.num_classes} "
            f"classes of {splits.name}: leave it out, or give at least {splits.num_classes}."
        )
    if config.img_size not in (None, height):
        raise ConfigError(
            f"dat.model.img_size={config.img_size}, but the images have {height} pixels: leave it "
            f"out, or resize the images with dat.data.img_size={config.img_size}."
        )
    num_outputs = _num_outputs(run, splits)
    # Published weights expect the statistics they were trained with, not those of this data.
    own_statistics = (
        config.mean is not None or config.pretrained is not None or config.name.startswith("hf:")
    )
    return build_model(
        config.name,
        num_classes=num_outputs,
        in_chans=channels,
        mean=config.mean if own_statistics else splits.mean,
        std=config.std if own_statistics else splits.std,
        img_size=height,
        patch_size=config.patch_size,
        depth=config.depth,
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
        stem=config.stem,
        head=OBJECTIVES[run.dat.objective.name].head,
        pretrained=config.pretrained,
        options=config.options,
        activation_checkpointing=config.activation_checkpointing,
        seed=run.dat.seed,
    )


def _num_outputs(run: RunConfig, splits: DataSplits) -> int:
    """Outputs that the objective needs of the model, after checking that the data give them."""
    name, model = run.dat.objective.name, run.dat.model
    _, height, width = splits.image_shape
    problems: list[str] = []
    num_classes = model.num_classes or splits.num_classes
    if OBJECTIVES[name].head == "classes":
        check_num_classes(run.dat, num_classes, problems)
    if name == "rotation" and height != width:
        problems.append(
            f"dat.objective.name='rotation' turns images by 90 degrees, but those of {splits.name} "
            f"are {height} x {width}: give square ones, with dat.data.img_size={height}."
        )
    if name == "fare" and model.pretrained is None and not model.name.startswith("hf:"):
        problems.append(
            "dat.objective.name='fare' keeps the features that the model starts with, and those of "
            "random weights are worth nothing: give dat.model.pretrained, or a model 'hf:PATH'."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    outputs = {"classes": num_classes, "rotation": 4, "projection": PROJECTION_WIDTH, "features": 0}
    return outputs[OBJECTIVES[name].head]


def task_of_export(run: RunConfig, output: Path, ranks: Ranks) -> Task | None:
    """What the exported model of a run is judged by; None where it classifies images."""
    objective = objective_of(run.dat)
    reference = None
    if objective.needs_reference:
        latest = Checkpoints(output / "checkpoints", keep=1).latest()
        if latest is None:
            raise CheckpointError(f"There is no checkpoint in {output}/checkpoints.")
        reference = load(latest / REFERENCE, map_location=ranks.device)
    return task_of(objective, reference)


def evaluate_model(
    model: Callable[[Tensor], Tensor],
    data: Dataset[Any],
    run: RunConfig,
    ranks: Ranks,
    task: Task | None,
) -> Record:
    """Evaluate a model as ``dat.evaluation`` says, sharded over the ranks; a collective."""
    config = run.dat.evaluation
    return evaluate(
        model,
        data,
        threat_of(run.dat),
        config.attacks,
        num_examples=config.num_examples,
        batch_size=config.batch_size,
        seed=run.dat.seed,
        device=ranks.device,
        rank=ranks.rank,
        ranks=ranks.count,
        gather=ranks.gather,
        num_workers=run.dat.data.num_workers,
        task=task,
    )


def describe_outcome(outcome: Record, run: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """What every record holds: the outcome, and all it depends on."""
    return {
        **outcome.to_dict(),
        "natural": run.dat.attack.name == "none",
        "seed": run.dat.seed,
        "ranks": ranks.count,
        "config": run.to_dict(),
        "versions": versions(),
        "hardware": hardware(ranks.device),
        "commit": commit(),
    }


def _train_one(
    run: RunConfig, ranks: Ranks, output: Path, resume: str, stop: StopSignal
) -> dict[str, Any] | None:
    started = time.perf_counter()
    # Dropout and drop path differ between ranks; everything else is seeded explicitly.
    torch.manual_seed(run.dat.seed * 1_000_003 + ranks.rank)
    with ranks.together():
        splits = build_data_of(run)
        model = build_model_of(run, splits)
        checkpoint = _find_checkpoint(output, resume)
        if ranks.is_main:
            _make_folder(output)
    if splits.mixture is not None and run.dat.data.pseudo_labels is not None:
        splits.mixture.label(_pseudo_labels(splits.mixture.unlabelled, run, ranks))
    engine, _, loader, _ = initialize(
        model=model, config=run, training_data=splits.train, ranks=ranks
    )
    assert loader is not None
    trainer = Trainer(engine, loader, splits.validation, output, stop)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        if ranks.is_main:
            logger.info("Continuing from %s.", checkpoint)
    elif ranks.is_main:
        _announce(run, ranks, splits, trainer, output)
    with ranks.together():
        if ranks.is_main:  # not before a refused checkpoint could have been refused
            write_json(output / "config.json", run.to_dict())
    finished = trainer.fit()
    train_seconds = trainer.seconds()
    engine.close()
    if not finished:
        if ranks.is_main:
            logger.info(
                "Stopped by SIGTERM after step %d; nothing is lost. To continue, repeat the "
                "command with --resume auto.",
                engine.global_steps,
            )
        return None
    exported = load(output, map_location=ranks.device)
    before = time.perf_counter()
    task = task_of_export(run, output, ranks)
    outcome = evaluate_model(exported, splits.test, run, ranks, task)
    record = {
        **describe_outcome(outcome, run, ranks),
        "checkpoint": "best" if trainer.best is not None else "last",
        "best_validation": trainer.best,
        "validation": trainer.history,
        "events": trainer.all_events(),
        "steps": engine.global_steps,
        "attack_precision": engine.attack_precision,
        "seconds": {
            "train": train_seconds,
            "evaluate": time.perf_counter() - before,
            "total": trainer.seconds_before + time.perf_counter() - started,
        },
    }
    with ranks.together():
        if ranks.is_main:
            write_json(output / "record.json", record)
    return record


def _pseudo_labels(images: Dataset[Any], run: RunConfig, ranks: Ranks) -> Tensor:
    """The class that ``dat.data.pseudo_labels`` gives each image, int64; a collective."""
    path = str(run.dat.data.pseudo_labels)
    with ranks.together():
        labeller = load(path, map_location=ranks.device)
    own: list[tuple[int, int]] = []
    batches = evaluation_batches(
        images,
        batch_size=run.dat.evaluation.batch_size,
        rank=ranks.rank,
        ranks=ranks.count,
        num_workers=run.dat.data.num_workers,
    )
    with ranks.together(), torch.no_grad():
        for x, _, indices in batches:
            if indices:
                own += zip(indices, labeller(x.to(ranks.device)).argmax(1).tolist(), strict=True)
    shards = cast("list[list[tuple[int, int]]]", ranks.gather(own))
    classes = dict(pair for shard in shards for pair in shard)
    return torch.tensor([classes[i] for i in range(len(classes))])


def _choose_output(run: RunConfig, resume: str) -> str:
    """The folder of the run: what the config says, or a free default name."""
    if resume not in ("none", "auto"):
        path = Path(resume)
        inside = path.parent.parent if path.name.startswith("step-") else path
        return str(inside)
    dat = run.dat
    if dat.output_dir is not None:
        folder = Path(dat.output_dir)
        if resume == "none" and _holds_run(folder):
            raise CheckpointError(
                f"dat.output_dir={dat.output_dir!r} holds a run already. To continue it: --resume "
                "auto. To start a new one: choose another folder or remove this one."
            )
        return str(folder)
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", dat.model.name).strip("-")
    base = Path("runs") / f"{dat.data.name}-{model}-{dat.attack.name}-zero{run.zero_stage}"
    taken = [base.with_name(f"{base.name}-{i}") if i > 1 else base for i in range(1, 10_000)]
    for i, folder in enumerate(taken):
        if not _holds_run(folder):
            newest = taken[max(0, i - 1)]
            return str(newest if resume == "auto" else folder)
    raise CheckpointError(f"Too many runs named {base}-*: set dat.output_dir.")


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "record.json", "checkpoints"))


def _find_checkpoint(output: Path, resume: str) -> Path | None:
    if resume == "none":
        return None
    path = Path(resume)
    if path.name.startswith("step-") and path.exists():
        return path
    checkpoint = Checkpoints(output / "checkpoints", keep=1).latest()
    if checkpoint is None and resume != "auto":
        raise CheckpointError(f"--resume {resume}: there is no checkpoint in {output}/checkpoints.")
    return checkpoint


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot make the run's folder {str(output)!r}: {error.strerror}. Set dat.output_dir."
        ) from None


def _announce(
    run: RunConfig, ranks: Ranks, splits: DataSplits, trainer: Trainer, output: Path
) -> None:
    dat = run.dat
    logger.info(
        "%s on %s: %d training images%s, %d rank(s), ZeRO-%d, %d steps of %d images; %s, %s eps %s",
        dat.model.name,
        splits.name,
        len(splits.train),  # type: ignore[arg-type]
        _unlabelled_words(splits, dat.data),
        ranks.count,
        run.zero_stage,
        trainer.total_steps,
        trainer.loader.sampler.global_batch,
        describe_training(plain(dataclasses.asdict(dat))),
        dat.threat_model.norm,
        dat.threat_model.eps,
    )
    logger.info("Run folder: %s", output)


def _unlabelled_words(splits: DataSplits, data: DataConfig) -> str:
    if splits.mixture is None:
        return ""
    kind = "without labels" if data.pseudo_labels is None else "with pseudo-labels"
    return f" ({splits.mixture.num_unlabelled} of them {kind})"


def _draw(run: RunConfig, output: Path, device: torch.device, has_twin: bool) -> None:
    count = run.dat.evaluation.pictures
    objective = OBJECTIVES[run.dat.objective.name]
    if count == 0 or not objective.classifies:
        return
    splits = build_data_of(run)
    channels = splits.image_shape[0]
    if channels not in (1, 3):
        logger.info("No picture: images have %d channels.", channels)
        return
    shown = Subset(splits.test, range(min(count, len(splits.test))))  # type: ignore[arg-type]
    x, y = default_collate([shown[i] for i in range(len(shown))])
    class_names = splits.class_names
    if objective.head == "rotation":
        x, y = (kind[:count] for kind in rotations(x))
        class_names = ("0", "90", "180", "270")
    name = "robust" if run.dat.attack.name != "none" else "natural"
    models = {name: load(output, map_location=device)}
    if has_twin:
        models["natural twin"] = load(output / TWIN_FOLDER, map_location=device)
    attack = run.dat.evaluation.validation_attack  # cheap: every rank waits for the picture
    path = output / "examples.png"
    draw_examples(models, x, y, threat_of(run.dat), attack, path, class_names=class_names)
    logger.info("Picture: %s", path)
