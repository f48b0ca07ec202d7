"""Labels: class indices, or probabilities of the classes, from whatever means one of them.

=============================  ==================================================================
given                          becomes
=============================  ==================================================================
integers ``(B,)``, ``(B, 1)``  class indices, int64; negative ones where labels may be missing
one-hot ``(B, K)``, integer    class indices
floats ``(B, K)``              probabilities, where each row sums to 1
floats ``(B,)``, ``(B, 1)``    in [0, 1]: the probability of the second of two classes
booleans                       as integers
arrays and lists               as tensors
=============================  ==================================================================

Everything else is refused: several labels an image, regression, maps of labels.

Shapes: ``B`` images, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dat_ds.errors import DataError

MOST_CLASSES = 2**20
"""Classes that data may have; labels beyond are taken for something else, such as identifiers."""
UNLABELLED = -1
_FIRST_PSEUDO_LABEL = -2
_IGNORED = -100  # by torch's cross-entropy, and by transformers' data collators
_SUM_SLACK = 1e-2  # of probabilities in 16-bit floats
_OWN_LOSS = (
    "For other targets give a loss of your own: to an attack a callable loss, in training an "
    "objective whose head is 'features'."
)


@dataclass(frozen=True)
class Labels:
    """Labels of a batch.

    Attributes:
        y: Class indices ``(B,)`` int64, or probabilities ``(B, K)``.
        faulty: Rows whose values are not what ``kind`` says ``(B,)``; None where all are.
        kind: What they were taken for.
        width: Classes that a row has a place for; None for class indices.
    """

    y: Tensor
    faulty: Tensor | None
    kind: str
    width: int | None = None


def pseudo_label(classes: Tensor) -> Tensor:
    """Classes as pseudo-labels: ``-2 - c``."""
    return _FIRST_PSEUDO_LABEL - classes


def classes_of(y: Tensor) -> Tensor:
    """The classes of labels ``(B,)``, true or pseudo; ``UNLABELLED`` where there is none."""
    return torch.where(y < UNLABELLED, _FIRST_PSEUDO_LABEL - y, y)


def as_labels(y: Any, num_images: int) -> Labels:
    """Labels of ``num_images`` images, by what can be told without waiting for the device.

    Raises:
        DataError: For another number of labels, or what is none.
    """
    if not isinstance(y, Tensor):
        try:
            y = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"Labels are a {type(y).__name__}: give class indices as a tensor."
            ) from None
    y = y.detach().clone() if y.is_inference() else y.detach()
    shape = tuple(y.shape)
    if y.is_complex() or y.ndim not in (1, 2):
        raise DataError(
            f"Labels are {y.dtype} of shape {shape}: give class indices (B,) or probabilities "
            "(B, K)."
        )
    if len(y) != num_images:
        raise DataError(f"{num_images} images have labels of shape {shape}: give one for each.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.squeeze(1)
    if y.ndim == 1 and y.is_floating_point():
        inside = (y >= 0) & (y <= 1)
        p = y.to(torch.promote_types(y.dtype, torch.float32))
        return Labels(torch.stack([1 - p, p], dim=1), ~inside, "one number an image", 2)
    if y.ndim == 1:
        return Labels(y.to(torch.int64), None, "class indices")
    if y.is_floating_point():
        sums_to_one = (y.float().sum(dim=1) - 1).abs() <= _SUM_SLACK
        fits = sums_to_one & (y >= 0).all(dim=1)
        return Labels(y, ~fits, "probabilities", y.shape[1])
    y = y.to(torch.int64)
    one_hot = (y.sum(dim=1) == 1) & ((y == 0) | (y == 1)).all(dim=1)
    return Labels(y.argmax(dim=1), ~one_hot, "one-hot", y.shape[1])


def describe_faulty_labels(labels: Labels, given: Any) -> str:
    """In words, what is wrong with labels of which some are faulty; waits for the device."""
    given = torch.as_tensor(given)
    assert labels.faulty is not None
    row = int(labels.faulty.int().argmax())
    if labels.kind == "one number an image":
        return (
            f"Labels are floating-point and hold {given[row].item():g}{_at(row, given)}: "
            "regression is not supported. Give class indices, as y.long(), or probabilities. "
            f"{_OWN_LOSS}"
        )
    return (
        f"Labels have {given.shape[1]} values an image, which are neither one-hot nor "
        f"probabilities that sum to 1{_at(row, given)}: several labels an image are not "
        f"supported. Give class indices. {_OWN_LOSS}"
    )


def _at(row: int, y: Tensor) -> str:
    """Where in a batch a label is; nothing for a single one."""
    return f" (image {row} of {len(y)})" if len(y) > 1 else ""


def check_width(labels: Labels, num_classes: int) -> None:
    """Refuse rows for another number of classes than the model has.

    Raises:
        DataError: With both numbers.
    """
    if labels.width in (None, num_classes):
        return
    if labels.kind == "one number an image":
        words = (
            "one floating-point number an image: that is for models of two classes or of one "
            "output; give class indices, as y.long()"
        )
    else:
        words = f"rows for {labels.width} classes: give {num_classes} columns, or class indices"
    raise DataError(f"The model has {num_classes} outputs, and the labels are {words}.")


def out_of_range(
    y: Tensor, num_classes: int | None, *, may_be_pseudo: bool, may_miss: bool
) -> Tensor:
    """Labels ``(B,)`` that name no class, without waiting for the device.

    Args:
        y: Class indices ``(B,)``; probabilities are never out of range.
        num_classes: Of the model; None where it is not known yet.
        may_be_pseudo: Whether a label below -1 is a pseudo-label.
        may_miss: Whether -1 is an image without a label.
    """
    if y.is_floating_point():
        return torch.zeros(len(y), dtype=torch.bool, device=y.device)
    if not may_be_pseudo:
        outside = y < (UNLABELLED if may_miss else 0)
    else:
        # Of many classes, -100 is a pseudo-label as well: it is refused all the same.
        outside = y == _IGNORED
        if not may_miss:
            outside |= y == UNLABELLED
        if num_classes is not None:
            outside |= y <= _FIRST_PSEUDO_LABEL - num_classes
    if num_classes is not None:
        outside |= y >= num_classes
    return outside


def describe_out_of_range(
    y: Tensor, outside: Tensor, num_classes: int | None, without_label: str
) -> str:
    """In words, which label names no class; waits for the device.

    Args:
        y: Class indices ``(B,)``.
        outside: Of :func:`out_of_range`.
        num_classes: As there.
        without_label: Why an image without a label is of no use.
    """
    row = int(outside.int().argmax())
    value = int(y[row])
    words = f"Labels hold {value}{_at(row, y)}"
    if value == _IGNORED:
        return (
            f"{words}, as for ignored tokens of a text: write {UNLABELLED} for an image without a "
            "label, where the objective takes those; else filter it out."
        )
    if value == UNLABELLED:
        return f"{words}, an image without a label, {without_label}"
    last = "K - 1" if num_classes is None else num_classes - 1
    words = f"{words}: class indices go from 0 to {last}."
    if value == num_classes and len(y) > 1 and bool((y > 0).all()):
        return f"{words} No label is 0, so they seem to count from 1: subtract 1."
    return words
