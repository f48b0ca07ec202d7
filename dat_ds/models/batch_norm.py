"""BatchNorm over a batch that holds several kinds of images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dat_ds.patching import patched_forwards


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module normalises by the statistics of its batch."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


@contextlib.contextmanager
def split_batch_norm(model: nn.Module, sizes: Sequence[int]) -> Iterator[None]:
    """Let BatchNorm in training normalise consecutive parts of the batch apart, until exit.

    Equals one forward per part, in order, as far as BatchNorm goes: each part is normalised by its
    own statistics, and each updates the running ones.

    Args:
        model: Network to be called on batches of ``sum(sizes)`` images.
        sizes: Number of images of each part.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]]
    forwards = {norm: functools.partial(_forward_in_parts, norm, list(sizes)) for norm in norms}
    with patched_forwards(forwards):
        yield


def _forward_in_parts(norm: _BatchNorm, sizes: list[int], x: Tensor) -> Tensor:
    forward = type(norm).forward
    parts = []
    for part in torch.split(x, sizes):
        if len(part) == 1:  # BatchNorm refuses one value per channel; twice it has its statistics
            parts.append(forward(norm, torch.cat([part, part]))[:1])
        else:
            parts.append(forward(norm, part))
    return torch.cat(parts)
