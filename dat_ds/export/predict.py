"""What a trained model says of image files, which it sees as it saw the test images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_ds.data.decoding import read_image
from dat_ds.data.images import FolderImages
from dat_ds.data.readers.source import raise_all
from dat_ds.data.transforms import resize_square, to_unit
from dat_ds.data.unlabelled import IMAGE_SUFFIXES, image_files
from dat_ds.errors import DataError, ModelError
from dat_ds.evaluation.curves import name_of
from dat_ds.export.source import Source, read_source

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """Likeliest classes of an image.

    Args:
        file: Its path.
        classes: Their names, likeliest first; numbers where the run has no names.
        probabilities: Of the softmax, as many.
    """

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "file": self.file,
            "classes": list(self.classes),
            "probabilities": list(self.probabilities),
        }

    def __str__(self) -> str:
        pairs = zip(self.classes, self.probabilities, strict=True)
        return f"{self.file}: " + ", ".join(f"{name} {share:.1%}" for name, share in pairs)


def predict(target: Path, images: Sequence[str], *, top: int = 3) -> list[Prediction]:
    """Classify image files.

    Args:
        target: A run, one of its checkpoints, or a saved model.
        images: Files, and folders whose image files are taken, also from folders inside.
        top: Classes of each image, at most.

    Returns:
        One prediction for each file, in order.

    Raises:
        ModelError: For a model that does not classify.
        DataError: With all files that cannot be read as the model's images.
    """
    if top < 1:
        raise DataError(f"--top {top}: write at least 1.")
    files = _files(images)
    source = read_source(target)
    if source.head != "classes":
        raise ModelError(
            f"The model in '{target}' was trained for {source.head!r} and names no classes: "
            "fine-tune it on labelled images first (dat.model.pretrained)."
        )
    found: list[Prediction] = []
    names = source.spec.get("class_names")
    for first in range(0, len(files), _BATCH):
        batch = files[first : first + _BATCH]
        with torch.no_grad():
            shares = source.model(_pixels(batch, source)).double().softmax(dim=1)
        likeliest = shares.topk(min(top, shares.shape[1]), dim=1)
        found += [
            Prediction(file, tuple(name_of(k, names) for k in of_file), tuple(values))
            for file, of_file, values in zip(
                batch, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
            )
        ]
    return found


def _files(images: Sequence[str]) -> list[str]:
    """Every file, and those of every folder.

    Raises:
        DataError: With all that are not there, and folders without images.
    """
    files, problems = [], []
    for path in images:
        inside = image_files(Path(path), "IMAGE") if os.path.isdir(path) else [path]
        if not os.path.exists(path):
            problems.append(f"IMAGE {path}: there is no such file or folder.")
        elif not inside:
            problems.append(f"IMAGE {path} holds no image file ({', '.join(IMAGE_SUFFIXES)}).")
        files += inside
    raise_all(problems)
    return files


def _pixels(files: Sequence[str], source: Source) -> Tensor:
    """Images ``(B, C, H, W)`` in [0, 1], made as the run makes its test images.

    Raises:
        DataError: With all files that cannot be read.
    """
    pixels, problems = [], []
    for file in files:
        try:
            pixels.append(_as_trained(read_image(file, "IMAGE"), file, source))
        except DataError as error:
            problems.append(str(error))
    raise_all(problems)
    return torch.stack(pixels)


def _as_trained(image: Tensor, file: str, source: Source) -> Tensor:
    """An RGB image ``(3, H, W)`` of any size as the model takes it."""
    channels, height, width = source.image_shape
    if channels == 1:
        if not (image == image[:1]).all():
            raise DataError(
                f"IMAGE {file} has colours, and the model was trained on grey images: convert it."
            )
        image = image[:1]
    elif channels != 3:
        raise DataError(f"IMAGE {file}: the model takes {channels} channels, not the 3 of a file.")
    share = source.crop_share
    if share is not None:
        return FolderImages([(file, 0)], height, "IMAGE", share).fitted(image, 0)
    if tuple(image.shape[1:]) != (height, width):
        if height != width:
            found = f"{image.shape[1]} x {image.shape[2]}"
            raise DataError(
                f"IMAGE {file} has {found} pixels, and the model takes {height} x {width}: resize "
                "it."
            )
        image = resize_square(to_unit(image), height)
    return to_unit(image).clamp(0, 1)
