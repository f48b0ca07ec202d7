"""The global random generators of a process: torch's, Python's and numpy's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators, of plain types and tensors."""
    state: dict[str, Any] = {
        "rng_cpu": torch.get_rng_state(),
        "rng_python": random.getstate(),
        "rng_numpy": [v.tolist() if isinstance(v, np.ndarray) else v for v in _numpy_state()],
    }
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on from :func:`random_state`; generators that ``state`` lacks stay as they are."""
    if "rng_cpu" in state:
        torch.set_rng_state(state["rng_cpu"])
    if "rng_python" in state:
        random.setstate(state["rng_python"])
    if "rng_numpy" in state:
        np.random.set_state(tuple(state["rng_numpy"]))
    if "rng_cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["rng_cuda"], device)


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Bring the global generators back to what they were, on exit."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def _numpy_state() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    return state
