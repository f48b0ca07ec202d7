"""Labelling the images of a run that have no label, by a model that was trained before."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dat_ds.assembly import build_data_of
from dat_ds.config import RunConfig
from dat_ds.contracts import UNLABELLED
from dat_ds.data.damaged import DAMAGED, too_many_damaged, write_damaged
from dat_ds.engine.launch import setup_ranks
from dat_ds.errors import DataError
from dat_ds.evaluation import commit
from dat_ds.evaluation.samples import Journal, clear_progress, open_folder
from dat_ds.judge.target import load_target
from dat_ds.training.pseudo_labels import (
    ABOUT,
    PseudoLabels,
    check_labeller,
    label_images,
    write_labels,
)

logger = logging.getLogger("dat_ds")
_OF_TRAINING = (
    *("pseudo_labels", "least_confidence", "num_workers", "pin_memory"),
    *("damaged", "most_damaged"),
)


def label_run(
    target: str,
    run: RunConfig,
    output: Path,
    *,
    imports: Sequence[str] = (),
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Label the images that a run trains on without a label; a collective.

    Labelling that was interrupted goes on where it stood, on any number of ranks; one that is
    finished is read.

    Args:
        target: The model, as :func:`dat_ds.judge.target.load_target` takes it.
        run: Its images without a label, by ``dat.data``.
        output: Folder of the labels, for ``dat.data.pseudo_labels``.
        imports: Modules that were imported for the model.
        batch_size: Largest batch of a rank; None for ``dat.evaluation.batch_size``.

    Returns:
        Contents of ``labels.json``.

    Raises:
        UserError: For a run without such images, a model that does not fit them, and a folder of
            other labels; on all ranks.
    """
    ranks = setup_ranks()
    with ranks.together():
        splits = build_data_of(run)
        if splits.mixture is None:
            raise DataError(
                "The run has no image without a label: write dat.data.labelled_fraction, such as "
                "0.1, or dat.data.unlabelled_path."
            )
        images = splits.mixture.unlabelled
        found = load_target(
            target,
            class_names=splits.class_names,
            imports=imports,
            num_classes=splits.num_classes,
            in_chans=splits.image_shape[0],
            device=ranks.device,
        )
        check_labeller(repr(target), found.model, found.class_names, splits, ranks.device)
        about: dict[str, Any] = {
            "target": target,
            "model_sha256": found.digest,
            "data": {k: v for k, v in run.dat.data.to_dict().items() if k not in _OF_TRAINING},
            "seed": run.dat.seed,
            "num_images": splits.mixture.num_unlabelled,
        }
        if ranks.is_main:
            open_folder(output, about)
        is_finished = ranks.is_main and (output / ABOUT).exists()
    if ranks.gather(is_finished)[0]:
        logger.info("%s holds these labels already: remove the folder to repeat it.", output)
        return cast("dict[str, Any]", json.loads((output / ABOUT).read_text(encoding="utf-8")))
    labels = label_images(
        images,
        found.model,
        ranks,
        batch_size=batch_size or run.dat.evaluation.batch_size,
        num_workers=run.dat.data.num_workers,
        journal=Journal(output, ranks.rank),
    )
    about |= {
        "class_names": list(splits.class_names or ()) or None,
        "commit": commit(),
        **_quality(labels),
    }
    with ranks.together():
        if labels.damaged:
            if ranks.is_main:
                write_damaged(output / DAMAGED, labels.damaged)
            most, size = run.dat.data.most_damaged, len(labels.classes)
            error = too_many_damaged(labels.damaged, size, most, output / DAMAGED)
            if error is not None:
                raise error
        if ranks.is_main:
            write_labels(output, labels, images, about)
            clear_progress(output)
            logger.info("%s", _in_words(about, output))
    return about


def _quality(labels: PseudoLabels) -> dict[str, Any]:
    """How sure the labels are, and how many are right where the data know it."""
    assert labels.given is not None
    has_label = labels.given != UNLABELLED
    right = (labels.given == labels.classes)[has_label].double()
    return {
        "mean_confidence": float(labels.confidence.double().mean()),
        "known_labels": len(right),
        "accuracy": float(right.mean()) if len(right) else None,
        "by_class": labels.classes.bincount().tolist(),
        "damaged_images": len(labels.damaged),
    }


def _in_words(about: Mapping[str, Any], output: Path) -> str:
    right, known, damaged = (about[k] for k in ("accuracy", "known_labels", "damaged_images"))
    lost = f"; for {damaged} damaged ones another image was labelled" if damaged else ""
    words = f"; of the {known} whose label is known, {right:.1%} are right" if known else ""
    return (
        f"{about['num_images']} images labelled with a mean confidence of "
        f"{about['mean_confidence']:.3f}{words}{lost}. To train with them: "
        f"dat.data.pseudo_labels={str(output)!r}."
    )
