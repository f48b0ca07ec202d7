"""Exponential moving average of weights, on whatever shards of them a rank holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class WeightEma:
    """Exponential moving average in float32 of a list of tensors.

    ``ema <- d * ema + (1 - d) * weight`` with ``d = min(decay, (1 + t) / (10 + t))`` after ``t``
    updates, so that early averages forget the initial weights (as in TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``).

    The tensors may be shards (ZeRO-3): the average is element-wise, so no communication is needed.

    Args:
        weights: Returns the tensors that hold this rank's weights, always in the same order;
            called anew each time, since a shard may be stored elsewhere after a step.
        decay: Largest decay, in (0, 1).

    Attributes:
        averages: float32, one for each of the weights.
        num_updates: How often the weights were folded in.
    """

    def __init__(self, weights: Callable[[], Sequence[Tensor]], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._weights = weights
        self.averages = [w.detach().float().clone() for w in weights()]

    @torch.no_grad()
    def update(self) -> None:
        """Fold in the current weights; called once after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        weights = [w.float() for w in self._weights()]
        if weights:  # a rank may hold no shard
            torch._foreach_lerp_(self.averages, weights, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages in place of the weights; restore the weights bit for bit on exit."""
        backup = [w.detach().clone() for w in self._weights()]
        with torch.no_grad():
            for weight, average in zip(self._weights(), self.averages, strict=True):
                weight.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, saved in zip(self._weights(), backup, strict=True):
                    weight.copy_(saved)

    def state_dict(self) -> dict[str, object]:
        """The averages of this rank and the number of updates."""
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore :meth:`state_dict`; shapes must match."""
        averages, num_updates = state["averages"], state["num_updates"]
        assert isinstance(averages, list)
        assert isinstance(num_updates, int)
        with torch.no_grad():
            for mine, saved in zip(self.averages, averages, strict=True):
                mine.copy_(saved)
        self.num_updates = num_updates
