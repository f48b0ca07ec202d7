"""Arrays in an npz file."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.lib import format as npy

from dat_ds.data.images import TensorImages
from dat_ds.data.method import FileDataset
from dat_ds.data.readers.source import Part, Source, measure_channels, raise_all
from dat_ds.errors import DataError
from dat_ds.files import open_regular

_NPZ_LAYOUTS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("images", "labels", "test_images", "test_labels"),
)
_TEST_LAYOUTS = (
    ("x_test", "y_test"),
    ("test_images", "test_labels"),
    ("x", "y"),
    ("images", "labels"),
    ("image", "label"),
)
_TRAIN_LAYOUTS = (
    ("x_train", "y_train"),
    ("images", "labels"),
    ("x", "y"),
    ("image", "label"),  # of published images of diffusion models
)
_CHANNELS = (1, 2, 3, 4)


def load_npz(path: str | Path | None, where: str) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an npz file.

    Args:
        path: The file.
        where: The key and its value, for messages.

    Raises:
        DataError: The file is none, is damaged, or holds objects, which are never unpickled.
    """
    try:
        # Pickled objects in a data file could run code on loading.
        with open_regular(str(path)) as stream, np.load(stream, allow_pickle=False) as file:
            _check_sizes(file.zip)
            return {key: file[key] for key in file.files}
    # zipfile, its decompressors and numpy raise errors of every class for a damaged file.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{where} is not a readable npz file of plain arrays ({reason}). Write one with "
            "numpy.savez."
        ) from error


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Compare every array's header with the bytes that follow, before memory is taken for it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = 0
    for entry in archive.infolist():
        with archive.open(entry) as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
            claimed, held = math.prod(shape) * dtype.itemsize, entry.file_size - stream.tell()
        if claimed != held and not dtype.hasobject:  # objects have a refusal of their own
            raise ValueError(
                f"{entry.filename} has a header of {dtype} {shape}, {claimed} bytes, and {held} "
                "bytes follow"
            )
        total += claimed
    if total > memory:
        raise ValueError(f"{total} bytes of arrays, and this machine has {memory} of memory")


def array_problems(
    where: str, x_key: str, x: np.ndarray[Any, Any], y_key: str, y: np.ndarray[Any, Any]
) -> list[str]:
    """Problems of images and labels, as messages."""
    problems = []
    if x.dtype != np.uint8:
        problems.append(
            f"{where}: {x_key} is {x.dtype}; images must be uint8 in 0..255. {_as_uint8(x)}"
        )
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 2, 3, 4)):
        problems.append(
            f"{where}: {x_key} has shape {x.shape}; it must be (N, H, W) or (N, H, W, C) with C "
            "from 1 to 4. Channels first? Write x.transpose(0, 2, 3, 1)."
        )
    elif 0 in x.shape[1:]:
        problems.append(f"{where}: {x_key} has shape {x.shape}: images without a pixel.")
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


def _as_uint8(x: np.ndarray[Any, Any]) -> str:
    """What to write in the place of an array of images of another dtype."""
    if x.dtype == np.bool_:
        return "Write 255 * x.astype(numpy.uint8)."
    if x.dtype.kind not in "iuf" or x.size == 0 or not (x.min() >= 0 and np.isfinite(x).all()):
        return "Scale them to 0..255, round, and write x.astype(numpy.uint8)."
    if x.dtype.kind == "f" and x.max() <= 1:
        return "Write (255 * x).round().astype(numpy.uint8)."
    if x.max() <= 255:
        return f"Write x{'.round()' if x.dtype.kind == 'f' else ''}.astype(numpy.uint8)."
    if x.dtype == np.uint16:
        return "If they use all 16 bits, write (x / 257).round().astype(numpy.uint8)."
    return "Scale them to 0..255, round, and write x.astype(numpy.uint8)."


def images_from_arrays(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], img_size: int | None
) -> TensorImages:
    """Images in memory from arrays ``(N, H, W)`` or ``(N, H, W, C)``."""
    images = torch.from_numpy(x if x.ndim == 4 else x[..., None]).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, torch.from_numpy(y.astype(np.int64)), img_size)


