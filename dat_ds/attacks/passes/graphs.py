"""A whole attack, all of its steps, recorded once and replayed as a CUDA graph.

A replay is one launch by the host in the place of one for every kernel. It computes on memory that
stays where it is: images, labels and keys of random streams are copied into it, and the model's
parameters and buffers must not move. What the attack needs for its activations stays reserved from
the first recording on.

Experimental: recording and replaying were tested with a recorder for CPUs, and no GPU has run a
graph of this version yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dat_ds.attacks.attack import Attack
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.modes import preserved_rng
from dat_ds.attacks.noise import RecordedStreams, SampleGenerator
from dat_ds.errors import ConfigError

logger = logging.getLogger("dat_ds")

Outcome = tuple[Tensor, InputGradient]
"""Adversarial images, and the counts of the gradients that led to them."""
Recorder = Callable[[Callable[[], Outcome]], tuple[Outcome, Callable[[], None]]]
"""Takes what an attack does; returns its outcome and what computes it anew, in the same memory."""

_WARM_UP = 2
_MOST_MOVES = 3


class CudaRecorder:
    """Records CUDA graphs, which share their memory: a :data:`Recorder`.

    One graph runs at a time and what it computes is copied out at once, so that the next may write
    over it.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
        """Record ``function``; the outcome holds no values yet.

        Raises:
            ConfigError: If a CUDA graph cannot hold what it does.
        """
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        # Libraries choose algorithms and allocate workspaces in the first runs.
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function()
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, as NCCL's, may go on asking the device how far it is.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                outcome = function()
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            raise ConfigError(
                "dat.engine.cuda_graphs=true: the attack on this model cannot be recorded. Its "
                "forward reads a value of the device, copies from the host, or saves random "
                f"states. Write false. ({error})"
            ) from error
        return outcome, graph.replay


@dataclass(frozen=True)
class _Recording:
    attack: Attack
    x: Tensor
    y: Tensor
    streams: RecordedStreams
    x_adv: Tensor
    counts: InputGradient
    replay: Callable[[], None]

    def __call__(
        self, x: Tensor, y: Tensor, generator: SampleGenerator, gradient: InputGradient
    ) -> Tensor:
        self.x.copy_(x)
        self.y.copy_(y)
        self.streams.fill(generator)
        with preserved_rng(x.device):  # as every attack does, should the model draw by itself
            self.replay()
        gradient.add_counts(self.counts)
        return self.x_adv.clone()


@dataclass(frozen=True)
class _Seen:
    """The last attack on a kind of batch: in which optimizer step, and how often it drew."""

    attack: Attack
    step: int
    num_draws: int


@dataclass
class AttackGraphs:
    """Runs attacks on one model: what comes again in another optimizer step is recorded.

    A batch of another size, or another attack (its eps along ``eps_warmup``), runs as it would
    without graphs until it comes in a second step.

    Args:
        module: Where parameters and buffers lie.
        record: How to record; by default as CUDA graphs.
        warns: Whether to say so where parameters keep moving and recording is given up.

    Attributes:
        num_recorded: Recordings made so far.
    """

    module: nn.Module
    record: Recorder = field(default_factory=CudaRecorder)
    warns: bool = True
    num_recorded: int = field(default=0, init=False)
    _recordings: dict[object, _Recording] = field(default_factory=dict, init=False, repr=False)
    _seen: dict[object, _Seen] = field(default_factory=dict, init=False, repr=False)
    _memory: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    _num_moves: int = field(default=0, init=False, repr=False)

    def __call__(
        self,
        attack: Attack,
        frozen: Callable[[], AbstractContextManager[Model]],
        x: Tensor,
        y: Tensor,
        generator: SampleGenerator,
        gradient: InputGradient,
    ) -> Tensor:
        """Adversarial images for ``x``, as ``attack`` on the frozen model gives them.

        Args:
            attack: One that leaves no decision to the host: neither ``fat`` nor a user's own.
            frozen: Opens the model for attacks that are not replayed.
            x: Images ``(B, C, H, W)``, float32.
            y: Labels as the attack takes them.
            generator: Source of random numbers; its step is the optimizer's.
            gradient: Receives the counts.

        Raises:
            ValueError: If ``gradient`` takes non-finite gradients again, which the host decides.
            ConfigError: If the attack cannot be recorded.
        """
        if gradient.retry_non_finite:
            raise ValueError("A replayed attack cannot take gradients again: use bfloat16.")
        self._look_for_moves()
        kind = (x.shape, y.shape, y.dtype)
        recording = self._recordings.get(kind)
        if recording is None or recording.attack != attack:
            self._recordings.pop(kind, None)
            seen = self._seen.get(kind)
            comes_again = seen is not None and seen.attack == attack and seen.step != generator.step
            if seen is None or not comes_again or self._num_moves > _MOST_MOVES:
                with frozen() as model:
                    x_adv = attack(model, x, y, generator, gradient=gradient)
                self._seen[kind] = _Seen(attack, generator.step, generator.num_draws)
                return x_adv
            with frozen() as model:
                recording = self._recorded(model, attack, x, y, seen.num_draws)
            self._recordings[kind] = recording
        return recording(x, y, generator, gradient)

    def clear(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()
        self._seen.clear()

    def _recorded(
        self, model: Model, attack: Attack, x: Tensor, y: Tensor, num_draws: int
    ) -> _Recording:
        x, y = x.clone(), y.clone()
        streams = RecordedStreams(num_draws, len(x), x.device)

        def attacked() -> Outcome:
            streams.rewind()
            counts = InputGradient()
            return attack(model, x, y, streams, gradient=counts), counts

        (x_adv, counts), replay = self.record(attacked)
        self.num_recorded += 1
        return _Recording(attack, x, y, streams, x_adv, counts, replay)

    def _look_for_moves(self) -> None:
        """Forget recordings on memory that is no longer the model's."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        memory = tuple(tensor.data_ptr() for tensor in tensors)
        if self._memory not in (None, memory):
            self.clear()
            self._num_moves += 1
            if self._num_moves == _MOST_MOVES + 1 and self.warns:
                logger.warning(
                    "dat.engine.cuda_graphs=true does nothing any more: the model's parameters "
                    "keep moving in memory. The attack's kernels are launched one by one."
                )
        self._memory = memory
