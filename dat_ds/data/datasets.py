"""The datasets by name, their splits, and the refusal of data that does not fit.

Every dataset yields ``(x, y)``: ``x`` float32 ``(C, H, W)`` in [0, 1], ``y`` int in
``0 .. num_classes - 1``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from dat_ds.contracts import MOST_CLASSES, UNLABELLED
from dat_ds.data.damaged import Readable
from dat_ds.data.images import Channels, FolderImages, Images, ImageShape, StoredImages
from dat_ds.data.method import DatasetMethod, StoredDataset
from dat_ds.data.mixing import Mixed
from dat_ds.data.mixture import Mixture
from dat_ds.data.policies import policy_of
from dat_ds.data.readers import DATASETS
from dat_ds.data.readers.classes import listed
from dat_ds.data.readers.npz import array_problems, images_from_arrays, load_npz
from dat_ds.data.readers.source import Source, enough_memory, raise_all
from dat_ds.data.sampler import hold_out
from dat_ds.data.transforms import (
    Augmented,
    Sample,
)
from dat_ds.data.unlabelled import (
    IMAGE_SUFFIXES,
    PartlyLabelled,
    image_files,
)
from dat_ds.errors import DataError
from dat_ds.method import parse_method

logger = logging.getLogger("dat_ds")


@dataclass(frozen=True)
class DataSplits:
    """Three splits of one dataset and what a model needs to know about it.

    Attributes:
        train: Augmented training split.
        validation: Part of the training data held out of ``train``, never augmented; may be empty.
        test: Test split, never augmented and never trained or selected on.
        num_classes: Number of labels.
        image_shape: ``(C, H, W)``.
        mean: Per channel, pixel units, of the training data (with the validation part, so that the
            constants do not depend on the split's seed).
        std: Per channel, pixel units, of the same data; at least one grey level (1/255).
        name: Name the splits were built by.
        class_names: Names in label order, or None where the data has none.
        sides: Sides that training images may have along the run, rising, where they change.
        mixture: Composition of ``train`` where it has unlabelled images, else None.
        num_extra: Training images of ``dat.data.extra``, which are the last ones of ``train``.
    """

    train: Dataset[Any]
    validation: Dataset[Sample]
    test: Dataset[Sample]
    num_classes: int
    image_shape: ImageShape
    mean: Channels
    std: Channels
    name: str
    class_names: tuple[str, ...] | None
    sides: tuple[int, ...] = ()
    mixture: PartlyLabelled | None = None
    num_extra: int = 0


def build_data(name: str, *, seed: int = 0, **options: Any) -> DataSplits:
    """Read a dataset by name, check it, and hold a validation split out of its training part.

    Args:
        name: One of :data:`dat_ds.data.DATASETS`.
        seed: Of the splits, the augmentation, and the images of ``synthetic``.
        options: The keys of ``dat.data``; one that is None has its default.

    Returns:
        The splits. ``train`` says of each label what is known: see ``PartlyLabelled``.

    Raises:
        DataError: Anything wrong with the arguments or the data; what can be seen together is
            reported together.
    """
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    if isinstance(plain.get("image_shape"), tuple):
        plain["image_shape"] = list(plain["image_shape"])
    problems: list[str] = []
    dataset = parse_method(DATASETS, {"name": name, **plain}, "dat.data", problems)
    problems += [
        f"dat.data.{key} is missing: {name!r} needs {what}."
        for key, what in dataset.required.items()
        if getattr(dataset, key) is None
    ]
    raise_all(problems)
    return splits_of(dataset, seed)


def splits_of(dataset: DatasetMethod, seed: int) -> DataSplits:
    """Read a dataset, check it, and hold a validation split out of its training part.

    Args:
        dataset: The dataset and how it is split and mixed.
        seed: Of the splits, the augmentation, and the images of ``synthetic``.

    Raises:
        DataError: Anything wrong with the data; what can be seen together is reported together.
    """
    with enough_memory(f"dat.data.name={dataset.name!r}"):
        source = dataset.read(seed)
    num_labels = _check_labels(source, dataset)
    kept, held = _split(source.train.labels, dataset.validation_fraction, seed)
    shape = source.train.image_shape
    sides = _sides(dataset, shape)
    train, mixture = _training_part(dataset, source, kept, seed)
    total = dataset.num_classes or max(source.num_classes, num_labels)
    num_extra, known = 0, source.train.labels
    if dataset.extra_fraction is not None:
        extra = _read_extra(dataset, source, total, seed)
        num_extra, known = len(extra.labels), torch.cat([known, extra.labels])
        key = "dat.data.extra_fraction"
        train = Mixture(train, _readable(dataset, extra), dataset.extra_fraction, key)
    if dataset.num_classes is None:
        _warn_of_empty_classes(known, total, source.class_names)
    augmented: Dataset[Any] = Augmented(
        train,
        dataset.augment,
        seed,
        size=(shape[1], shape[2]),
        policy=policy_of(dataset, shape, source.statistics),
        side_in=functools.partial(dataset.side_in, full=shape[1]) if sides else None,
    )
    if dataset.mixes:
        augmented = Mixed(augmented, total, mixup=dataset.mixup, cutmix=dataset.cutmix, seed=seed)
    return DataSplits(
        train=augmented,
        validation=Subset(source.train, held),
        test=source.test,
        num_classes=total,
        image_shape=shape,
        mean=source.statistics[0],
        std=source.statistics[1],
        name=dataset.name,
        class_names=source.class_names,
        sides=sides,
        mixture=mixture,
        num_extra=num_extra,
    )


def _readable(dataset: DatasetMethod, images: Dataset[Any]) -> Dataset[Any]:
    """Images of which damaged ones are replaced, where the config says so."""
    return Readable(images) if dataset.damaged == "skip" else images


def _read_extra(dataset: DatasetMethod, source: Source, num_classes: int, seed: int) -> Images:
    """The images of ``dat.data.extra``, with labels in the order of the others.

    Raises:
        DataError: For what does not fit the other training images.
    """
    extra = dataset.extra_dataset()
    assert extra is not None
    shape = source.train.image_shape
    size = dataset.img_size or (shape[1] if isinstance(extra, StoredDataset) else None)
    own = "|".join(key for key in type(extra).known_keys() if key not in DatasetMethod.known_keys())

    def renamed(words: str) -> str:
        return re.sub(rf"dat\.data\.(?=({own or 'name'})\b)", "dat.data.extra.", words)

    try:
        with enough_memory(f"dat.data.extra.name={extra.name!r}"):
            part = dataclasses.replace(extra, img_size=size).read_train(seed)
    except DataError as error:
        raise type(error)(renamed(str(error))) from error
    images, where = part.images, f"dat.data.extra of the dataset {extra.name!r}"
    if isinstance(images, StoredImages):
        images.key = renamed(images.key)
    if len(images) == 0:
        raise DataError(f"{where} has no images: name a file or folder that has some.")
    if images.image_shape != shape:
        raise DataError(
            f"{where} has images of shape {list(images.image_shape)} (channels, height, width), "
            f"the others have {list(shape)}: {_remedy(images.image_shape, shape)} them."
        )
    labels = images.labels
    if part.class_names is not None and source.class_names is not None:
        strange = set(part.class_names) - set(source.class_names)
        if strange:
            raise DataError(
                f"{where} has classes that the others lack: {listed(strange)}. Their names have to "
                "be the same."
            )
        place = torch.tensor([source.class_names.index(name) for name in part.class_names])
        images, labels = images.relabelled(place[labels]), place[labels]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"The labels of {where} run from {low} to {high}; valid are 0..{num_classes - 1}, the "
            "classes of the other images. Images without labels belong into "
            "dat.data.unlabelled_path."
        )
    return images


def _remedy(shape: ImageShape, wanted: ImageShape) -> str:
    is_resized = shape[0] == wanted[0]
    return f"write dat.data.img_size={wanted[1]}, or convert" if is_resized else "convert"


def _sides(dataset: DatasetMethod, shape: ImageShape) -> tuple[int, ...]:
    """Sides that training images may have along the run; none where they do not change."""
    _, height, width = shape
    start = dataset.progressive_from
    if start is None:
        return ()
    if height != width or start >= height:
        wrong = "has to be below their side" if height == width else "is for square images"
        raise DataError(
            f"dat.data.progressive_from={start} {wrong}, and the images have {height} x {width} "
            "pixels: write dat.data.img_size, such as 224, or remove it."
        )
    return (*range(start, height, dataset.progressive_step), height)


def _training_part(
    dataset: DatasetMethod, source: Source, kept: list[int], seed: int
) -> tuple[Dataset[Any], PartlyLabelled | None]:
    """Training images before augmentation, and their mixture where some are unlabelled."""
    if dataset.labelled_fraction == 1 and dataset.unlabelled_path is None:
        return _readable(dataset, Subset(source.train, kept)), None
    known, hidden = hold_out(source.train.labels[kept], 1 - dataset.labelled_fraction, seed)
    if not known:
        raise DataError(
            f"dat.data.labelled_fraction={dataset.labelled_fraction} of {len(kept)} training "
            "images leaves no label at all: write a larger fraction."
        )
    if not hidden and dataset.labelled_fraction < 1:
        raise DataError(
            f"dat.data.labelled_fraction={dataset.labelled_fraction} of {len(kept)} training "
            "images leaves no image without a label: write a smaller fraction, or 1."
        )
    labelled = _readable(dataset, Subset(source.train, [kept[i] for i in known]))
    unlabelled: list[Dataset[Any]] = []
    if not dataset.drop_unlabelled:
        unlabelled.append(Subset(source.train, [kept[i] for i in hidden]))
    if dataset.unlabelled_path is not None:
        path, shape = Path(dataset.unlabelled_path), source.train.image_shape
        unlabelled.append(_read_unlabelled(path, dataset.img_size, shape))
    if not unlabelled:
        return labelled, None
    others = _readable(dataset, ConcatDataset(unlabelled))
    mixture = PartlyLabelled(
        labelled, others, dataset.labelled_repeats, dataset.unlabelled_batch_fraction
    )
    return mixture, mixture


def _read_unlabelled(path: Path, img_size: int | None, shape: ImageShape) -> Images:
    """Images without labels, of the shape of the labelled ones."""
    where = f"dat.data.unlabelled_path={str(path)!r}"
    if os.path.isdir(path):  # where Path.is_dir raises without permission
        files = sorted(image_files(path, "dat.data.unlabelled_path"))
        if not files:
            raise DataError(f"{where} holds no image file ({', '.join(IMAGE_SUFFIXES)}).")
        images: Images = FolderImages(
            [(file, UNLABELLED) for file in files],
            img_size or shape[1],
            "dat.data.unlabelled_path",
        )
    else:
        arrays = load_npz(path, where)
        if "images" not in arrays:
            raise DataError(
                f"{where} lacks the array 'images' (it has {', '.join(arrays) or 'none'}): write "
                "it with numpy.savez(file, images=...), uint8 (N, H, W, C) or (N, H, W)."
            )
        x = arrays["images"]
        y = np.full(len(x) if x.ndim else 0, UNLABELLED)
        raise_all(array_problems(where, "images", x, "labels", y))
        if len(x) == 0:
            raise DataError(f"{where} holds no image: write some into its array 'images'.")
        images = images_from_arrays(x, y, img_size)
    if images.image_shape != shape:
        raise DataError(
            f"{where} has images of shape {list(images.image_shape)} (channels, height, width), "
            f"the labelled ones have {list(shape)}: {_remedy(images.image_shape, shape)} them."
        )
    return images


def _check_labels(source: Source, dataset: DatasetMethod) -> int:
    """Largest label plus 1; refuse empty parts and labels outside ``0 .. num - 1``."""
    num_classes = dataset.num_classes
    path = getattr(dataset, "path", None)
    where = "" if path is None else f" of {path}"
    labels = {"train": source.train.labels, "test": source.test.labels}
    parts = {f"{part} part{where}": y for part, y in labels.items()}
    known = num_classes or source.num_classes
    raise_all(f"The {part} has no images." for part, y in parts.items() if len(y) == 0)
    ranges = {part: (int(y.min()), int(y.max())) for part, y in parts.items()}
    top = max(high for _, high in ranges.values())
    problems = []
    for part, (low, high) in ranges.items():
        if low < 0:
            problems.append(
                f"The labels of the {part} run from {low} to {high}; they must be 0 or more. "
                "Number the classes from 0."
            )
        if num_classes is not None and high >= num_classes:
            problems.append(
                f"dat.data.num_classes={num_classes}, but the labels of the {part} run from "
                f"{low} to {high}; valid are 0..{num_classes - 1}. "
                f"Write dat.data.num_classes={top + 1}, or leave it out."
            )
        elif known == 0 and high >= MOST_CLASSES:
            problems.append(
                f"The labels of the {part} run from {low} to {high}, which would be "
                f"{high + 1} classes: number the classes from 0, one after the other."
            )
    raise_all(problems)
    return top + 1


def _warn_of_empty_classes(labels: Tensor, num_classes: int, names: tuple[str, ...] | None) -> None:
    """Name the classes without a training image, which a model cannot learn."""
    empty = sorted(set(range(num_classes)) - set(labels.tolist()))
    known = names or ()
    if empty:
        logger.warning(
            "%d of %d classes have no training image: %s. Number the classes one after the other, "
            "or write dat.data.num_classes=%d if it is meant.",
            len(empty),
            num_classes,
            listed(str(i) if i >= len(known) else known[i] for i in empty),
            num_classes,
        )


def _split(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    kept, held = hold_out(labels, fraction, seed)
    for part, indices in {"training": kept, "validation": held}.items():
        if not indices and fraction > 0:
            raise DataError(
                f"dat.data.validation_fraction={fraction} of {len(labels)} images leaves the "
                f"{part} split empty; write another fraction, or 0 for no validation split."
            )
    return kept, held
