"""Bytes that this process sends, counted where torch hands tensors to the process group."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from dat_ds.traffic import current_kind

_GATHERS = ("allgather", "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced")
_SCATTERS = ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single")
_REDUCES = ("allreduce", "allreduce_coalesced", "reduce")
_EXCHANGES = ("alltoall_base", "all_to_all_single", "alltoall")
_OTHERS = ("broadcast",)

Phase = Literal["forward", "backward", "step"]


class Traffic:
    """Counts collectives of this process, while told to.

    Bytes follow the ring algorithms, per rank, for ``n`` ranks and a tensor of ``s`` bytes:
    all-reduce ``2 s (n - 1) / n``, reduce-scatter and all-to-all ``s (n - 1) / n`` of their input,
    all-gather ``s (n - 1)`` of its input, broadcast ``s``. One rank sends nothing.

    Attributes:
        bytes_sent: Bytes by kind: ``gradients``, ``momentum``, ``parameters``, ``norms``,
            ``features`` and ``setup``. Whoever starts a collective may name its kind
            (:func:`dat_ds.compression.kind_of_traffic`); else gathers and broadcasts count as
            ``parameters``, and what else runs in backward as ``gradients``, in step as ``norms``.
        calls: Collectives by kind.
    """

    def __init__(self) -> None:
        self.bytes_sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._phase: str | None = None

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes and calls by kind since the last time, and start counting anew."""
        taken = dict(self.bytes_sent), dict(self.calls)
        self.bytes_sent, self.calls = Counter(), Counter()
        return taken

    @contextlib.contextmanager
    def counting(self, phase: Phase) -> Iterator[None]:
        """Count the collectives inside; outside, as in evaluation and logging, none is counted."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def record(self, method: str, num_bytes: int, ranks: int) -> None:
        """Count one collective of the process group."""
        if self._phase is None:
            return
        named = current_kind()
        if named is not None:
            kind = named
        elif method in _GATHERS or method in _OTHERS:
            kind = "parameters"
        else:
            kind = "gradients" if self._phase == "backward" else "norms"
        share = {
            **dict.fromkeys(_GATHERS, ranks - 1.0),
            **dict.fromkeys(_SCATTERS + _EXCHANGES, (ranks - 1) / ranks),
            **dict.fromkeys(_REDUCES, 2 * (ranks - 1) / ranks),
            **dict.fromkeys(_OTHERS, 1.0 if ranks > 1 else 0.0),
        }[method]
        self.bytes_sent[kind] += round(num_bytes * share)
        self.calls[kind] += 1


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(item) for item in value)
    return 0


def _input_of(method: str, args: tuple[Any, ...]) -> Any:
    """Reductions and broadcasts take only an input, the others ``(output, input)``."""
    return args[0] if method in _REDUCES + _OTHERS else args[1]


_listeners: list[Traffic] = []


def listen(traffic: Traffic) -> None:
    """Count this process's collectives in ``traffic`` from now on."""
    if not _listeners:
        for method in (*_GATHERS, *_SCATTERS, *_REDUCES, *_EXCHANGES, *_OTHERS):
            if method in vars(dist.ProcessGroup):
                setattr(dist.ProcessGroup, method, _counted(method))
    _listeners.append(traffic)


def stop_listening(traffic: Traffic) -> None:
    """Stop counting in ``traffic``; the last listener to go restores the process group."""
    if traffic in _listeners:
        _listeners.remove(traffic)
        if not _listeners:
            for method, original in _originals.items():
                setattr(dist.ProcessGroup, method, original)
            _originals.clear()


_originals: dict[str, Any] = {}


def _counted(method: str) -> Callable[..., Any]:
    # The raw attribute: what getattr returns would not bind to an instance when put back.
    _originals[method] = vars(dist.ProcessGroup)[method]
    original = getattr(dist.ProcessGroup, method)

    @functools.wraps(original)
    def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            num_bytes = _num_bytes(_input_of(method, args))
            for traffic in _listeners:
                traffic.record(method, num_bytes, group.size())
        return original(group, *args, **kwargs)

    return counted
