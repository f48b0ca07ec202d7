"""Layer-wise adaptive learning rates on whole layers, or on the pieces of them that a rank holds.

How the data flows: every optimizer here turns gradients into one direction ``u_l`` per layer, and
scales it by a ratio of two norms, ``||theta_l||`` and that of the direction. So
:meth:`TrustRatioOptimizer.step` only updates the moments and adds up squared norms piece by piece;
:meth:`TrustRatioOptimizer.apply`, after the last group, sums those of all ranks in one all-reduce
of two numbers per layer, and moves the weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dat_ds.optim.layerwise import PADDING, LayerwiseOptimizer, Layout, ParameterGroups
from dat_ds.optim.method import OptimizerMethod

_BLOCK = 2**13


@dataclass
class _Update:
    """A group's update that waits for its ratios."""

    group: dict[str, Any]
    params: list[Tensor]
    directions: list[Tensor]
    layers: Tensor | None  # of each piece of the directions; None: not adapted


class TrustRatioOptimizer(LayerwiseOptimizer):
    """A layer-wise optimizer that scales each layer's direction by a trust ratio.

    A group with ``"adapt": False`` has the ratio 1.

    Subclasses say what the direction is, which of its norms counts, and how weights move.
    """

    def __init__(self, params: ParameterGroups, defaults: dict[str, Any]) -> None:
        """Take over parameter groups; ``defaults`` are the subclass's."""
        super().__init__(params, {**defaults, "adapt": True})

    def _reset(self) -> None:
        self._updates: list[_Update] = []
        self._squares: Tensor | None = None
        self._ratios: Tensor | None = None
        self._peaks: Tensor | None = None
        self._layer_indices: dict[tuple[int, ...], Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As :meth:`LayerwiseOptimizer.__setstate__`."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("adapt", True)

    @property
    def trust_ratios(self) -> dict[str, float]:
        """Ratio of each layer in the last step; 1 where it was not adapted. Waits for the device.

        A rank knows the ratios of the layers of which it holds a piece; others read 1.
        """
        names = self.layout.names
        ratios = [1.0] * len(names) if self._ratios is None else self._ratios.tolist()
        return dict(zip(names, ratios, strict=False))

    def take_peaks(self) -> dict[str, float]:
        """Largest ratio of each layer since the last call; waits for the device.

        Layers of a rank are those of :attr:`trust_ratios`.
        """
        peaks, self._peaks = self._peaks, None
        return {} if peaks is None else dict(zip(self.layout.names, peaks.tolist(), strict=False))

    # ---- steps

    def _collect(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Compute a group's directions, and add its pieces to the squared norms of their layers."""
        layout = self.layout
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
        peaks = self._ratios if self._peaks is None else self._peaks
        self._peaks = torch.maximum(peaks, self._ratios)

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
class TrustRatioMethod(OptimizerMethod):
    """An optimizer whose step is scaled by ratios of whole layers, also where ZeRO cuts them."""

    needs_layers: ClassVar[bool] = True

    preset: Literal["modern", "paper"] = "modern"
    """Where defaults come from: ``modern`` is what timm and NVLAMB do; ``paper`` is the bounded
    rule of Zhang et al., UAI 2022, arXiv 2206.06257, on every tensor."""
    adapt_vectors: bool = False
    """Give vectors a trust ratio too. With the preset ``paper``: true."""

    def arguments(self) -> dict[str, Any]:
        """Options of the optimizer; which vectors adapt is said by group."""
        return {k: v for k, v in super().arguments().items() if k != "adapt_vectors"}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups that say which tensors have trust ratios."""
        groups = super().groups(model)
        for group in groups:
            group["adapt"] = self.adapt_vectors or group["params"][0].ndim > 1
        return groups
