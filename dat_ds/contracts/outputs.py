"""Outputs of a model: one tensor of logits, from whatever holds it.

A tensor; an object or a mapping with ``logits``; or a tuple, a list or another mapping in which one
tensor alone can be meant. Of several tensors of one shape the first is the model's output and the
others are those of auxiliary heads, as in torchvision and timm. One output for an image is the
logit of the second of two classes, whose first has the logit 0.

Shapes: ``B`` images, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dat_ds.errors import ModelError

_REMEDY = "return the logits (B, K), or a dict or an object with 'logits'"


def tensor_of(outputs: Any, num_images: int) -> Tensor:
    """The model's output tensor, of any shape.

    Args:
        outputs: Returned by the model's call.
        num_images: Images that it was called with.

    Raises:
        ModelError: If no tensor, or none for each image, can be told to be it.
    """
    found = outputs if isinstance(outputs, Tensor) else _found_in(outputs, num_images)
    if not found.is_floating_point():
        raise ModelError(f"The model returns {found.dtype}, such as classes: {_REMEDY}.")
    if not found.ndim or len(found) != num_images:
        raise ModelError(
            f"The model returns the shape {tuple(found.shape)} for {num_images} images: {_REMEDY}."
        )
    return found


def logits_of(outputs: Any, num_images: int) -> Tensor:
    """Logits ``(B, K)`` with ``K`` at least 2.

    Args:
        outputs: Returned by the model's call.
        num_images: Images ``B`` that it was called with.

    Raises:
        ModelError: As :func:`tensor_of`, and for other shapes.
    """
    if isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1:
        found = outputs
        if found.is_floating_point() and len(found) == num_images:
            return found
    found = tensor_of(outputs, num_images)
    if found.ndim == 1:
        found = found.unsqueeze(1)
    if found.ndim != 2 or found.shape[1] == 0:
        raise ModelError(
            f"The model returns the shape {tuple(found.shape)} for {num_images} images, which are "
            f"not logits of classes: {_REMEDY}."
        )
    if found.shape[1] == 1:
        return torch.cat([torch.zeros_like(found), found], dim=1)
    return found


def check_finite(outputs: Tensor) -> None:
    """Refuse outputs that are not finite, among which none is the largest; waits for the device.

    Raises:
        ModelError: With their number.
    """
    finite = outputs.isfinite().flatten(1).all(dim=1) if outputs.ndim > 1 else outputs.isfinite()
    if not bool(finite.all()):
        raise ModelError(
            f"The model returns NaN or infinite outputs for {int((~finite).sum())} of "
            f"{len(outputs)} images: its weights or its forward are damaged."
        )


def _found_in(outputs: Any, num_images: int) -> Tensor:
    named = outputs.get("logits") if isinstance(outputs, Mapping) else None
    named = getattr(outputs, "logits", None) if named is None else named
    if isinstance(named, Tensor):
        return named
    items: Iterable[Any] = ()
    if isinstance(outputs, Mapping):
        items = outputs.values()
    elif isinstance(outputs, (tuple, list)):
        items = outputs
    tensors = [item for item in items if isinstance(item, Tensor) and item.is_floating_point()]
    fitting = [t for t in tensors if t.ndim in (1, 2) and len(t) == num_images]
    if fitting and all(t.shape == fitting[0].shape for t in fitting):
        return fitting[0]
    shown = ", ".join(str(tuple(t.shape)) for t in tensors)
    holding = f" of tensors {shown}" if shown else " without a tensor of logits"
    keys = f" with the keys {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise ModelError(f"The model returns a {type(outputs).__name__}{holding}{keys}: {_REMEDY}.")
