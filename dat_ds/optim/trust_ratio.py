"""Layer-wise adaptive learning rates on whole layers, or on the pieces of them that a rank holds.

How the data flows: every optimizer here turns gradients into one direction ``u_l`` per layer, and
scales it by a ratio of two norms, ``||theta_l||`` and that of the direction. On one process a layer
is a tensor. Under ZeRO it lies in pieces, in flat tensors of several ranks, and DeepSpeed hands the
optimizer one group of them at a time. So :meth:`LayerwiseOptimizer.step` only updates the moments
and adds up squared norms piece by piece; :meth:`LayerwiseOptimizer.apply`, after the last group,
sums those of all ranks in one all-reduce of two numbers per layer, and moves the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dat_ds.optim.method import OptimizerMethod

_BLOCK = 2**13
PADDING = -1
"""In the place of a layer's number: elements that belong to none."""

Groups = Iterable[Tensor] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Segments:
    """Consecutive pieces that make up one tensor.

    Args:
        sizes: Elements of each piece; they add up to the tensor's.
        layers: The layer that each piece is of, or :data:`PADDING`. No layer occurs twice.
    """

    sizes: tuple[int, ...]
    layers: tuple[int, ...]

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of the pieces of ``tensor``: itself, where it is one layer."""
        return torch.split(tensor, list(self.sizes)) if len(self.sizes) > 1 else (tensor,)


@dataclass(frozen=True)
class Layout:
    """Where the layers of a model lie in the tensors that an optimizer is given.

    Args:
        names: Layers in order; the same on every rank.
        segments: The pieces of each tensor. Several tensors may be handed over one after another.
        process_group: Ranks that together hold the layers; None where this one holds all of them.
        device: Where that group's collectives take their tensors.
        deferred: Whether the tensors come in several calls of ``step``, so that the caller has to
            call ``apply`` after the last one.
    """

    names: tuple[str, ...]
    segments: Mapping[Tensor, Segments]
    process_group: dist.ProcessGroup | None = None
    device: torch.device | None = None
    deferred: bool = False


@dataclass
class _Update:
    """A group's update that waits for its ratios."""

    group: dict[str, Any]
    params: list[Tensor]
    directions: list[Tensor]
    layers: Tensor | None  # of each piece of the directions; None: not adapted


class LayerwiseOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that scales each layer's direction by a trust ratio.

    Without DeepSpeed it is an ordinary torch optimizer and every tensor is one layer. Under it,
    :meth:`attach` says where the layers lie. A group with ``"adapt": False`` has the ratio 1.

    Subclasses say what the direction is, which of its norms counts, and how weights move.
    """

    def __init__(self, params: Groups, defaults: dict[str, Any]) -> None:
        """Take over parameter groups; ``defaults`` are the subclass's."""
        self._layout: Layout | None = None
        self._whole = Layout((), {})
        self._awaits_layout = False
        self._reset()
        super().__init__(params, {**defaults, "adapt": True})

    def _reset(self) -> None:
        self._updates: list[_Update] = []
        self._squares: Tensor | None = None
        self._ratios: Tensor | None = None
        self._layer_indices: dict[tuple[int, ...], Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, which like torch's own hold groups and state only."""
        super().__setstate__(state)
        if "_whole" not in self.__dict__:
            self._layout, self._whole, self._awaits_layout = None, Layout((), {}), False
            self._reset()
            for group in self.param_groups:
                self._add_layers(group["params"])
        for group in self.param_groups:
            group.setdefault("adapt", True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; each of the group's tensors is one more layer."""
        super().add_param_group(param_group)
        self._add_layers(self.param_groups[-1]["params"])

    def _add_layers(self, params: Sequence[Tensor]) -> None:
        segments = dict(self._whole.segments)
        for p in params:
            segments[p] = Segments((p.numel(),), (len(segments),))
        self._whole = Layout(tuple(map(str, range(len(segments)))), segments)
        self._reset()

    # ---- under DeepSpeed

    def await_layout(self) -> None:
        """Ignore ``step`` until :meth:`attach`: DeepSpeed takes one while it sets itself up."""
        self._awaits_layout = True

    def attach(self, layout: Layout) -> None:
        """Take layers from ``layout`` from now on."""
        self._layout, self._awaits_layout = layout, False
        self._reset()

    @property
    def layout(self) -> Layout:
        """Where the layers lie: as attached, or each tensor one layer, named by its number."""
        return self._whole if self._layout is None else self._layout

    @property
    def trust_ratios(self) -> dict[str, float]:
        """Ratio of each layer in the last step; 1 where it was not adapted. Waits for the device.

        A rank knows the ratios of the layers of which it holds a piece; others read 1.
        """
        names = self.layout.names
        ratios = [1.0] * len(names) if self._ratios is None else self._ratios.tolist()
        return dict(zip(names, ratios, strict=False))

    # ---- steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the tensors in the parameter groups that have a gradient.

        Raises:
            RuntimeError: If the tensors were replaced by others whose layers are unknown.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._awaits_layout:
            return loss
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._collect(group, params)
        if not self.layout.deferred:
            self.apply()
        return loss

    def _collect(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Compute a group's directions, and add its pieces to the squared norms of their layers."""
        layout = self.layout
        if any(p not in layout.segments for p in params):
            raise RuntimeError(
                f"{type(self).__name__} was given other tensors than its own, as DeepSpeed does, "
                "and cannot tell their layers: use dat_ds.initialize."
            )
        measured, directions = self._directions(group, params)
        layers = None
        if group["adapt"]:
            layers = self._layers_of(params, layout)
            pieces = [
                piece
                for tensors in (params, measured)
                for p, tensor in zip(params, tensors, strict=True)
                for piece in layout.segments[p].cut(tensor)
            ]
            squares = _squared_norms(pieces).view(2, -1)
            self._squares_on(squares.device).index_copy_(1, layers, squares)
        self._updates.append(_Update(group, params, directions, layers))

    @torch.no_grad()
    def apply(self) -> None:
        """Move all tensors stepped since the last time, with one all-reduce for their ratios."""
        layout, updates, self._updates = self.layout, self._updates, []
        squares = self._squares_on(updates[0].params[0].device if updates else layout.device)
        squares[:, PADDING] = 0
        norms = squares.float()
        squares.zero_()
        if layout.process_group is not None:
            shared = norms.to(layout.device)
            dist.all_reduce(shared, group=layout.process_group)
            norms = shared.to(norms.device)
        weight_norms, measured_norms = norms.sqrt_()
        self._ratios = torch.ones_like(weight_norms)
        for update in updates:
            if update.layers is not None:
                w, u = weight_norms[update.layers], measured_norms[update.layers]
                ratios = self._ratios_of(update.group, w, u)
                self._ratios.index_copy_(0, update.layers, ratios)
                pairs = zip(update.params, update.directions, strict=True)
                pieces = [piece for p, d in pairs for piece in layout.segments[p].cut(d)]
                torch._foreach_mul_(pieces, list(ratios.unbind()))
            self._move(update.group, update.params, update.directions)

    # ---- what a subclass says

    @abstractmethod
    def _directions(
        self, group: dict[str, Any], params: list[Tensor]
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        """The tensors whose norms count, and new tensors that are to be scaled by the ratios."""

    @abstractmethod
    def _ratio(
        self, group: dict[str, Any], bounded: Tensor, weight_norms: Tensor, norms: Tensor
    ) -> Tensor:
        """Ratio of each layer.

        Args:
            group: Options.
            bounded: ``tau(||theta_l||)``.
            weight_norms: ``||theta_l||``.
            norms: Norm of what :meth:`_directions` measured. Where it or ``bounded`` is 0, the
                result is not used.
        """

    @abstractmethod
    def _move(self, group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
        """Move the weights along the scaled directions."""

    # ---- internals

    def _ratios_of(self, group: dict[str, Any], weight_norms: Tensor, norms: Tensor) -> Tensor:
        bounded = weight_norms.clamp(min=group["lower"], max=group["upper"])
        ratios = self._ratio(group, bounded, weight_norms, norms)
        return torch.where((bounded > 0) & (norms > 0), ratios, 1.0)

    def _layers_of(self, params: list[Tensor], layout: Layout) -> Tensor:
        """Layer of each piece of ``params``, on their device: making it anew would wait for it."""
        key = tuple(map(id, params))
        if key not in self._layer_indices:
            layers = [layer for p in params for layer in layout.segments[p].layers]
            layers = [len(layout.names) if layer == PADDING else layer for layer in layers]
            self._layer_indices[key] = torch.tensor(layers, device=params[0].device)
        return self._layer_indices[key]

    def _squares_on(self, device: torch.device | None) -> Tensor:
        """Squared norms ``(2, layers + 1)`` of the weights and of what is measured; float64.

        The last column takes the padding's.
        """
        if self._squares is None:
            shape = (2, len(self.layout.names) + 1)
            self._squares = torch.zeros(shape, dtype=torch.float64, device=device)
        return self._squares


def _squared_norms(pieces: Sequence[Tensor]) -> Tensor:
    """Squared l2 norm of each of ``pieces``, float64 and exact to float32's rounding.

    A CPU's float32 sum of millions of squares is wrong in the fifth digit, and in float64 it copies
    the pieces first; so it sums blocks in float32 and those in float64.
    """
    if pieces[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(pieces), 2, torch.float64)).square_()
    blocks = [torch.split(piece.flatten(), _BLOCK) for piece in pieces]
    norms = torch._foreach_norm([b for blocks_ in blocks for b in blocks_], 2, torch.float32)
    lengths = torch.tensor([len(blocks_) for blocks_ in blocks])
    return torch.segment_reduce(torch.stack(norms).double().square_(), "sum", lengths=lengths)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: With the option and its range.
    """
    for key in ("lr", "weight_decay", "eps", "trust_coefficient", "lower"):
        if not 0 <= options.get(key, 0) < math.inf:
            raise ValueError(f"{key}={options[key]} must be a finite number of at least 0.")
    for key, values in {
        "betas": options.get("betas", (0, 0)),
        "momentum": [options.get("momentum", 0)],
    }.items():
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{key}={options[key]} must lie in [0, 1).")
    lower, upper = options["lower"], options["upper"]
    if (upper is not None and not max(lower, 0) <= upper) or upper == 0:
        raise ValueError(f"upper={upper} must be above 0 and at least lower={lower}.")
    if options.get("nesterov") and not options["momentum"]:
        raise ValueError("nesterov=True needs a momentum above 0.")
    if options.get("scaled", "gradient") not in ("gradient", "momentum"):
        raise ValueError(f"scaled={options['scaled']!r} is not one of gradient, momentum.")


@dataclass(frozen=True, kw_only=True)
class LayerwiseMethod(OptimizerMethod):
    """An optimizer whose step goes by whole layers, also where ZeRO cuts them."""

    needs_layers: ClassVar[bool] = True

    preset: Literal["modern", "paper"] = "modern"
    """Where defaults come from: ``modern`` is what timm and NVLAMB do; ``paper`` is the bounded
    rule of Zhang et al., UAI 2022, arXiv 2206.06257, on every tensor."""
    adapt_vectors: bool = False
    """Give vectors a trust ratio too. Of ``paper`` true."""

    def arguments(self) -> dict[str, Any]:
        """Options of the optimizer; which vectors adapt is said by group."""
        return {k: v for k, v in super().arguments().items() if k != "adapt_vectors"}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups that say which tensors have trust ratios."""
        groups = super().groups(model)
        for group in groups:
            group["adapt"] = self.adapt_vectors or group["params"][0].ndim > 1
        return groups
