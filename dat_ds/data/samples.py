"""Samples and batches as datasets give them, converted to images and labels; nothing is guessed.

Shapes: ``B`` samples of a micro-batch, ``C H W`` of an image, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dat_ds.data.transforms import to_unit
from dat_ds.errors import DataError

IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels")
Batch = tuple[Tensor, Tensor]
"""Images and labels."""
CollateFunction = Callable[[list[Any]], Any]
"""Samples of a micro-batch to ``(x, y)``, or to a dict of them."""
_CHANNELS_LAST = (1, 3, 4)
_OTHERWISE = "or write a collate_fn that gives (x, y)"


class Collator:
    """Makes micro-batches of a dataset's samples.

    A sample is ``(image, label)``, or a dict with one of ``IMAGE_KEYS`` and one of ``LABEL_KEYS``.
    Images: floating-point ``(C, H, W)`` in [0, 1], tensors or arrays; the same in uint8, 0..255; or
    PIL images of mode L or RGB. Labels: integers, and what :func:`torch.as_tensor` takes.

    Args:
        function: The user's own: a list of samples to ``(x, y)`` or to a dict with the keys above,
            ``x`` ``(B, C, H, W)``. None stacks the samples.
    """

    def __init__(self, function: CollateFunction | None = None) -> None:
        self._function = function

    def __call__(self, samples: Sequence[Any], indices: Sequence[int]) -> Batch:
        """Batch of at least one sample.

        Args:
            samples: As the dataset gave them.
            indices: Dataset index of each, for messages.

        Returns:
            Float32 images ``(B, C, H, W)`` in [0, 1], and labels: int64 ``(B,)``, or what their
            own shape and floating-point type make of them.

        Raises:
            DataError: For a sample or batch that cannot be converted, with what is wrong about it.
        """
        if self._function is not None:
            return _read_batch(self._function(list(samples)), len(samples))
        pairs = [_read_sample(s, i) for s, i in zip(samples, indices, strict=True)]
        x = _stack([x for x, _ in pairs], indices, "an image")
        _check_layout(tuple(x.shape[1:]), f"Sample {indices[0]}")
        labels = [y for _, y in pairs]
        if all(type(y) is int for y in labels):
            return x, torch.tensor(labels)
        return x, _stack([torch.as_tensor(y) for y in labels], indices, "a label")

    def empty(self, sample: Any) -> Batch:
        """Batch of no sample, of the shapes and types that ``sample`` alone gives."""
        x, y = self([sample], [0])
        return x.new_empty((0, *x.shape[1:])), y.new_empty((0, *y.shape[1:]))


def is_stream(data: object) -> bool:
    """Whether ``data`` can only be read from its beginning on."""
    return isinstance(data, IterableDataset) or (
        hasattr(data, "__iter__") and not hasattr(data, "__getitem__")
    )


def refuse_no_dataset(data: object) -> None:
    """Refuse what holds a dataset but is none.

    Raises:
        DataError: For a DataLoader, a dict of splits, or an iterator, with what to pass instead.
    """
    if isinstance(data, DataLoader):
        raise DataError(
            "The data are a DataLoader, whose batches are not those of the ranks: pass its dataset "
            "(loader.dataset), and for training its collate_fn if it has one of its own."
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"The data are a {type(data).__name__} with the keys {_listed(data)}: pass one of its "
            "datasets."
        )
    if hasattr(data, "__next__"):
        raise DataError(
            f"The data are a {type(data).__name__}, an iterator, which can be read only once: pass "
            "a dataset, or an IterableDataset whose __iter__ makes the iterator."
        )


def refuse_unless_map_style(data: object) -> None:
    """Refuse data whose samples cannot be counted and read by index.

    Raises:
        DataError: With what to pass instead.
    """
    refuse_no_dataset(data)
    if is_stream(data):
        raise DataError(
            f"The data are a stream ({type(data).__name__}), whose samples cannot be divided by "
            "index: pass a map-style dataset, such as a list of its first samples."
        )
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"The data are a {type(data).__name__} without __len__ and __getitem__: pass a "
            "map-style dataset of (image, label)."
        )


def _read_sample(sample: Any, index: int) -> tuple[Tensor, Any]:
    """Image and label, ready to be stacked."""
    # The common case first: it costs nothing but these comparisons.
    if type(sample) is tuple and len(sample) == 2:
        x, y = sample
        if type(x) is Tensor and x.dtype is torch.float32 and type(y) is int:
            return (x.detach() if x.requires_grad else x), y
    what = f"Sample {index}"
    x, y = _pair_of(sample, what)
    return _read_image(x, what), _read_label(y, what)


def _read_batch(batch: Any, count: int) -> Batch:
    what = "The batch of collate_fn"
    x, y = _pair_of(batch, what)
    x, y = _read_image(x, what), _read_label(y, what)
    for name, tensor in (("images", x), ("labels", y)):
        if tensor.ndim == 0 or len(tensor) != count:
            raise DataError(
                f"{what} has {name} of shape {list(tensor.shape)} for {count} samples: give one "
                "for each sample, since batches have their place in the global batch. Filter "
                "samples in the dataset."
            )
    _check_layout(tuple(x.shape[1:]), what)
    return x, y


def _pair_of(sample: Any, what: str) -> tuple[Any, Any]:
    if isinstance(sample, Mapping):
        images = [key for key in IMAGE_KEYS if key in sample]
        labels = [key for key in LABEL_KEYS if key in sample]
        if len(images) == len(labels) == 1:
            return sample[images[0]], sample[labels[0]]
        raise DataError(
            f"{what} has the keys {_listed(sample)}: give exactly one of {', '.join(IMAGE_KEYS)} "
            f"and one of {', '.join(LABEL_KEYS)}, {_OTHERWISE}."
        )
    if isinstance(sample, (tuple, list)):
        if len(sample) == 2:
            return sample[0], sample[1]
        found = f"a {type(sample).__name__} of {len(sample)}"
    else:
        found = f"of class {type(sample).__name__}"
    raise DataError(f"{what} is {found}: give (image, label), {_OTHERWISE}.")


def _read_image(value: Any, what: str) -> Tensor:
    """Float32 image or images in [0, 1], without gradient."""
    from PIL import Image

    if isinstance(value, Tensor):
        x = value.detach().as_subclass(Tensor)
    elif isinstance(value, np.ndarray):
        x = _from_array(value, what)
    elif isinstance(value, Image.Image):
        if value.mode not in ("L", "RGB"):
            raise DataError(
                f"{what} has a PIL image of mode {value.mode}: give mode L or RGB, such as "
                f"image.convert('RGB') where that loses nothing, {_OTHERWISE}."
            )
        pixels = torch.from_numpy(np.array(value))
        x = pixels[None] if value.mode == "L" else pixels.permute(2, 0, 1)
    else:
        raise DataError(
            f"{what} has an image of class {type(value).__name__}: give a tensor, a numpy array or "
            f"a PIL image, {_OTHERWISE}."
        )
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise DataError(
            f"{what} has an image of {x.dtype}: give floating-point pixels in [0, 1], or uint8 "
            "ones in 0..255."
        )
    return to_unit(x)


def _from_array(value: np.ndarray[Any, Any], what: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(value))  # a copy: arrays may be read-only, or reversed
    except TypeError:
        raise DataError(
            f"{what} has an array of {value.dtype}: give float32 pixels in [0, 1], or uint8 ones "
            "in 0..255."
        ) from None


def _read_label(value: Any, what: str) -> Tensor:
    """A label or labels: integers as int64, others in their own type."""
    try:
        y = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        shown = f" ({value!r})" if isinstance(value, str) else ""
        raise DataError(
            f"{what} has a label of class {type(value).__name__}{shown}: give a class index, an "
            f"integer from 0 on, {_OTHERWISE}."
        ) from None
    return y if y.is_floating_point() or y.is_complex() else y.to(torch.int64)


def _stack(tensors: list[Tensor], indices: Sequence[int], what: str) -> Tensor:
    try:
        return torch.stack(tensors)
    except RuntimeError:
        first = tensors[0].shape
        for tensor, index in zip(tensors, indices, strict=True):
            if tensor.shape != first:
                raise DataError(
                    f"Sample {index} has {what} of shape {list(tensor.shape)}, sample "
                    f"{indices[0]} one of {list(first)}: give all samples one shape, for images "
                    "such as Resize and CenterCrop do."
                ) from None
        raise


def _check_layout(shape: tuple[int, ...], what: str) -> None:
    if len(shape) != 3:
        grey = " A grey image is x[None]." if len(shape) == 2 else ""
        raise DataError(
            f"{what} has an image of shape {list(shape)}: give (channels, height, width).{grey}"
        )
    rest, last = shape[:2], shape[2]
    # No image is three pixels wide with dozens of channels.
    if last in _CHANNELS_LAST and min(rest) > max(_CHANNELS_LAST):
        raise DataError(
            f"{what} has an image of shape {list(shape)}, with the channels last: give (channels, "
            "height, width), as x.transpose(2, 0, 1) of an array or x.permute(2, 0, 1) of a tensor."
        )


def _listed(keys: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, keys)) or "(none)"
