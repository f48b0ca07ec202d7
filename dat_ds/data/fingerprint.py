"""What tells one dataset from another: its size, all its labels, and some of its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from dat_ds.data.damaged import Readable
from dat_ds.data.images import StoredImages, TensorImages
from dat_ds.data.mixture import Mixture, part_ranges
from dat_ds.data.samples import is_stream
from dat_ds.data.transforms import KeyedDataset, fetch_raw
from dat_ds.data.unlabelled import PartlyLabelled
from dat_ds.errors import DataError

_PROBES = 64


def fingerprint(dataset: Dataset[Any]) -> dict[str, Any] | None:
    """Number of samples, and digests of all labels, and of up to 64 samples of each part.

    Samples are evenly spread and not augmented. Labels are those that datasets of ours hold of
    labelled images, without pseudo-labels.

    Each is read twice: where the two differ, as with random transforms of the user's own, samples
    cannot tell datasets apart, and none is given.

    Args:
        dataset: Map-style dataset.

    Returns:
        ``num_samples``; ``samples``, digests by index; ``labels``, a digest, where they can be told
        without reading images; where parts have a fixed share of every batch, ``parts``, the size
        of each. None for a stream.
    """
    if is_stream(dataset):
        return None
    size = len(cast(Any, dataset))
    ranges = list(part_ranges(dataset))
    indices = [part.start + i for part in ranges for i in _spread(len(part))]
    try:
        first, second = ([_digest(fetch_raw(dataset, i)) for i in indices] for _ in range(2))
    except DataError:  # the loader names it, should it be asked for that sample
        first = second = []
    same = dict(zip(map(str, indices), first, strict=False)) if first == second else {}
    parts = {"parts": [len(part) for part in ranges]} if len(ranges) > 1 else {}
    known = _labels(dataset)
    labels = {} if known is None else {"labels": _digest(known)}
    return {"num_samples": size, "samples": same, **labels, **parts}


def _labels(dataset: Dataset[Any]) -> Tensor | None:
    """Labels of the labelled images in order; None for a dataset that does not hold them."""
    if isinstance(dataset, KeyedDataset | Readable):
        return _labels(dataset.dataset)
    if isinstance(dataset, PartlyLabelled):
        return _labels(dataset.labelled)
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, Mixture | ConcatDataset):
        inner = (
            [dataset.first, dataset.second] if isinstance(dataset, Mixture) else dataset.datasets
        )
        found = [_labels(part) for part in inner]
        known = [labels for labels in found if labels is not None]
        return torch.cat(known) if len(known) == len(found) else None
    return dataset.labels if isinstance(dataset, TensorImages | StoredImages) else None


def _spread(size: int) -> list[int]:
    count = min(_PROBES, size)
    return sorted({i * (size - 1) // max(1, count - 1) for i in range(count)})


def difference(
    saved: Mapping[str, Any] | None,
    now: Mapping[str, Any] | None,
    *,
    before: str = "checkpoint",
    after: str = "this run",
) -> str | None:
    """How two fingerprints differ, in words; None where nothing says that they do.

    Args:
        saved: The first.
        now: The second.
        before: What the first is called.
        after: What the second is called.
    """
    if saved is None or now is None:
        return None
    if saved["num_samples"] != now["num_samples"]:
        return f"{before} {saved['num_samples']} samples, {after} {now['num_samples']}"
    if saved.get("parts") != now.get("parts"):
        words = [" + ".join(map(str, d.get("parts", [d["num_samples"]]))) for d in (saved, now)]
        return f"{before} {words[0]} samples in parts, {after} {words[1]}"
    both = saved["samples"].keys() & now["samples"].keys()
    other = sorted((i for i in both if saved["samples"][i] != now["samples"][i]), key=int)
    if not other:
        known = "labels" in saved and "labels" in now
        return "labels of some samples" if known and saved["labels"] != now["labels"] else None
    return f"sample {other[0]} and {len(other) - 1} more of {len(both)} that were compared"


def _digest(sample: object) -> str:
    state = hashlib.blake2b(digest_size=8)
    _update(state, sample)
    return state.hexdigest()


def _update(state: Any, value: object) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        state.update(f"{value.dtype}{value.shape}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            state.update(str(key).encode())
            _update(state, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            _update(state, item)
    elif isinstance(value, Number | str | bytes):
        state.update(repr(value).encode())
