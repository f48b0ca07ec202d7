"""The datasets by name, their splits, and the refusal of data that does not fit.

Every dataset yields ``(x, y)``: ``x`` float32 ``(C, H, W)`` in [0, 1], ``y`` int in
``0 .. num_classes - 1``. Adding one is a reader function and a row of `DATASETS`.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from dat_ds.data.mixing import Mixed
from dat_ds.data.sampler import hold_out, seeded_generator
from dat_ds.data.transforms import (
    AUGMENTATIONS,
    Augmented,
    Sample,
    resize_center_crop,
    resize_square,
    to_unit,
)
from dat_ds.data.unlabelled import (
    IMAGE_SUFFIXES,
    UNLABELLED,
    PartlyLabelled,
    image_files,
)
from dat_ds.errors import DataError

Channels = tuple[float, ...]
ImageShape = tuple[int, int, int]

# Per channel over the 50 000 training images, pixel units.
_CIFAR_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# The constants torchvision's and timm's ImageNet models are trained with.
_IMAGENET_STATISTICS: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DIGITS_TEST_FRACTION = 0.2


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


class TensorImages(Dataset[Sample]):
    """Images held in memory and converted one at a time.

    Args:
        images: ``(N, C, H, W)``, uint8 in 0..255 or float in [0, 1].
        labels: Integer labels, shape ``(N,)``.
        img_size: Side to resize to (ratio not kept), or None to leave the images as they are.
    """

    def __init__(self, images: Tensor, labels: Tensor, img_size: int | None = None) -> None:
        self.images = images
        self.labels = labels.to(torch.int64)
        self.img_size = img_size
        channels, height, width = images.shape[1:]
        self.image_shape: ImageShape = (channels, img_size or height, img_size or width)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Return ``(x, y)`` with ``x`` float32 of `image_shape` in [0, 1]."""
        x = to_unit(self.images[index])
        if self.img_size is not None:
            x = resize_square(x, self.img_size).clamp(0, 1)
        return x, int(self.labels[index])

    def raw(self, index: int) -> Sample:
        """Return the stored image before any resizing, and its label."""
        return self.images[index], int(self.labels[index])


class FolderImages(Dataset[Sample]):
    """Image files read on demand, as RGB.

    Args:
        samples: ``(file, label)`` pairs.
        img_size: Side of the evaluation image: shorter edge to ``img_size * 256 / 224``, then the
            central square.
    """

    def __init__(self, samples: list[tuple[str, int]], img_size: int) -> None:
        self.samples = samples
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        self.img_size = img_size
        self.image_shape: ImageShape = (3, img_size, img_size)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """Return ``(x, y)`` with ``x`` float32 of `image_shape` in [0, 1].

        Raises:
            DataError: The file cannot be decoded.
        """
        image, y = self.raw(index)
        return to_unit(resize_center_crop(image, self.img_size)), y

    def raw(self, index: int) -> Sample:
        """Return the whole image, uint8 ``(3, H, W)`` of the file's own size, and its label.

        Raises:
            DataError: The file cannot be decoded.
        """
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB"))
        # Pillow's decoders raise SyntaxError and ValueError too for a damaged file.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"dat.data.path: cannot read the image {path} ({error}). "
                "Replace the file or remove it."
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1), label


@dataclass(frozen=True)
class _Request:
    """The arguments of `build_data` that concern reading."""

    name: str
    path: str | Path | None
    img_size: int | None
    num_classes: int | None
    num_train: int | None
    num_test: int | None
    image_shape: tuple[int, ...] | None
    seed: int


@dataclass(frozen=True)
class _Source:
    """A dataset as read: both parts, (mean, std), names, and its number of classes (0: count)."""

    train: TensorImages | FolderImages
    test: TensorImages | FolderImages
    statistics: tuple[Channels, Channels]
    class_names: tuple[str, ...] | None = None
    num_classes: int = 0


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
    request = _Request(name, path, img_size, num_classes, num_train, num_test, image_shape, seed)
    _raise_all(_argument_problems(request, validation_fraction, augment))
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
        arrays = _load_npz(path, where)
        if "images" not in arrays:
            raise DataError(
                f"{where} lacks the array 'images' (it has {', '.join(arrays) or 'none'}): write "
                "it with numpy.savez(file, images=...), uint8 (N, H, W, C) or (N, H, W)."
            )
        x = arrays["images"]
        y = np.full(len(x) if x.ndim else 0, UNLABELLED)
        _raise_all(_array_problems(where, "images", x, "labels", y))
        images = _from_arrays(x, y, img_size)
    if images.image_shape != shape:
        raise DataError(
            f"{where} has images of shape {list(images.image_shape)} (channels, height, width), "
            f"the labelled ones have {list(shape)}: write dat.data.img_size={shape[1]}, or convert "
            "them."
        )
    return images


