"""Optimizers that need whole layers, and are handed pieces of them.

On one process a layer is a tensor. Under ZeRO it lies in pieces, in flat tensors of several ranks,
and DeepSpeed hands the optimizer one group of them at a time. So an optimizer here does in ``step``
what it can do piece by piece, and in ``apply``, after the last group, what needs whole layers: that
is where ranks talk to each other. A :class:`Layout` says which piece is of which layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.traffic import kind_of_traffic

PADDING = -1
"""In the place of a layer's number: elements that belong to none."""

ParameterGroups = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Parameters, or groups of them with options, as torch's optimizers take them."""


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
            A layer is the pieces of it in the order of these ranks.
        device: Where that group's collectives take their tensors.
        deferred: Whether the tensors come in several calls of ``step``, so that the caller has to
            call ``apply`` after the last one.
        shapes: Shape of each whole layer, in the order of ``names``.
    """

    names: tuple[str, ...]
    segments: Mapping[Tensor, Segments]
    process_group: dist.ProcessGroup | None = None
    device: torch.device | None = None
    deferred: bool = False
    shapes: tuple[torch.Size, ...] = ()


class LayerwiseOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose rule is about whole layers.

    Without DeepSpeed it is an ordinary torch optimizer and every tensor is one layer. Under it,
    :meth:`attach` says where the layers lie.

    Subclasses say what is done with the pieces of one group, and then with all layers.
    """

    def __init__(self, params: ParameterGroups, defaults: dict[str, Any]) -> None:
        """Take over parameter groups; ``defaults`` are the subclass's."""
        self._start_layout()
        self._reset()
        super().__init__(params, defaults)

    def _start_layout(self) -> None:
        self._layout: Layout | None = None
        self._whole = Layout((), {})
        self._awaits_layout = False

    @abstractmethod
    def _reset(self) -> None:
        """Forget what was derived from the layout, which has changed."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, which like torch's own hold groups and state only."""
        super().__setstate__(state)
        if "_whole" not in self.__dict__:
            self._start_layout()
            self._reset()
            for group in self.param_groups:
                self._add_layers(group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; each of the group's tensors is one more layer."""
        super().add_param_group(param_group)
        self._add_layers(self.param_groups[-1]["params"])

    def _add_layers(self, params: Sequence[Tensor]) -> None:
        segments = dict(self._whole.segments)
        for p in params:
            segments[p] = Segments((p.numel(),), (len(segments),))
        names = tuple(map(str, range(len(segments))))
        self._whole = Layout(names, segments, shapes=tuple(p.shape for p in segments))
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
            if any(p not in self.layout.segments for p in params):
                raise RuntimeError(
                    f"{type(self).__name__} was given other tensors than its own, as DeepSpeed "
                    "does, and cannot tell their layers: use dat_ds.initialize."
                )
            if params:
                self._collect(group, params)
        if not self.layout.deferred:
            self.apply()
        return loss

    @abstractmethod
    def _collect(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Do what can be done with the pieces of one group; its tensors have gradients."""

    @abstractmethod
    def apply(self) -> None:
        """Finish the step of all tensors stepped since the last time; a collective."""


class LayerExchange:
    """Brings whole layers together on one rank each, and their pieces back.

    Two all-to-alls for all layers. With ``N`` elements in all, every rank sends about ``N / n``
    elements and gets its own share of layers back, twice. Gathering everything everywhere would
    take ``n / 2`` times the bytes, ``n`` times the memory, and the work ``n`` times over.

    Making it is a collective. Ranks that hold nothing, or own nothing, take part in all of it.

    Args:
        layout: Where the layers lie; it has a process group and shapes.
        known: Of each layer that takes part and of which this rank holds a piece: the elements of
            that piece, and a number that all ranks have for the layer.
        cost: Work on a layer of a shape; layers are dealt out so that ranks have about the same.

    Attributes:
        tags: The number of each layer that takes part, also of those held by others only.
    """

    def __init__(
        self,
        layout: Layout,
        known: Mapping[int, tuple[int, int]],
        cost: Callable[[torch.Size], int],
    ) -> None:
        assert layout.process_group is not None
        self._group, self._device = layout.process_group, layout.device
        self._rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        own = torch.zeros(len(layout.names), 2, dtype=torch.int64)
        for layer, (numel, tag) in known.items():
            own[layer] = torch.tensor((numel, tag))
        own = own.to(self._device)
        gathered = [torch.empty_like(own) for _ in range(ranks)]
        with kind_of_traffic("setup"):
            dist.all_gather(gathered, own, group=self._group)
        table = torch.stack(gathered).cpu()
        self._sizes: list[list[int]] = table[:, :, 0].tolist()
        totals, tags = table[:, :, 0].sum(dim=0).tolist(), table[:, :, 1].amax(dim=0).tolist()
        self.tags = {layer: tags[layer] for layer, total in enumerate(totals) if total}
        self._owned: list[list[int]] = [[] for _ in range(ranks)]
        loads = [0] * ranks
        costs = {layer: cost(layout.shapes[layer]) for layer in self.tags}
        for layer in sorted(costs, key=lambda layer: (-costs[layer], layer)):
            owner = loads.index(min(loads))
            self._owned[owner].append(layer)
            loads[owner] += costs[layer]
        self._order = [layer for layers in self._owned for layer in layers]
        # Elements of this rank's pieces by their owner, and of the pieces it owns by their holder.
        own_sizes, mine = self._sizes[self._rank], self._owned[self._rank]
        self._leaving = [sum(own_sizes[layer] for layer in layers) for layers in self._owned]
        self._arriving = [sum(sizes[layer] for layer in mine) for sizes in self._sizes]

    def gather(self, pieces: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """This rank's pieces of all layers, to the layers that it owns; a collective.

        Args:
            pieces: By layer; any shape.

        Returns:
            Whole layers by their number, flat, float32, on the layout's device.
        """
        mine, ranks = self._owned[self._rank], range(len(self._sizes))
        held = [pieces[layer].reshape(-1) for layer in self._order if layer in pieces]
        arrived = self._exchange(held, self._leaving, self._arriving)
        parts = torch.split(arrived, [self._sizes[r][layer] for r in ranks for layer in mine])
        return {layer: torch.cat(parts[i :: len(mine)]) for i, layer in enumerate(mine)}

    def scatter(self, layers: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The layers that this rank owns, to the pieces of all layers; a collective.

        Args:
            layers: By number; any shape.

        Returns:
            This rank's piece of each layer, flat, float32, on the layout's device; empty where it
            holds none.
        """
        mine, ranks = self._owned[self._rank], range(len(self._sizes))
        cut = {
            layer: torch.split(layers[layer].reshape(-1), [self._sizes[r][layer] for r in ranks])
            for layer in mine
        }
        sent = [cut[layer][r] for r in ranks for layer in mine]
        arrived = self._exchange(sent, self._arriving, self._leaving)
        pieces = torch.split(arrived, [self._sizes[self._rank][layer] for layer in self._order])
        return dict(zip(self._order, pieces, strict=True))

    def _exchange(
        self, tensors: Sequence[Tensor], leaving: list[int], arriving: list[int]
    ) -> Tensor:
        flat = torch.cat(list(tensors)) if tensors else torch.empty(0)
        sent = flat.to(self._device, torch.float32)
        received = sent.new_empty(sum(arriving))
        dist.all_to_all_single(received, sent, arriving, leaving, group=self._group)
        return received
