"""Pseudo-labels: the classes that a trained model gives to images without a label.

In a folder::

    labels.npz     classes (int64) and confidence (float32), one for each image, in their order
    labels.json    who gave them to which images
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dat_ds.data import DataSplits, evaluation_batches
from dat_ds.data.fingerprint import difference, fingerprint
from dat_ds.data.readers.npz import load_npz
from dat_ds.errors import DataError, ModelError, UserError
from dat_ds.evaluation.samples import Journal
from dat_ds.files import write_json, writing
from dat_ds.models import PixelModel, load
from dat_ds.models.build import first_difference
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
        damaged: Images in the place of which another one was labelled, and the reasons.
    """

    classes: Tensor
    confidence: Tensor
    given: Tensor | None = None
    damaged: Mapping[str, str] = field(default_factory=dict)


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
    # A damaged image may have been replaced since then.
    earlier = [] if journal is None else [e for e in journal.earlier(ranks) if not e["damaged"]]
    known = _rows(earlier)
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
                "damaged": batches.damaged,
            }
            if journal is not None:
                journal.add(entry)
            own.append(entry)
    damaged: dict[str, str] = {}
    for found in cast("list[list[dict[str, Any]]]", ranks.gather(own)):
        known |= _rows(found)
        damaged |= {image: words for entry in found for image, words in entry["damaged"].items()}
    classes, confidence, given = zip(*(known[i] for i in range(size)), strict=True)
    return PseudoLabels(
        torch.tensor(classes),
        torch.tensor(confidence, dtype=torch.float32),
        torch.tensor(given),
        damaged,
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


def check_labeller(
    name: str,
    model: Classifier,
    class_names: Sequence[str] | None,
    splits: DataSplits,
    device: torch.device,
) -> None:
    """See that a model takes the images of a run and gives its classes.

    Args:
        name: What the model is called.
        model: Pixels to logits, in eval mode.
        class_names: Names of its classes in order, where they are known.
        splits: The data of the run.
        device: Where the model is.

    Raises:
        ModelError: It does not take the images, or has other classes, or them in another order.
    """
    shape = splits.image_shape
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *shape, device=device)).shape[1]
    except Exception as error:  # libraries raise whatever their layers do
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{name} does not take the images of the run, of shape (C, H, W) = {shape} ({reason}): "
            "name a model of such images."
        ) from None
    if outputs != splits.num_classes:
        raise ModelError(
            f"{name} has {outputs} outputs, and the run has {splits.num_classes} classes: name a "
            "model of these classes."
        )
    _check_order(name, class_names, splits, ModelError)


def _check_order(
    name: str,
    class_names: Sequence[str] | None,
    splits: DataSplits,
    kind: type[UserError],
) -> None:
    """Raise an error of that kind where classes have other names, or stand in another order."""
    first = first_difference(class_names, splits.class_names)
    if first is None:
        return
    if sorted(class_names or ()) == sorted(splits.class_names or ()):
        raise kind(
            f"The classes of {name} stand in another order than those of the run: {first}. Write "
            "their order into dat.data.class_map, where the dataset has one."
        )
    raise kind(
        f"The classes of {name} have other names than those of the run: {first}. Name a model of "
        "the same classes, under the same names."
    )


def read_labels(folder: Path, splits: DataSplits) -> PseudoLabels:
    """Labels from a folder.

    Args:
        folder: As :func:`write_labels` wrote it.
        splits: Data with images without a label.

    Raises:
        DataError: If it is damaged, of other images, or of other classes.
    """
    assert splits.mixture is not None
    images = splits.mixture.unlabelled
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
    _check_order(where, about.get("class_names"), splits, DataError)
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
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= splits.num_classes:
        raise DataError(
            f"{where}: its classes run from {low} to {high}, and the run has "
            f"{splits.num_classes}. Label the images with a model of these classes."
        )
    return PseudoLabels(
        torch.from_numpy(classes.astype(np.int64)),
        torch.from_numpy(confidence.astype(np.float32)),
    )


def labels_for(
    splits: DataSplits, source: str, ranks: Ranks, *, batch_size: int, num_workers: int
) -> PseudoLabels:
    """What ``dat.data.pseudo_labels`` gives to images: its labels, or its model's; a collective.

    Args:
        splits: Data with images without a label.
        source: A folder of labels, or a run, checkpoint or saved model that labels them now.
        ranks: The processes.
        batch_size: Largest batch of a rank.
        num_workers: Processes of each rank that read images.

    Raises:
        UserError: For a folder that holds neither, and for labels or a model of other classes or
            images; on all ranks.
    """
    assert splits.mixture is not None
    images = splits.mixture.unlabelled
    with ranks.together():
        folder = Path(source)
        if (folder / LABELS).is_file():
            return read_labels(folder, splits)
        model = load(source, map_location=ranks.device)
        names = cast(PixelModel, model).spec.get("class_names")
        check_labeller(f"dat.data.pseudo_labels={source!r}", model, names, splits, ranks.device)
    return label_images(images, model, ranks, batch_size=batch_size, num_workers=num_workers)
