"""Common base of the optimizers with compressed communication.

Shapes: ``N`` parameters in all, laid end to end in flat float32 buffers, group by group; ``n``
ranks.

How data flow. The engine averages gradients over ranks while the variance is measured, and stops
once it is frozen. From then on a rank's gradient goes into its copy of the momentum. The flat
momentum, divided by the root of the variance so that every coordinate is of the same size, plus
what earlier rounds lost of it, is cut into ``n`` chunks of signs and block scales
(:class:`dat_ds.compression.CompressedAllReduce`): every rank averages one chunk, compresses that
again with an error of its own, and hands it to all. Every rank decodes the same bytes, so momentum
and weights stay equal bit for bit. Three collectives a step: one float that says whether all
gradients are finite, one all-to-all, one all-gather.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.compression import CompressedAllReduce, build_codec
from dat_ds.compression.sign import WholeSign

logger = logging.getLogger("dat_ds")
Scale = Literal["mean", "rms"]
_STATE = "compressed"


class FlatParameters:
    """The parameters of an optimizer as consecutive pieces of a flat buffer.

    Args:
        groups: Parameter groups, in the order of the buffer.

    Attributes:
        params: All parameters.
        numel: Length of the buffer.
        parts: The slice of each group.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._sizes = [p.numel() for p in self.params]
        self.numel = sum(self._sizes)
        self.parts: list[slice] = []
        self._members: list[slice] = []
        start = first = 0
        for group in groups:
            stop = start + sum(p.numel() for p in group["params"])
            last = first + len(group["params"])
            self.parts.append(slice(start, stop))
            self._members.append(slice(first, last))
            start, first = stop, last

    def zeros(self) -> Tensor:
        """A buffer of zeros."""
        return torch.zeros(self.numel, device=self.params[0].device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of ``flat``, in the shapes of the parameters."""
        pieces = torch.split(flat, self._sizes)
        return [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]

    def of_group(self, index: int, items: list[Tensor]) -> list[Tensor]:
        """The items, one per parameter, that belong to a group."""
        return items[self._members[index]]

    def read_gradients(self, views: list[Tensor]) -> None:
        """Copy gradients into ``views``; a missing one counts as zero.

        Raises:
            RuntimeError: For a sparse gradient.
        """
        present: list[tuple[Tensor, Tensor]] = []
        for view, p in zip(views, self.params, strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.is_sparse:
                raise RuntimeError("Optimizers with compressed communication take dense gradients.")
            else:
                present.append((view, p.grad))
        if present:
            torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])


class CompressedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that averages over ranks by itself, compressed, in a later phase of the run.

    Whoever computes gradients asks :attr:`needs_averaged_gradients` before every step.

    A step in which any rank's gradient is not finite is skipped by all ranks: weights and variance
    stay, the momentum takes in nothing (compressed again, it loses nothing: the errors keep the
    rest), and only counters and the learning rate move on. That is decided on the device, so no
    step waits for it, at the price of one all-reduce of 4 bytes.

    State is made at the first step: DeepSpeed exchanges parameters for float32 copies before it.

    Args:
        params: Parameters or groups.
        defaults: Options of the groups: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        bias_correction: Divide momentum and variance by ``1 - beta^t``, as Adam does.
        preconditioned: Compress ``m / (sqrt(v) + eps)``: as the root is the same on
            all ranks, its mean is that of ``m``, but what is lost is then of each coordinate's own
            size. False compresses ``m``, as the papers do: a coordinate whose variance is much
            smaller than its block's is then thrown about by the scale of the others.
        block_size: Entries that share a scale; 0 for one scale per momentum, and one per chunk of
            the average.
        scale: Magnitude that a block's signs stand for: ``"mean"`` of magnitudes, or ``"rms"``.

    Attributes:
        num_steps: Steps so far, skipped ones included.
        events: Events of the variance, in order, JSON-serialisable.
        is_frozen: Whether the variance is no longer measured.
    """

    steps_locally: ClassVar[bool] = False
    """Whether ranks make steps of their own, between which their weights differ."""
    _saved: ClassVar[tuple[str, ...]] = ("num_steps", "events", "is_frozen")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        bias_correction: bool,
        preconditioned: bool,
        block_size: int,
        scale: Scale,
    ) -> None:
        _check_options(defaults)
        super().__init__(params, defaults)
        self.bias_correction, self.preconditioned = bias_correction, preconditioned
        self.num_steps = 0
        self.events: list[dict[str, Any]] = []
        self.is_frozen = False
        self._codec = (
            build_codec("sign", block_size=block_size, scale=scale)
            if block_size
            else WholeSign(scale=scale)
        )
        self._is_paused = False
        self._flat: FlatParameters | None = None
        self._buffers: dict[str, Tensor] = {}
        self._exchange: CompressedAllReduce | None = None
        self._work = torch.empty(0)
        self._work_views: list[Tensor] = []
        self._num_skipped = torch.zeros(())

    # ---- what the engine asks

    @property
    def needs_averaged_gradients(self) -> bool:
        """Whether the next step takes gradients that are averaged over ranks, or this rank's."""
        return not self.is_frozen

    @property
    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same weights now."""
        return True

    @property
    @abstractmethod
    def earliest_freeze(self) -> int:
        """Step after which the variance is frozen, at the earliest."""

    @property
    def num_skipped(self) -> int:
        """Steps skipped for a non-finite gradient; waits for the device."""
        return int(self._num_skipped)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore steps inside: DeepSpeed makes one with zero gradients to set up its own state."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    # ---- a step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update of the parameters from their gradients; a collective once frozen."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._is_paused:
            flat = self._built()
            flat.read_gradients(self._work_views)
            self.num_steps += 1
            self._update(flat, self._work)
        return loss

    @abstractmethod
    def _make_buffers(self, flat: FlatParameters) -> dict[str, Tensor]:
        """The state that is equal on all ranks, at its start."""

    @abstractmethod
    def _update(self, flat: FlatParameters, gradient: Tensor) -> None:
        """Step number :attr:`num_steps`.

        Args:
            flat: The layout.
            gradient: ``(N,)``; may be overwritten.
        """

    def _built(self) -> FlatParameters:
        if self._flat is None:
            self._flat = flat = FlatParameters(self.param_groups)
            self._buffers = self._make_buffers(flat)
            self._work = flat.zeros()
            self._work_views = flat.views(self._work)
            self._num_skipped = self._num_skipped.to(self._work.device)
        return self._flat

    def _usable(self, gradient: Tensor, *, everywhere: bool) -> Tensor:
        """Whether this step may use its gradient: 1 or 0, 0-dim float32 on the device.

        A gradient that may not be used is set to zero.

        Args:
            gradient: This rank's, flat.
            everywhere: Whether all ranks must be able to use theirs.
        """
        # The sum is finite only where every entry is, and needs no buffer of its own.
        usable = gradient.sum().isfinite().float()
        if everywhere and self._count_ranks() > 1:
            dist.all_reduce(usable, op=dist.ReduceOp.MIN)
        torch.where(usable > 0, gradient, gradient.new_zeros(()), out=gradient)
        self._num_skipped += 1 - usable
        return usable

    def _count_ranks(self) -> int:
        is_alone = not dist.is_available() or not dist.is_initialized()
        return 1 if is_alone else dist.get_world_size()

    def _average(self, flat: Tensor, denominator: Tensor) -> None:
        """Replace ``flat`` by its compressed mean over ranks, with error feedback; a collective.

        Args:
            flat: ``(N,)``.
            denominator: ``sqrt(v) + eps``, equal on all ranks.
        """
        if self._count_ranks() == 1:
            return
        if self._exchange is None:
            self._exchange = self._make_exchange(flat)
        if self.preconditioned:
            mean = self._exchange(flat.div_(denominator), self.num_steps)
            torch.mul(mean, denominator, out=flat)
        else:
            flat.copy_(self._exchange(flat, self.num_steps))

    def _average_frozen(self, flat: Tensor) -> None:
        """:meth:`_average` with the frozen variance."""
        self._mask(flat)
        self._average(flat, self._buffers["denominator"])
        self._mask(flat)

    def _make_exchange(self, like: Tensor) -> CompressedAllReduce:
        return CompressedAllReduce(like.numel(), self._codec, kind="momentum", device=like.device)

    def _corrections(self, group: dict[str, Any], variance_steps: int) -> tuple[float, float]:
        """Divisors of momentum and variance (bias correction)."""
        if not self.bias_correction:
            return 1.0, 1.0
        beta1, beta2 = group["betas"]
        return 1 - beta1**self.num_steps, 1 - beta2**variance_steps

    def _mask(self, flat: Tensor) -> None:
        """Zero the coordinates without a variance: signs cannot say 0, and a sign over 0 explodes.

        They had no gradient up to the freeze, and are left as they are from then on.
        """
        if "no_variance" in self._buffers:
            flat.masked_fill_(self._buffers["no_variance"], 0.0)

    def _freeze_variance(self, flat: FlatParameters, measurements: int) -> None:
        """Put ``sqrt(v) + eps`` in the place of ``v``."""
        variance = self._buffers.pop("variance")
        no_variance = variance == 0
        if bool(no_variance.any()):
            self._buffers["no_variance"] = no_variance
        for part, group in zip(flat.parts, self.param_groups, strict=True):
            _, of_variance = self._corrections(group, measurements)
            variance[part].div_(of_variance).sqrt_().add_(group["eps"])
        self._buffers["denominator"] = variance
        self.is_frozen = True

    def _add_decay(self, flat: FlatParameters) -> None:
        """Add ``weight_decay p`` to the working buffer."""
        for i, group in enumerate(self.param_groups):
            if group["weight_decay"]:
                views = flat.of_group(i, self._work_views)
                params = flat.of_group(i, flat.params)
                torch._foreach_add_(views, params, alpha=group["weight_decay"])

    def _move(self, flat: FlatParameters) -> None:
        """``p <- p - lr u`` in every group, with ``u`` in the working buffer."""
        for i, group in enumerate(self.param_groups):
            params, views = flat.of_group(i, flat.params), flat.of_group(i, self._work_views)
            torch._foreach_add_(params, views, alpha=-group["lr"])

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """State that is equal on all ranks; :meth:`rank_state_dict` has the rest."""
        return {
            **super().state_dict(),
            _STATE: {
                "buffers": dict(self._buffers),
                "num_skipped": self._num_skipped,
                **{name: copy.deepcopy(getattr(self, name)) for name in self._saved},
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with compression errors of zero.

        Raises:
            ValueError: Where the state is of another optimizer or of other parameters.
        """
        state = state_dict.get(_STATE)
        if state is None:
            raise ValueError(f"This is not a state of {type(self).__name__}.")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != _STATE})
        flat = self._built()
        sizes = {buffer.numel() for buffer in state["buffers"].values()}
        if sizes and sizes != {flat.numel}:
            raise ValueError(f"The state is of {max(sizes)} parameters, not of {flat.numel}.")
        device = self._work.device
        self._buffers = _on(device, state["buffers"])
        self._num_skipped = _on(device, state["num_skipped"])
        for name in self._saved:
            setattr(self, name, _on(device, state[name]))
        self._exchange = None

    def rank_state_dict(self) -> dict[str, Any]:
        """State of this rank alone: the errors of its compression."""
        exchange = None if self._exchange is None else self._exchange.state_dict()
        return {"ranks": self._count_ranks(), "exchange": exchange}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`rank_state_dict`, after :meth:`load_state_dict`; a collective.

        Of another number of ranks, the errors cannot be this rank's: they start from zero, with a
        warning.
        """
        if state["exchange"] is None:
            return
        if state["ranks"] != self._count_ranks():
            self._warn(
                "Compression errors of %d ranks do not fit %d: they start from zero.",
                state["ranks"],
                self._count_ranks(),
            )
            return
        self._exchange = self._make_exchange(self._work)
        self._exchange.load_state_dict(state["exchange"], self._work.device)

    # ---- words

    def _is_main(self) -> bool:
        return self._count_ranks() == 1 or dist.get_rank() == 0

    def _warn(self, message: str, *args: object) -> None:
        if self._is_main():
            logger.warning(message, *args)

    def _say(self, message: str, *args: object) -> None:
        if self._is_main():
            logger.info(message, *args)


def kept(beta: float, usable: Tensor) -> Tensor:
    """Factor of a moving average: ``beta``, or 1 in a step that is skipped."""
    return torch.where(usable > 0, beta, 1.0)


def norms(pieces: list[Tensor]) -> Tensor:
    """Euclidean norm of each piece, ``(len(pieces),)``."""
    return torch.stack(torch._foreach_norm(pieces))


def _check_options(options: dict[str, Any]) -> None:
    betas = options["betas"]
    checks = {
        "lr": (options["lr"] >= 0, "a number of at least 0"),
        "betas": (len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
        "eps": (options["eps"] > 0, "a number above 0"),
        "weight_decay": (options["weight_decay"] >= 0, "a number of at least 0"),
    }
    for key, (is_valid, valid) in checks.items():
        if not is_valid:
            raise ValueError(f"{key}={options[key]!r} must be {valid}.")


def _on(device: torch.device, value: Any) -> Any:
    """A copy of a saved value with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    return copy.deepcopy(value)
