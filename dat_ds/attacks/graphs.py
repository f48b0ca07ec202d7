"""A whole attack, all of its steps, recorded once and replayed as a CUDA graph.

A replay costs the host one launch, whatever the number of steps. It computes on memory that stays
where it is: images, labels and random streams are copied into it, and the model's parameters and
buffers must not move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dat_ds.attacks.build import Attack
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.noise import RecordedStreams, SampleGenerator

logger = logging.getLogger(__name__)

Outcome = tuple[Tensor, InputGradient]
"""Adversarial images, and the counts of the gradients that led to them."""
Recorder = Callable[[Callable[[], Outcome]], tuple[Outcome, Callable[[], None]]]
"""Takes what an attack does; returns its outcome and what computes it anew, in the same memory."""

_WARM_UP = 2
_MOST_MOVES = 3


def cuda_graph(function: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
    """Record ``function`` as a CUDA graph: a :data:`Recorder`; the outcome holds no values yet."""
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    # Libraries choose algorithms and allocate workspaces in the first runs.
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, as NCCL's, may go on asking the device how far it is.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outcome = function()
    return outcome, graph.replay


@dataclass(frozen=True)
class _Conditions:
    """What a recording is good for: another one of these, and it is another computation."""

    attack: Attack
    memory: tuple[int, ...]


@dataclass(frozen=True)
class _Recording:
    conditions: _Conditions
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
        self.replay()
        gradient.add_counts(self.counts)
        return self.x_adv.clone()


@dataclass
class AttackGraphs:
    """Runs attacks on one model: a kind of batch that comes a second time is recorded.

    A batch of another size, or another attack (its eps along ``eps_warmup``), runs as it would
    without graphs until it comes twice in a row.

    Args:
        module: Where parameters and buffers lie.
        record: How to record; by default as a CUDA graph.
        warns: Whether to say so where parameters keep moving and recording is given up.

    Attributes:
        num_recorded: Recordings made so far.
    """

    module: nn.Module
    record: Recorder = cuda_graph
    warns: bool = True
    num_recorded: int = field(default=0, init=False)
    _recordings: dict[object, _Recording] = field(default_factory=dict, init=False, repr=False)
    _seen: dict[object, tuple[_Conditions, int]] = field(
        default_factory=dict, init=False, repr=False
    )
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
            generator: Source of random numbers.
            gradient: Receives the counts.

        Raises:
            ValueError: If ``gradient`` takes non-finite gradients again, which the host decides.
        """
        if gradient.retry_non_finite:
            raise ValueError("A replayed attack cannot take gradients again: use bfloat16.")
        kind = (x.shape, y.shape, y.dtype)
        conditions = _Conditions(attack, self._memory())
        recording = self._recordings.get(kind)
        if recording is None or recording.conditions != conditions:
            self._recordings.pop(kind, None)
            before, num_draws = self._seen.get(kind, (None, 0))
            if before != conditions or self._num_moves > _MOST_MOVES:
                self._note_moves(before, conditions)
                with frozen() as model:
                    x_adv = attack(model, x, y, generator, gradient=gradient)
                self._seen[kind] = (conditions, generator.num_draws)
                return x_adv
            with frozen() as model:
                recording = self._recorded(model, conditions, x, y, generator, num_draws)
            self._recordings[kind] = recording
        return recording(x, y, generator, gradient)

    def _recorded(
        self,
        model: Model,
        conditions: _Conditions,
        x: Tensor,
        y: Tensor,
        generator: SampleGenerator,
        num_draws: int,
    ) -> _Recording:
        x, y = x.clone(), y.clone()
        streams = RecordedStreams(num_draws, len(x), x.device)

        def attacked() -> Outcome:
            streams.rewind()
            counts = InputGradient()
            return conditions.attack(model, x, y, streams, gradient=counts), counts

        (x_adv, counts), replay = self.record(attacked)
        self.num_recorded += 1
        return _Recording(conditions, x, y, streams, x_adv, counts, replay)

    def _memory(self) -> tuple[int, ...]:
        tensors = (*self.module.parameters(), *self.module.buffers())
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _note_moves(self, before: _Conditions | None, now: _Conditions) -> None:
        if before is None or before.memory == now.memory:
            return
        self._num_moves += 1
        if self._num_moves == _MOST_MOVES + 1 and self.warns:
            logger.warning(
                "dat.engine.cuda_graphs=true does nothing any more: the model's parameters keep "
                "moving in memory. The attack's kernels are launched one by one."
            )