def _test_images(
    where: str, x_key: str, x: np.ndarray[Any, Any], y_key: str, y: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Images to be evaluated as ``(N, H, W, C)``: uint8 in 0..255, or floats in [0, 1].

    Raises:
        DataError: With all problems of the images and labels.
    """
    if x.dtype.kind != "f":
        raise_all(array_problems(where, x_key, x, y_key, y))
        return x if x.ndim == 4 else x[..., None]
    x = x.astype(np.float32)
    if x.ndim == 4 and x.shape[1] in _CHANNELS and x.shape[3] not in _CHANNELS:
        x = x.transpose(0, 2, 3, 1)
    # The rest of the checks is that of bytes.
    raise_all(array_problems(where, x_key, np.empty(x.shape, np.uint8), y_key, y))
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # also where one is NaN
        raise DataError(
            f"{where}: {x_key} is {x.dtype} from {low:.4g} to {high:.4g}; pixels are in [0, 1]. "
            f"{_as_pixels(low, high)}"
        )
    return x if x.ndim == 4 else x[..., None]


def _as_pixels(low: float, high: float) -> str:
    if low >= 0 and 1 < high <= 255:
        return "They look like 0..255: write x.astype(numpy.uint8), or x / 255."
    return (
        "They look normalised already, which belongs into the model: write x * std + mean, and let "
        "the model normalise."
    )


def _layout_of(
    arrays: Mapping[str, Any], layouts: tuple[tuple[str, str], ...], where: str, purpose: str
) -> tuple[str, str]:
    """Names of the images and labels that a file has.

    Raises:
        DataError: It has none of the layouts.
    """
    for layout in layouts:
        if set(layout) <= set(arrays):
            return layout
    pairs = ", or ".join(f"{x} and {y}" for x, y in layouts)
    raise DataError(
        f"{where} has the arrays {', '.join(arrays) or 'none'}; to be {purpose} it needs {pairs}."
    )


@dataclass(frozen=True, kw_only=True)
class Npz(FileDataset):
    """Arrays in an npz file.

    uint8 ``x_train y_train x_test y_test``, or ``images labels test_images test_labels``; images
    ``(N, H, W, C)`` or ``(N, H, W)``.
    """

    name: ClassVar[str] = "npz"

    def read(self, seed: int) -> Source:
        """Both parts of an npz file."""
        arrays = load_npz(self.path, f"dat.data.path={str(self.path)!r}")
        layout = next((keys for keys in _NPZ_LAYOUTS if keys[0] in arrays), _NPZ_LAYOUTS[0])
        missing = [key for key in layout if key not in arrays]
        if missing:
            raise DataError(
                f"dat.data.path={str(self.path)!r} lacks the arrays {', '.join(missing)} (it has "
                f"{', '.join(arrays) or 'none'}). Save uint8 images and integer labels with "
                f"numpy.savez(file, {', '.join(f'{key}=...' for key in layout)}); a test part is "
                "needed because none is ever cut out of the training data."
            )
        where = f"dat.data.path={str(self.path)!r}"
        pairs = [(layout[0], layout[1]), (layout[2], layout[3])]
        problems = [p for x, y in pairs for p in array_problems(where, x, arrays[x], y, arrays[y])]
        shapes = [arrays[x].shape[1:] for x, _ in pairs]
        if not problems and shapes[0] != shapes[1]:
            problems.append(
                f"{where}: {layout[0]} has images of shape {shapes[0]}, {layout[2]} of "
                f"{shapes[1]}; they must be the same."
            )
        raise_all(problems)
        train, test = (images_from_arrays(arrays[x], arrays[y], self.img_size) for x, y in pairs)
        return Source(train, test, measure_channels(train.images))

    def read_train(self, seed: int) -> Part:
        """The training arrays, or the only ones: ``images labels``, ``x y``, ``image label``."""
        where = f"dat.data.path={str(self.path)!r}"
        arrays = load_npz(self.path, where)
        layout = _layout_of(arrays, _TRAIN_LAYOUTS, where, "trained on")
        x, y = arrays[layout[0]], arrays[layout[1]]
        raise_all(array_problems(where, layout[0], x, layout[1], y))
        return Part(images_from_arrays(x, y, self.img_size))

    def read_test(self, seed: int) -> Part:
        """The test arrays, or the only ones as in :meth:`read_train`; also floats in [0, 1]."""
        where = f"dat.data.path={str(self.path)!r}"
        arrays = load_npz(self.path, where)
        layout = _layout_of(arrays, _TEST_LAYOUTS, where, "evaluated")
        x, y = arrays[layout[0]], arrays[layout[1]]
        images = images_from_arrays(
            _test_images(where, layout[0], x, layout[1], y), y, self.img_size
        )
        return Part(images)
