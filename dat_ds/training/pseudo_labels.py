"""Pseudo-labels: the classes that a trained model gives to images without a label.

In a folder::

    labels.npz     classes (int64) and confidence (float32), one for each image, in their order
    labels.json    who gave them to which images
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dat_ds.data import evaluation_batches
from dat_ds.data.fingerprint import difference, fingerprint
from dat_ds.data.readers.npz import load_npz
from dat_ds.errors import DataError
from dat_ds.evaluation.samples import Journal
from dat_ds.files import write_json, writing
from dat_ds.models import load
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")
LABELS, ABOUT = "labels.npz", "labels.json"

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PseudoLabels:
    """Labels of images, in their order.

    Args:
        classes: int64 ``(N,)``.
        confidence: Probability of that class, float32 ``(N,)``, in [0, 1].
        given: Label that the data have themselves, int64 ``(N,)``, ``UNLABELLED`` where none; None
            where labels were read from a folder.
    """

    classes: Tensor
    confidence: Tensor
    given: Tensor | None = None


def label_images(
    images: Dataset[Any],
    model: Classifier,
    ranks: Ranks,
    *,
    batch_size: int,
    num_workers: int = 0,
    journal: Journal | None = None,
) -> PseudoLabels:
    """The likeliest class of each image, and its probability; a collective.

    Args:
        images: Map-style dataset of ``(x, y)``; ``y`` is only kept.
        model: Pixels ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``, in eval mode.
        ranks: The processes, which share the images.
        batch_size: Largest batch of a rank.
        num_workers: Processes of each rank that read images.
        journal: Keeps what is found; what it holds already is not computed again.

    Returns:
        The labels of all images, on every rank.

    Raises:
        DataError: For an image that cannot be read, on all ranks.
    """
    size = len(cast(Any, images))
    known = {} if journal is None else _rows(journal.entries())
    left = [i for i in range(size) if i not in known]
    batches = evaluation_batches(
        Subset(images, left),
        batch_size=batch_size,
        rank=ranks.rank,
        ranks=ranks.count,
        num_workers=num_workers,
    )
    own: list[dict[str, Any]] = []
    with ranks.together(), torch.no_grad():
        for x, y, places in batches:
            if not places:
                continue
            shares = model(x.to(ranks.device)).double().softmax(dim=1)
            best = shares.max(dim=1)
            entry = {
                "indices": [left[place] for place in places],
                "classes": best.indices.tolist(),
                "confidence": best.values.float().tolist(),
                "given": y.tolist(),
            }
            if journal is not None:
                journal.add(entry)
            own.append(entry)
    for entries in cast("list[list[dict[str, Any]]]", ranks.gather(own)):
        known |= _rows(entries)
    classes, confidence, given = zip(*(known[i] for i in range(size)), strict=True)
    return PseudoLabels(
        torch.tensor(classes), torch.tensor(confidence, dtype=torch.float32), torch.tensor(given)
    )


def _rows(entries: list[dict[str, Any]]) -> dict[int, tuple[int, float, int]]:
    """Class, confidence and given label of each image that entries hold."""
    columns = ("indices", "classes", "confidence", "given")
    return {
        index: (label, confidence, given)
        for entry in entries
        for index, label, confidence, given in zip(*(entry[c] for c in columns), strict=True)
    }


def write_labels(
    folder: Path, labels: PseudoLabels, images: Dataset[Any], about: Mapping[str, Any]
) -> None:
    """Write a folder of labels.

    Args:
        folder: It exists.
        labels: Of all images.
        images: Which they are of.
        about: What else ``labels.json`` says.
    """
    partial = folder / f"partial-{LABELS}"
    with writing(folder / LABELS):
        np.savez(partial, classes=labels.classes.numpy(), confidence=labels.confidence.numpy())
        os.replace(partial, folder / LABELS)
    write_json(folder / ABOUT, {**about, "images": fingerprint(images)})


def read_labels(folder: Path, images: Dataset[Any]) -> PseudoLabels:
    """Labels from a folder.

    Args:
        folder: As :func:`write_labels` wrote it.
        images: Those that are to be labelled.

    Raises:
        DataError: If it is damaged, or of other images.
    """
    where = f"dat.data.pseudo_labels={str(folder)!r}"
    arrays = load_npz(folder / LABELS, where)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        saved = about["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: cannot read {ABOUT} ({error}). Write the labels again with dat-ds label."
        ) from None
    other = difference(saved, fingerprint(images), before="labels for", after="this run has")
    if other is not None:
        raise DataError(
            f"{where} holds labels of other images than those of this run without a label "
            f"({other}). "
            "Label these with dat-ds label, or name the data that were labelled."
        )
    classes, confidence = arrays.get("classes"), arrays.get("confidence")
    size = len(cast(Any, images))
    if (
        classes is None
        or confidence is None
        or classes.shape != (size,)
        or confidence.shape != (size,)
        or classes.dtype.kind not in "iu"
        or confidence.dtype.kind != "f"
    ):
        raise DataError(
            f"{where}: {LABELS} needs classes (integers) and confidence (floats), {size} of each. "
            "Write it again with dat-ds label."
        )
    return PseudoLabels(
        torch.from_numpy(classes.astype(np.int64)),
        torch.from_numpy(confidence.astype(np.float32)),
    )


def labels_for(
    images: Dataset[Any], source: str, ranks: Ranks, *, batch_size: int, num_workers: int
) -> PseudoLabels:
    """What ``dat.data.pseudo_labels`` gives to images: its labels, or its model's; a collective.

    Args:
        images: Those without a label.
        source: A folder of labels, or a run, checkpoint or saved model that labels them now.
        ranks: The processes.
        batch_size: Largest batch of a rank.
        num_workers: Processes of each rank that read images.

    Raises:
        UserError: For a folder that holds neither, on all ranks.
    """
    with ranks.together():
        folder = Path(source)
        if (folder / LABELS).is_file():
            return read_labels(folder, images)
        model = load(source, map_location=ranks.device)
    return label_images(images, model, ranks, batch_size=batch_size, num_workers=num_workers)
