"""Log of an engine's optimizer steps: losses, accuracies, seconds, and what was sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from dat_ds.attacks import InputGradient
from dat_ds.engine.reductions import GradientCompression
from dat_ds.engine.traffic import Phase, Traffic, listen, stop_listening
from dat_ds.minmax import PhaseTimer, StepMetrics
from dat_ds.optim import CompressedOptimizer
from dat_ds.ranks import Ranks


class StepLog:
    """Metrics of the optimizer step under way and of the last one, with their traffic.

    Args:
        engine: DeepSpeed's engine.
        ranks: The processes of the run.
        compression: Told of what is a part of training; None where nothing is compressed.
        optimizer: The optimizer, where it averages over ranks by itself and may skip steps.
        count_gradients: Makes what counts the attacks' gradients of a step.

    Attributes:
        traffic: Counts what this process sends in training.
        pending: Of the step under way.
        last: Of the last step; None before the first.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        ranks: Ranks,
        *,
        compression: GradientCompression | None,
        optimizer: CompressedOptimizer | None,
        count_gradients: Callable[[], InputGradient],
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._compression = compression
        self._optimizer = optimizer
        self._count_gradients = count_gradients
        self.traffic = Traffic()
        listen(self.traffic)
        self.pending = self._new()
        self.last: StepMetrics | None = None

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """A part of training, whose traffic is counted, and compressed where it is asked for."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.traffic.counting(phase))
            if self._compression is not None:
                stack.enter_context(self._compression.training_pass())
            yield

    @contextlib.contextmanager
    def attack(self) -> Iterator[None]:
        """Inside, gathers of parameters are the attack's."""
        before = self.traffic.calls["parameters"]
        yield
        self.pending.attack_parameter_gathers += self.traffic.calls["parameters"] - before

    def complete(self) -> None:
        """End the step under way and begin the next."""
        self.pending.bytes_sent, self.pending.collectives = self.traffic.take()
        self.last, self.pending = self.pending, self._new()

    def local(self) -> dict[str, Any]:
        """The last step on this rank, waiting for the device; empty before the first."""
        return {} if self.last is None else self._described(self.last, self.last.sums(), 1)

    def reduced(self) -> dict[str, Any]:
        """The last step over all ranks, a collective; seconds and bytes stay this rank's."""
        if self.last is None:
            return {}
        return self._described(self.last, self._ranks.sum(self.last.sums()), self._ranks.count)

    def close(self) -> None:
        """Stop counting."""
        stop_listening(self.traffic)

    def _described(self, metrics: StepMetrics, sums: Tensor, ranks: int) -> dict[str, Any]:
        own_skips = 0 if self._optimizer is None else self._optimizer.num_skipped
        return {
            **metrics.means(sums, ranks),
            **metrics.local(),
            "bytes_sent": dict(metrics.bytes_sent),
            "skipped_steps": int(self._engine.skipped_steps) + own_skips,
        }

    def _new(self) -> StepMetrics:
        return StepMetrics(PhaseTimer(self._ranks.device), self._count_gradients())
