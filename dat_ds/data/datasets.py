"""The datasets by name, their splits, and the refusal of data that does not fit.

Every dataset yields ``(x, y)``: ``x`` float32 ``(C, H, W)`` in [0, 1], ``y`` int in
``0 .. num_classes - 1``. Adding one is a reader function and a row of `DATASETS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from dat_ds.data.images import Channels, FolderImages, ImageShape, TensorImages
from dat_ds.data.mixing import Mixed
from dat_ds.data.readers.cifar import read_cifar
from dat_ds.data.readers.digits import read_digits
from dat_ds.data.readers.imagefolder import read_imagefolder
from dat_ds.data.readers.npz import array_problems, images_from_arrays, load_npz, read_npz
from dat_ds.data.readers.source import Request, Source, raise_all
from dat_ds.data.readers.synthetic import read_synthetic
from dat_ds.data.sampler import hold_out
from dat_ds.data.transforms import (
    AUGMENTATIONS,
    Augmented,
    Sample,
)
from dat_ds.data.unlabelled import (
    IMAGE_SUFFIXES,
    UNLABELLED,
    PartlyLabelled,
    image_files,
)
from dat_ds.errors import DataError


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
        std: Likewise, at least one grey level (1/255).
        name: Name the splits were built by.
        class_names: Names in label order, or None where the data has none.
        mixture: What ``train`` is made of where it has unlabelled images, else None.
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
    mixture: PartlyLabelled | None = None


def build_data(
    name: str,
    *,
    path: str | Path | None = None,
    validation_fraction: float = 0.1,
    augment: str = "none",
    img_size: int | None = None,
    num_classes: int | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    labelled_fraction: float = 1.0,
    drop_unlabelled: bool = False,
    unlabelled_path: str | Path | None = None,
    labelled_repeats: int = 1,
    seed: int = 0,
) -> DataSplits:
    """Read a dataset, check it, and hold a validation split out of its training part.

    Args:
        name: ``digits`` (scikit-learn, 1x8x8, fixed stratified test fifth), ``cifar10`` and
            ``cifar100`` (torchvision's files), ``npz`` (uint8 arrays ``x_train y_train x_test
            y_test`` or ``images labels test_images test_labels``; NHWC or NHW), ``imagefolder``
            (``train/<class>/*.jpg`` and ``test`` or else ``val``), or ``synthetic`` (random images
            with a class-dependent pattern: for benchmarks only, a score on them means nothing).
        path: Folder (cifar, imagefolder) or file (npz); refused for the other two.
        validation_fraction: Part of the training data, ``[0, 1)``, equal per label; 0 gives an
            empty validation split.
        augment: One of `AUGMENTATIONS`; applies to ``train`` only.
        img_size: Side of the images. imagefolder: 224 unless told, aspect ratio kept; the others:
            their own size unless told, ratio not kept.
        num_classes: None takes the number the data has; a larger number is allowed.
        num_train: Training images of ``synthetic`` (512).
        num_test: Test images of ``synthetic`` (128).
        image_shape: ``(C, H, W)`` of ``synthetic`` (3, 32, 32).
        mixup: Alpha of mixup on ``train``, after ``augment``; 0 for none. See `Mixed`.
        cutmix: Alpha of CutMix on ``train``; likewise.
        labelled_fraction: Part of the training images that keep their labels, in (0, 1], equal per
            label; the others count as unlabelled.
        drop_unlabelled: Leave those others out.
        unlabelled_path: Further unlabelled training images: a folder of image files at any depth,
            or an npz file with uint8 ``images`` (N, H, W, C) or (N, H, W).
        labelled_repeats: How often ``train`` holds each labelled image, where there are unlabelled
            ones: makes up for few labels among many images.
        seed: Of the splits, the augmentation, and the images of ``synthetic``.

    Returns:
        The splits. ``train`` says of each label what is known: see `PartlyLabelled`.

    Raises:
        DataError: Anything wrong with the arguments or the data; what can be seen together is
            reported together.
    """
    request = Request(name, path, img_size, num_classes, num_train, num_test, image_shape, seed)
    raise_all(_argument_problems(request, validation_fraction, augment))
    source = DATASETS[name](request)
    num_labels = _check_labels(source, num_classes)
    kept, held = _split(source.train.labels, validation_fraction, seed)
    shape = source.train.image_shape
    train: Dataset[Any] = Subset(source.train, kept)
    mixture = None
    if labelled_fraction < 1 or unlabelled_path is not None:
        labels = source.train.labels[kept]
        known, hidden = hold_out(labels, 1 - labelled_fraction, seed)
        if not known:
            raise DataError(
                f"dat.data.labelled_fraction={labelled_fraction} of {len(kept)} training images "
                "leaves no label at all: write a larger fraction."
            )
        labelled = Subset(source.train, [kept[i] for i in known])
        unlabelled: list[Dataset[Any]] = (
            [] if drop_unlabelled else [Subset(source.train, [kept[i] for i in hidden])]
        )
        if unlabelled_path is not None:
            unlabelled.append(_read_unlabelled(Path(unlabelled_path), img_size, shape))
        train = labelled
        if unlabelled:
            train = mixture = PartlyLabelled(labelled, ConcatDataset(unlabelled), labelled_repeats)
    total = num_classes or max(source.num_classes, num_labels)
    augmented: Dataset[Any] = Augmented(train, augment, seed, size=(shape[1], shape[2]))
    if mixup or cutmix:
        augmented = Mixed(augmented, total, mixup=mixup, cutmix=cutmix, seed=seed)
    return DataSplits(
        train=augmented,
        validation=Subset(source.train, held),
        test=source.test,
        num_classes=total,
        image_shape=shape,
        mean=source.statistics[0],
        std=source.statistics[1],
        name=name,
        class_names=source.class_names,
        mixture=mixture,
    )


def _read_unlabelled(
    path: Path, img_size: int | None, shape: ImageShape
) -> TensorImages | FolderImages:
    """Images without labels, of the shape of the labelled ones."""
    where = f"dat.data.unlabelled_path={str(path)!r}"
    if path.is_dir():
        files = image_files(path)
        if not files:
            raise DataError(f"{where} holds no image file ({', '.join(IMAGE_SUFFIXES)}).")
        images: TensorImages | FolderImages = FolderImages(
            [(file, UNLABELLED) for file in files], img_size or shape[1]
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
        images = images_from_arrays(x, y, img_size)
    if images.image_shape != shape:
        raise DataError(
            f"{where} has images of shape {list(images.image_shape)} (channels, height, width), "
            f"the labelled ones have {list(shape)}: write dat.data.img_size={shape[1]}, or convert "
            "them."
        )
    return images


def _argument_problems(request: Request, validation_fraction: float, augment: str) -> list[str]:
    problems = _choice_problems("name", request.name, DATASETS)
    problems += _choice_problems("augment", augment, AUGMENTATIONS)
    if not 0 <= validation_fraction < 1:
        problems.append(
            f"dat.data.validation_fraction={validation_fraction} must be at least 0 and below 1; "
            "write 0.1 for a tenth of the training data."
        )
    problems += [
        f"dat.data.{key}={value} must be at least 1; leave it out for the default."
        for key in ("img_size", "num_classes", "num_train", "num_test")
        if (value := getattr(request, key)) is not None and value < 1
    ]
    shape = request.image_shape
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        problems.append(
            f"dat.data.image_shape={list(shape)} must be channels, height, width, each at least 1; "
            "write [3, 32, 32]."
        )
    return problems + _unused_problems(request)


def _choice_problems(key: str, value: str, choices: Iterable[str]) -> list[str]:
    if value in choices:
        return []
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return [f"dat.data.{key}={value!r} is unknown{hint}. Valid: {', '.join(choices)}."]


def _unused_problems(request: Request) -> list[str]:
    """Refuse a setting that this dataset would ignore, and a path it cannot do without."""
    if request.name not in DATASETS:
        return []
    made_up = ("num_train", "num_test", "image_shape")
    unused = ["path"] if request.name in ("digits", "synthetic") else []
    unused += [] if request.name == "synthetic" else made_up
    problems = [
        f"dat.data.{key}={getattr(request, key)!r} has no meaning for dat.data.name="
        f"{request.name!r}; remove it."
        for key in unused
        if getattr(request, key) is not None
    ]
    if "path" not in unused and request.path is None:
        problems.append(
            f"dat.data.path is not set, but dat.data.name={request.name!r} is read from disk; "
            "write where the data lies."
        )
    return problems


def _check_labels(source: Source, num_classes: int | None) -> int:
    """Return the largest label plus 1; refuse empty parts and labels outside ``0 .. num - 1``."""
    parts = {"train": source.train.labels, "test": source.test.labels}
    raise_all(f"The {part} part has no images." for part, y in parts.items() if len(y) == 0)
    ranges = {part: (int(y.min()), int(y.max())) for part, y in parts.items()}
    top = max(high for _, high in ranges.values())
    problems = []
    for part, (low, high) in ranges.items():
        if low < 0:
            problems.append(
                f"The labels of the {part} part run from {low} to {high}; they must be 0 or more. "
                "Number the classes from 0."
            )
        if num_classes is not None and high >= num_classes:
            problems.append(
                f"dat.data.num_classes={num_classes}, but the labels of the {part} part run from "
                f"{low} to {high}; valid are 0..{num_classes - 1}. "
                f"Write dat.data.num_classes={top + 1}, or leave it out."
            )
    raise_all(problems)
    return top + 1


def _split(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    kept, held = hold_out(labels, fraction, seed)
    for part, indices in {"training": kept, "validation": held}.items():
        if not indices and fraction > 0:
            raise DataError(
                f"dat.data.validation_fraction={fraction} of {len(labels)} images leaves the "
                f"{part} split empty; write another fraction, or 0 for no validation split."
            )
    return kept, held


# name -> reader; the order is that of error messages.
DATASETS: dict[str, Callable[[Request], Source]] = {
    "digits": read_digits,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "npz": read_npz,
    "imagefolder": read_imagefolder,
    "synthetic": read_synthetic,
}
