"""Muon for the hidden matrices of a vision model, AdamW for the rest of it.

Shapes: a matrix is ``(blocks, rows, columns)``: a linear weight has one block, ``(1, out, in)``; a
convolution with ``g`` groups has ``g`` blocks, ``(g, out / g, in / g * kh * kw)``, as its groups
are operators of their own. ``n`` ranks.

How data flow under ZeRO 1 to 3. :meth:`Muon.step` sees one flat shard after another: it updates the
momentum where it lies, and makes AdamW's steps at once, which need no whole tensors.
:meth:`Muon.apply`, after the last shard, sends the pieces of every matrix to one rank, its owner,
which orthogonalises it and sends every rank its piece back.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adamw import adamw

from dat_ds.method import above, at_least, fraction
from dat_ds.optim.layerwise import PADDING, LayerExchange, LayerwiseOptimizer, ParameterGroups
from dat_ds.optim.method import OptimizerMethod, betas_option, default_of
from dat_ds.traffic import kind_of_traffic

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_NEGLIGIBLE = 1e-18
_UPDATE_RMS = 0.2
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLASSIFIERS = (
    *("classifier", "cls_classifier", "distillation_classifier"),  # Hugging Face
    *("fc", "head", "heads", "head_dist"),  # torchvision and most others
)
"""Usual names of the part of a network that puts the outputs out."""


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T``, by Newton and Schulz's iteration.

    The quintic of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon) is steep at 0
    instead of exact at 1: five steps take singular values from 0.002 to 1 times the Frobenius norm
    to between 0.68 and 1.21; smaller ones grow by up to 3.4445 per step.

    In float32, and not in bfloat16 as by Jordan: the steepness multiplies rounding errors by up to
    485, by which ranks and ZeRO stages would differ, and bfloat16 is emulated on most CPUs. It is
    cheap either way: ``10 m^2 n + 5 m^3`` multiplications, for an update of ``m n`` weights.

    Args:
        matrix: ``(..., rows, columns)``, floating point.
        steps: Iterations.

    Returns:
        The same shape, float32 (float64 of float64). Zeros of zeros.
    """
    x: Tensor = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    # Momentum of dead units decays to numbers whose products are subnormal, a hundred times slower
    # on a CPU. They are nothing beside the norm, 1.
    x = functional.hardshrink(x, _NEGLIGIBLE)
    a, b, c = _COEFFICIENTS
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


@dataclass
class _Update:
    """The update of a group of matrices that waits for its orthogonalisation."""

    group: dict[str, Any]
    params: list[Tensor]
    directions: list[Tensor]