def _raise_all(problems: Iterable[str]) -> None:
    text = "\n".join(problems)
    if text:
        raise DataError(text)


def _argument_problems(request: _Request, validation_fraction: float, augment: str) -> list[str]:
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


def _unused_problems(request: _Request) -> list[str]:
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


def _check_labels(source: _Source, num_classes: int | None) -> int:
    """Return the largest label plus 1; refuse empty parts and labels outside ``0 .. num - 1``."""
    parts = {"train": source.train.labels, "test": source.test.labels}
    _raise_all(f"The {part} part has no images." for part, y in parts.items() if len(y) == 0)
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
    _raise_all(problems)
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


def _measure(images: Tensor) -> tuple[Channels, Channels]:
    """Return mean and standard deviation per channel, accumulated in float64 over chunks."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    total_squared = torch.zeros_like(total)
    for chunk in torch.split(images, 1024):
        pixels = to_unit(chunk).double().transpose(0, 1).flatten(1)
        total += pixels.sum(1)
        total_squared += pixels.square().sum(1)
    count = images.numel() // images.shape[1]
    mean = total / count
    # A constant channel has no spread, and models divide by it: one grey level is the floor.
    std = (total_squared / count - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def _read_digits(request: _Request) -> _Source:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target)
    # Seed 0 whatever the run's seed: scores of different seeds are on the same test images.
    train, test = hold_out(labels, _DIGITS_TEST_FRACTION, seed=0)
    data, test_data = (TensorImages(images[i], labels[i], request.img_size) for i in (train, test))
    names = tuple(str(digit) for digit in range(10))
    return _Source(data, test_data, _measure(data.images), names, num_classes=10)


def _read_cifar(request: _Request) -> _Source:
    kind: Any = getattr(torchvision.datasets, request.name.upper())
    parts = []
    try:
        for is_train in (True, False):
            data = kind(str(request.path), train=is_train, download=False)
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            parts.append(TensorImages(images, torch.tensor(data.targets), request.img_size))
    except (RuntimeError, OSError) as error:
        listed = [name for name, _ in kind.train_list + kind.test_list]
        files = ", ".join([*listed, kind.meta["filename"]])
        raise DataError(
            f"dat.data.path={str(request.path)!r} does not hold an intact {request.name} "
            f"({error}). Expected in its folder {kind.base_folder!r}: {files}. Get them once with "
            f"torchvision.datasets.{kind.__name__}({str(request.path)!r}, download=True)."
        ) from error
    names = tuple(data.classes)
    train, test = parts
    return _Source(train, test, _CIFAR_STATISTICS[request.name], names, num_classes=len(names))


_NPZ_LAYOUTS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("images", "labels", "test_images", "test_labels"),
)


def _read_npz(request: _Request) -> _Source:
    arrays = _load_npz(request.path, f"dat.data.path={str(request.path)!r}")
    layout = next((keys for keys in _NPZ_LAYOUTS if keys[0] in arrays), _NPZ_LAYOUTS[0])
    missing = [key for key in layout if key not in arrays]
    if missing:
        raise DataError(
            f"dat.data.path={str(request.path)!r} lacks the arrays {', '.join(missing)} (it has "
            f"{', '.join(arrays) or 'none'}). Save uint8 images and integer labels with "
            f"numpy.savez(file, {', '.join(f'{key}=...' for key in layout)}); a test part is "
            "needed because none is ever cut out of the training data."
        )
    where = f"dat.data.path={str(request.path)!r}"
    pairs = [(layout[0], layout[1]), (layout[2], layout[3])]
    problems = [p for x, y in pairs for p in _array_problems(where, x, arrays[x], y, arrays[y])]
    shapes = [arrays[x].shape[1:] for x, _ in pairs]
    if not problems and shapes[0] != shapes[1]:
        problems.append(
            f"{where}: {layout[0]} has images of shape {shapes[0]}, {layout[2]} of {shapes[1]}; "
            "they must be the same."
        )
    _raise_all(problems)
    train, test = (_from_arrays(arrays[x], arrays[y], request.img_size) for x, y in pairs)
    return _Source(train, test, _measure(train.images))


def _load_npz(path: str | Path | None, where: str) -> dict[str, np.ndarray[Any, Any]]:
    try:
        # Pickled objects in a data file could run code on loading.
        with np.load(str(path), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{where} is not a readable npz file of plain arrays ({error}). Write one with "
            "numpy.savez."
        ) from error


def _array_problems(
    where: str, x_key: str, x: np.ndarray[Any, Any], y_key: str, y: np.ndarray[Any, Any]
) -> list[str]:
    problems = []
    if x.dtype != np.uint8:
        problems.append(f"{where}: {x_key} is {x.dtype}; images must be uint8 in 0..255.")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 2, 3, 4)):
        problems.append(
            f"{where}: {x_key} has shape {x.shape}; it must be (N, H, W) or (N, H, W, C) with C "
            "from 1 to 4. Channels first? Write x.transpose(0, 2, 3, 1)."
        )
    if y.dtype.kind not in "iu" or y.ndim != 1:
        problems.append(
            f"{where}: {y_key} is {y.dtype} of shape {y.shape}; labels must be integers of shape "
            "(N,)."
        )
    if x.ndim and y.ndim and len(x) != len(y):
        problems.append(
            f"{where}: {x_key} has {len(x)} images but {y_key} has {len(y)} labels; they must be "
            "as many."
        )
    return problems


def _from_arrays(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], img_size: int | None
) -> TensorImages:
    images = torch.from_numpy(x if x.ndim == 4 else x[..., None]).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, torch.from_numpy(y.astype(np.int64)), img_size)


def _read_imagefolder(request: _Request) -> _Source:
    root = Path(str(request.path))
    test = next((root / part for part in ("test", "val") if (root / part).is_dir()), root / "test")
    missing = [str(part) for part in (root / "train", test) if not part.is_dir()]
    if missing:
        raise DataError(
            f"dat.data.path={str(root)!r} lacks the folders {', '.join(missing)}. "
            "Expected: train/<class>/*.jpg and test/<class>/*.jpg (or val in place of test)."
        )
    folders = [_scan(root / "train"), _scan(test)]
    names, test_names = (set(folder.classes) for folder in folders)
    if names != test_names:
        raise DataError(
            f"dat.data.path={str(root)!r}: the classes of train and {test.name} differ. Only in "
            f"train: {_listed(names - test_names)}; only in {test.name}: "
            f"{_listed(test_names - names)}. Make the folder names the same."
        )
    data, test_data = (FolderImages(folder.samples, request.img_size or 224) for folder in folders)
    classes = tuple(folders[0].classes)
    return _Source(data, test_data, _IMAGENET_STATISTICS, classes, num_classes=len(classes))


def _scan(folder: Path) -> Any:
    try:
        return torchvision.datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"dat.data.path: no dataset in {folder} ({error}). "
            "Every class is a subfolder with at least one image file."
        ) from error


def _listed(names: set[str]) -> str:
    """Name at most five, so that a wrong ImageNet folder does not print a thousand."""
    shown = ", ".join(sorted(names)[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _read_synthetic(request: _Request) -> _Source:
    """Make images that are half a fixed random pattern of their class and half noise."""
    shape = tuple(request.image_shape or (3, 32, 32))
    num_classes = request.num_classes or 10
    generator = seeded_generator("synthetic", request.seed)

    def draw(count: int) -> Tensor:
        return torch.randint(128, (count, *shape), generator=generator, dtype=torch.uint8)

    patterns = draw(num_classes)
    parts = []
    for count in (request.num_train or 512, request.num_test or 128):
        labels = torch.arange(count) % num_classes
        parts.append(TensorImages(draw(count) + patterns[labels], labels, request.img_size))
    train, test = parts
    return _Source(train, test, _measure(train.images), num_classes=num_classes)


# name -> reader; the order is that of error messages.
DATASETS: dict[str, Callable[[_Request], _Source]] = {
    "digits": _read_digits,
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "npz": _read_npz,
    "imagefolder": _read_imagefolder,
    "synthetic": _read_synthetic,
}
