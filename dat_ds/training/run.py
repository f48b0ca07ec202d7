"""A whole run: data, model, engine, training, evaluation, record."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Subset, default_collate

from dat_ds.assembly import build_data_of, build_model_of, evaluate_model
from dat_ds.checkpoints import CHECKPOINTS, CheckpointFolder
from dat_ds.config import (
    RunConfig,
    adapt_to_device,
    threat_of,
)
from dat_ds.data import DatasetMethod, DataSplits, DistributedLoader
from dat_ds.engine.build import initialize
from dat_ds.engine.checkpoint import REFERENCE
from dat_ds.engine.deepspeed_part import check_deepspeed
from dat_ds.engine.launch import setup_ranks
from dat_ds.engine.monitor import report_outcome
from dat_ds.errors import CheckpointError, DataError
from dat_ds.evaluation import (
    Record,
    Task,
    commit,
    describe,
    describe_training,
    draw_examples,
    hardware,
    task_of,
    versions,
)
from dat_ds.evaluation.pictures import of_several_classes
from dat_ds.files import write_json, writing
from dat_ds.models import load
from dat_ds.objectives import rotations
from dat_ds.progress import PROGRESS
from dat_ds.ranks import Ranks
from dat_ds.training.beats import Beats, Rank
from dat_ds.training.folder import (
    choose_output,
    clean_folder,
    find_checkpoint,
    make_folder,
)
from dat_ds.training.heartbeat import Heartbeat
from dat_ds.training.lock import locked
from dat_ds.training.pseudo_labels import labels_for
from dat_ds.training.stopping import StopSignal
from dat_ds.training.trainer import Trainer
from dat_ds.training.twin import TWIN_FOLDER, natural_twin_of

logger = logging.getLogger("dat_ds")


@dataclass(frozen=True)
class Resume:
    """Where a run goes on.

    Args:
        source: See ``resume`` of :func:`train`.
        changed: See there.
    """

    source: str
    changed: tuple[str, ...] = ()


def train(
    run: RunConfig, *, resume: str = "none", changed: Collection[str] = ()
) -> dict[str, Any] | None:
    """Carry out a run from its config to its ``record.json``.

    Args:
        run: The run.
        resume: ``"none"`` starts anew; ``"auto"`` continues from the newest checkpoint of the
            run's folder, or starts anew where there is none; a path continues from that
            checkpoint or run folder.
        changed: Keys or sections of the config that differ from the checkpoint's on purpose.

    Returns:
        The record, or None where a signal or the end of its launcher stopped the run, which
        ``resume="auto"`` continues.

    Raises:
        UserError: For every mistake in what was asked, on all ranks.
        FaultError: Where another rank has died. Where one hangs this process ends at once, with
            exit code 75 (see :class:`dat_ds.training.heartbeat.Heartbeat`).
    """
    stop = StopSignal()
    with stop.listening():
        return _train(run, Resume(resume, tuple(changed)), stop)


def _train(run: RunConfig, resume: Resume, stop: StopSignal) -> dict[str, Any] | None:
    ranks = setup_ranks(waits=run.dat.fault.timeout, stop=lambda: stop.reason)
    run = adapt_to_device(run, ranks.device.type)
    check_deepspeed(run.deepspeed)  # before anything is read, built or written
    chosen = ""
    with ranks.together():
        if ranks.is_main:
            chosen = choose_output(run, resume.source)
    own = (chosen, uuid.uuid4().hex, Rank.of_this_process(ranks.rank))
    known = cast("list[tuple[str, str, Rank]]", ranks.gather(own))
    output = Path(known[0][0])
    beats = Beats(output, session=known[0][1])
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                make_folder(output)
                stack.enter_context(locked(output))
                with writing(beats.folder):
                    beats.begin()
        if run.dat.fault.timeout:
            processes = [process for _, _, process in known]
            heartbeat = Heartbeat(beats, processes, ranks.rank, run.dat.fault.timeout)
            stack.enter_context(heartbeat.beating(ranks))
        return _train_in(output, run, ranks, resume, stop)


def _train_in(
    output: Path, run: RunConfig, ranks: Ranks, resume: Resume, stop: StopSignal
) -> dict[str, Any] | None:
    """The run and its natural twin in a folder that is this run's alone."""
    record = _train_one(run, ranks, output, resume, stop)
    if record is None:
        return None
    twin = None
    if run.dat.evaluation.natural_twin and run.dat.attack.name != "none":
        if ranks.is_main:
            logger.info("Training the natural twin, for comparison.")
        twin_resume = resume if resume.source == "none" else Resume("auto", resume.changed)
        twin_output = output / TWIN_FOLDER
        twin = _train_one(natural_twin_of(run), ranks, twin_output, twin_resume, stop)
        if twin is None:
            return None
    picture = None
    with ranks.together():
        if ranks.is_main:
            picture = _draw(run, output, ranks.device, twin is not None)
    if ranks.is_main:
        report_outcome(
            run,
            output,
            step=record["steps"],
            accuracies={"natural_acc": record["natural_acc"], **record["robust_acc"]},
            picture=picture,
        )
        logger.info("%s", describe(record, twin))
        logger.info("Record: %s", output / "record.json")
    return record