class Muon(LayerwiseOptimizer):
    """Muon (Jordan et al. 2024), scaled and decayed as by Liu et al. 2025, arXiv 2502.16982.

    With the gradient ``g`` of a matrix ``W`` of blocks ``(m, n)``::

        b <- momentum * b + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * b     (nesterov; else u = b)
        W <- W - lr * (weight_decay * W + 0.2 * sqrt(max(m, n)) * orthogonalized(u))

    The factor makes an update's root mean square 0.2, about AdamW's, so that ``lr`` and
    ``weight_decay`` are on AdamW's scale, whatever the shape. Groups with ``"muon": False`` are
    torch's AdamW, bit for bit.

    Matrices are orthogonalised in float32, where collectives take their tensors. State: one
    ``momentum_buffer`` of a matrix; ``step``, ``exp_avg`` and ``exp_avg_sq`` of the rest.

    Args:
        params: Matrices, or groups as :func:`muon_groups` makes them. ``"blocks"`` of a group is
            the number of matrices that lie one below another in each tensor.
        lr: Learning rate of matrices.
        weight_decay: Decoupled; default: Liu et al.'s.
        momentum: Of the buffer ``b``; default, as of the next two: Jordan's.
        nesterov: Nesterov's momentum.
        ns_steps: Newton-Schulz iterations.
        adam_lr_ratio: AdamW's learning rate in units of ``lr``, for groups without one of their
            own; Liu et al.: 1.
        betas: AdamW's; default: Jordan's and Liu et al.'s.
        eps: AdamW's.

    Raises:
        ValueError: For a value out of range, or a vector in a group of matrices.
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adam_lr_ratio: float = 1.0,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """See the class."""
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adam_lr_ratio": adam_lr_ratio,
            "betas": tuple(betas),
            "eps": eps,
        }
        _check_options(options)
        super().__init__(params, {**options, "muon": True, "blocks": 1})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group of AdamW's without ``lr`` has the ratio's."""
        if not param_group.get("muon", True):
            rate = self.defaults["adam_lr_ratio"] * self.defaults["lr"]
            param_group = {"lr": rate, **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if group["muon"] and (p.ndim < 2 or p.shape[0] % group["blocks"]):
                raise ValueError(
                    f"A parameter of shape {tuple(p.shape)} is not a matrix of {group['blocks']} "
                    "block(s): put it into a group with 'muon': False, as muon_groups(model) does."
                )

    def _reset(self) -> None:
        self._updates: list[_Update] = []
        self._exchange: LayerExchange | None = None

    # ---- a step

    def _collect(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["muon"]:
            self._updates.append(_Update(group, params, self._momenta(group, params)))
        else:
            self._step_adamw(group, params)

    def _momenta(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Fold gradients into the momentum; what is to be orthogonalised, as new tensors."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            return list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        return [buffer.clone() for buffer in buffers]

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.tensor(0.0)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Orthogonalise and move all matrices stepped since the last time, in two all-to-alls."""
        updates, self._updates = self._updates, []
        pieces = self._pieces(updates)
        if self.layout.process_group is None:
            own = {
                layer: self._direction(layer, updates[i].group, piece.to(self.layout.device))
                for layer, (i, piece) in pieces.items()
            }
        else:
            own = self._exchanged(updates, pieces)
        for layer, (_, piece) in pieces.items():
            piece.copy_(own[layer].view_as(piece))
        for update in updates:
            rate = float(update.group["lr"])
            torch._foreach_mul_(update.params, 1 - rate * update.group["weight_decay"])
            torch._foreach_add_(update.params, update.directions, alpha=-rate)

    def _pieces(self, updates: list[_Update]) -> dict[int, tuple[int, Tensor]]:
        """What this rank holds of each matrix: the update that it is of, and a view to write to."""
        pieces = {}
        for i, update in enumerate(updates):
            for p, direction in zip(update.params, update.directions, strict=True):
                segments = self.layout.segments[p]
                for layer, piece in zip(segments.layers, segments.cut(direction), strict=True):
                    if layer == PADDING:
                        piece.zero_()
                    else:
                        pieces[layer] = (i, piece)
        return pieces

    def _exchanged(
        self, updates: list[_Update], pieces: dict[int, tuple[int, Tensor]]
    ) -> dict[int, Tensor]:
        """This rank's pieces of all updates; each matrix is orthogonalised by its owner."""
        if self._exchange is None:
            known = {layer: (piece.numel(), i) for layer, (i, piece) in pieces.items()}
            self._exchange = LayerExchange(self.layout, known, _cost)
        with kind_of_traffic("momentum"):
            whole = self._exchange.gather({layer: piece for layer, (_, piece) in pieces.items()})
            for layer, matrix in whole.items():
                group = updates[self._exchange.tags[layer]].group
                whole[layer] = self._direction(layer, group, matrix)
            return self._exchange.scatter(whole)

    def _direction(self, layer: int, group: dict[str, Any], momentum: Tensor) -> Tensor:
        """The whole matrix's update, before the learning rate, in the matrix's order."""
        blocks, shape = group["blocks"], self.layout.shapes[layer]
        matrix = momentum.reshape(blocks, shape[0] // blocks, -1)
        scale = _UPDATE_RMS * math.sqrt(max(matrix.shape[1:]))
        return orthogonalized(matrix, group["ns_steps"]).mul_(scale).contiguous()


def _cost(shape: torch.Size) -> int:
    """Of orthogonalising a matrix, in some unit: the same for all ranks."""
    rows = shape[0]
    columns = shape.numel() // rows
    return rows * columns * min(rows, columns)


def _check_options(options: dict[str, Any]) -> None:
    for key in ("lr", "weight_decay", "adam_lr_ratio", "eps"):
        if not 0 <= options[key] < math.inf:
            raise ValueError(f"{key}={options[key]} must be a finite number of at least 0.")
    for key, values in {"momentum": [options["momentum"]], "betas": options["betas"]}.items():
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{key}={options[key]} must lie in [0, 1).")
    if options["ns_steps"] < 1:
        raise ValueError(f"ns_steps={options['ns_steps']} must be at least 1.")


# ---- which parameters are hidden matrices


def muon_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    adam_parameters: Iterable[str] = (),
    muon_parameters: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into hidden matrices and the rest, for :class:`Muon`.

    Matrices are the weights of linear layers, convolutions and ``nn.MultiheadAttention``, by the
    type of their module and not by name. Not among them are:

    * what reads the pixels (patch embedding, first convolution) and what puts the outputs out
      (classifiers): Jordan et al. train both with AdamW, as it works better, and "all the
      convolutional filters except the first one" with Muon;
    * depthwise convolutions, and layers with one input or output: their matrices are vectors;
    * parameters of other modules: class tokens, position embeddings, tables of relative positions,
      norms; and biases.

    A fused query-key-value weight is one matrix, as in torch's and timm's Muon.

    Args:
        model: Any module. Its input layer is what timm's configuration says (``first_conv``), or
            the first layer that it defines; its classifier what timm's ``get_classifier`` says, the
            last layer of each attribute by a usual name (``classifier``, ``fc``, ``head``, ...), or
            the last layer that it defines. Wrappers around one model are looked through.
        weight_decay: Of every parameter with at least two dimensions.
        adam_parameters: Names of further parameters for AdamW; ``*`` stands for anything.
        muon_parameters: Names of parameters with at least two dimensions for Muon, whatever the
            rules above say; the first of them counts as rows.

    Returns:
        Groups, none of them empty, with ``"muon"``, ``"blocks"`` and ``"weight_decay"``.

    Raises:
        ValueError: For a pattern that no parameter has.
    """
    blocks = {id(w): count for layer in model.modules() for w, count in _matrices(layer)}
    chosen = {key for key, is_matrix in _is_hidden(model).items() if is_matrix}
    chosen |= _matching(model, "muon_parameters", muon_parameters)
    chosen -= _matching(model, "adam_parameters", adam_parameters)
    trainable = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trainable if id(p) not in chosen]
    matrices = [(p, blocks.get(id(p), 1)) for p in trainable if id(p) in chosen]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p, own in matrices if own == count],
            "weight_decay": weight_decay,
            "muon": True,
            "blocks": count,
        }
        for count in sorted({count for _, count in matrices})
    ]
    for decay, params in (
        (weight_decay, [p for p in rest if p.ndim > 1]),
        (0.0, [p for p in rest if p.ndim <= 1]),
    ):
        if params:
            groups.append({"params": params, "weight_decay": decay, "muon": False})
    return groups


def _matching(model: nn.Module, key: str, patterns: Iterable[str]) -> set[int]:
    found = set()
    for pattern in patterns:
        own = {id(p) for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)}
        if not own:
            raise ValueError(f"{key}: the model has no parameter {pattern!r}.")
        found |= own
    return found


def _is_hidden(model: nn.Module) -> dict[int, bool]:
    """Whether each weight of a layer is a hidden matrix, by its id."""
    ends = {id(w) for layer in (*_inputs(model), *_outputs(model)) for w, _ in _matrices(layer)}
    return {
        id(w): id(w) not in ends and not _is_vector(layer)
        for layer in model.modules()
        for w, _ in _matrices(layer)
    }


def _matrices(layer: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights of a linear map or convolution and their blocks; none of any other module."""
    names: tuple[str, ...] = ()
    if isinstance(layer, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        names = ("weight",)
    for name, parameter in layer.named_parameters(recurse=False):
        if name in names:
            yield parameter, getattr(layer, "groups", 1)


def _is_vector(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features) == 1
    if isinstance(layer, _CONVOLUTIONS):
        inputs, outputs = (n // layer.groups for n in (layer.in_channels, layer.out_channels))
        is_depthwise = layer.groups > 1 and inputs == 1
        return is_depthwise or min(inputs * math.prod(layer.kernel_size), outputs) == 1
    return False


def _inputs(model: nn.Module) -> list[nn.Module]:
    """The layers that read the pixels."""
    for module in _unwrapped(model):
        names = (getattr(module, "pretrained_cfg", None) or {}).get("first_conv")
        names = (names,) if isinstance(names, str) else names or ()
        modules = dict(module.named_modules())
        layers = [_layers(modules[name])[:1] for name in names if name in modules]
        if any(layers):
            return [layer for first in layers for layer in first]
    return _layers(model)[:1]


def _outputs(model: nn.Module) -> list[nn.Module]:
    """The layers that put the outputs out; none where those are features."""
    for module in _unwrapped(model):
        if callable(find := getattr(module, "get_classifier", None)):
            heads = find()
            heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
        else:
            heads = [child for name, child in module.named_children() if name in CLASSIFIERS]
        if heads:
            return [layer for head in heads for layer in _layers(head)[-1:]]
    return _layers(model)[-1:]


def _layers(module: nn.Module) -> list[nn.Module]:
    """Linear maps and convolutions inside, in the order in which they are defined."""
    return [layer for layer in module.modules() if any(_matrices(layer))]


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and if all its parameters are in one child, that child, and so on."""
    yield model
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
        yield from _unwrapped(children[0])


@dataclass(frozen=True, kw_only=True)
class MuonMethod(OptimizerMethod):
    """Orthogonalised momentum for hidden matrices, AdamW for the rest of a vision model."""

    name: ClassVar[str] = "muon"
    paper: ClassVar[str] = (
        "Jordan et al. 2024; scale and decay of Liu et al. 2025, arXiv 2502.16982; for adversarial "
        "training arXiv 2605.26929"
    )
    scaling: ClassVar[str | None] = "sqrt"
    needs_layers: ClassVar[bool] = True

    lr: float = above(0, default_of(Muon, "lr"))
    """Learning rate of matrices, on AdamW's scale."""
    weight_decay: float = at_least(0, default_of(Muon, "weight_decay"))
    """Decoupled weight decay of every parameter with at least two dimensions."""
    momentum: float = fraction(default_of(Muon, "momentum"))
    """Decay of the average of gradients."""
    nesterov: bool = default_of(Muon, "nesterov")
    """Nesterov's momentum."""
    ns_steps: int = at_least(1, default_of(Muon, "ns_steps"))
    """Newton-Schulz iterations that orthogonalise an update."""
    adam_lr_ratio: float = at_least(0, default_of(Muon, "adam_lr_ratio"))
    """Learning rate of the parameters that AdamW trains, as a multiple of ``lr``."""
    betas: list[float] = betas_option(default_of(Muon, "betas"))
    """AdamW's decays of the two moments."""
    eps: float = above(0, default_of(Muon, "eps"))
    """AdamW's eps, added to the root of the second moment."""
    adam_parameters: list[str] = dataclasses.field(default_factory=list)
    """Names of further parameters that AdamW trains; ``*`` stands for anything."""
    muon_parameters: list[str] = dataclasses.field(default_factory=list)
    """Names of parameters that Muon trains though AdamW would."""

    def problems(self) -> Iterator[str]:
        """What any model can tell; names of parameters are those of the run's."""
        nameless = dataclasses.replace(self, adam_parameters=[], muon_parameters=[])
        return super(MuonMethod, nameless).problems()

    def arguments(self) -> dict[str, Any]:
        """Options of the optimizer; the names are for its groups."""
        return {k: v for k, v in super().arguments().items() if k not in _NAMES}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """See :func:`muon_groups`."""
        names = {key: getattr(self, key) for key in _NAMES}
        return muon_groups(model, self.weight_decay, **names)

    def rate_of(self, group: Mapping[str, Any]) -> float:
        """Of matrices ``lr``; of the rest the ratio's."""
        return self.lr if group["muon"] else self.lr * self.adam_lr_ratio

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """:class:`Muon`."""
        return Muon(params, **self.arguments())


_NAMES = ("adam_parameters", "muon_parameters")