def task_of_export(run: RunConfig, output: Path, ranks: Ranks) -> Task | None:
    """Evaluation task of a run's exported model; None where it classifies images."""
    objective = run.dat.objective
    reference = None
    if objective.needs_reference:
        latest = CheckpointFolder(output / CHECKPOINTS).latest()
        if latest is None:
            raise CheckpointError(f"There is no checkpoint in {output / CHECKPOINTS}.")
        reference = load(latest / REFERENCE, map_location=ranks.device)
    return task_of(objective, reference)


def describe_outcome(outcome: Record, run: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Contents of a record: the outcome, and all it depends on."""
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
    run: RunConfig, ranks: Ranks, output: Path, resume: Resume, stop: StopSignal
) -> dict[str, Any] | None:
    started = time.perf_counter()
    PROGRESS.enter("start", 0)
    # Dropout and drop path differ between ranks; everything else is seeded explicitly.
    torch.manual_seed(run.dat.seed * 1_000_003 + ranks.rank)
    with ranks.together():
        splits = build_data_of(run)
        model = build_model_of(run, splits)
        if ranks.is_main:
            make_folder(output)
            clean_folder(output)
    checkpoint = find_checkpoint(output, resume.source, ranks)
    if splits.mixture is not None and run.dat.data.pseudo_labels is not None:
        _label(splits, run, ranks)
    engine, _, loader, _ = initialize(
        model=model, config=run, training_data=splits.train, ranks=ranks
    )
    assert isinstance(loader, DistributedLoader)
    trainer = Trainer(engine, loader, splits.validation, output, stop)
    if checkpoint is not None:
        trainer.resume(checkpoint, verified=True, changed=resume.changed)
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
                "Stopped by %s after step %d; nothing is lost. To continue, repeat the command "
                "with --resume auto.",
                stop.reason,
                engine.global_steps,
            )
        return None
    PROGRESS.enter("evaluation")
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
        "damaged_images": len(trainer.damaged),
        "class_names": splits.class_names,
        "steps": engine.global_steps,
        "attack_precision": engine.attack_precision,
        "seconds": {
            "train": train_seconds,
            "checkpoints": trainer.checkpoint_seconds,
            "evaluate": time.perf_counter() - before,
            "total": trainer.seconds_before + time.perf_counter() - started,
        },
    }
    with ranks.together():
        if ranks.is_main:
            write_json(output / "record.json", record)
    return record


def _label(splits: DataSplits, run: RunConfig, ranks: Ranks) -> None:
    """Give the unlabelled images the labels that ``dat.data.pseudo_labels`` names."""
    data, mixture = run.dat.data, splits.mixture
    assert mixture is not None
    labels = labels_for(
        splits,
        str(data.pseudo_labels),
        ranks,
        batch_size=run.dat.evaluation.batch_size,
        num_workers=data.num_workers,
    )
    sure = labels.confidence >= data.least_confidence
    if not sure.any():
        raise DataError(
            f"dat.data.least_confidence={data.least_confidence} leaves out all {len(sure)} "
            f"pseudo-labels, of which the surest has {labels.confidence.max():.3f}: write less."
        )
    mixture.label(labels.classes, None if sure.all() else sure)
    if ranks.is_main and not sure.all():
        logger.info(
            "%d of %d pseudo-labels have a confidence of at least %g; the other images are left "
            "out.",
            sure.sum(),
            len(sure),
            data.least_confidence,
        )


def _announce(
    run: RunConfig, ranks: Ranks, splits: DataSplits, trainer: Trainer, output: Path
) -> None:
    dat = run.dat
    logger.info(
        "%s on %s: %d training images%s, %d rank(s), ZeRO-%d, %d steps of %d images; %s, %s eps %s",
        dat.model.name,
        splits.name,
        len(splits.train),  # type: ignore[arg-type]
        _composition(splits, dat.data),
        ranks.count,
        run.zero_stage,
        trainer.total_steps,
        trainer.loader.sampler.global_batch,
        describe_training(dat.to_dict()),
        dat.threat_model.norm,
        dat.threat_model.eps,
    )
    logger.info("Run folder: %s", output)


def _composition(splits: DataSplits, data: DatasetMethod) -> str:
    """How many of the training images are not labelled ones of the dataset itself, in words."""
    parts = []
    if splits.mixture is not None:
        kind = "without labels" if data.pseudo_labels is None else "with pseudo-labels"
        share = _share_in_words(data.unlabelled_batch_fraction)
        parts.append(f"{splits.mixture.num_unlabelled} of them {kind}{share}")
    if splits.num_extra:
        share = _share_in_words(data.extra_fraction)
        parts.append(f"{splits.num_extra} of them of dat.data.extra{share}")
    return f" ({'; '.join(parts)})" if parts else ""


def _share_in_words(fraction: float | None) -> str:
    return "" if fraction is None else f", {fraction:.0%} of every batch"


def _draw(run: RunConfig, output: Path, device: torch.device, has_twin: bool) -> Path | None:
    """Draw examples; the file, where the data can be shown."""
    count = run.dat.evaluation.pictures
    objective = run.dat.objective
    if count == 0 or not objective.classifies:
        return None
    splits = build_data_of(run)
    channels = splits.image_shape[0]
    if channels not in (1, 3):
        logger.info("No picture: images have %d channels.", channels)
        return None
    labels: Tensor = splits.test.labels  # type: ignore[attr-defined]  # every reader's test part
    shown = Subset(splits.test, of_several_classes(labels, count))
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
    return path
