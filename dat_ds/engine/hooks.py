"""Every reach into DeepSpeed's internals, each pinned by a test in ``tests/distributed``.

Written against deepspeed 0.19.8; ``pyproject.toml`` allows ``>=0.19.8,<0.20``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dat_ds import zero3
from dat_ds.errors import LossScaleError, UserError
from dat_ds.optim import PADDING, LayerwiseOptimizer, Layout, Segments

_SHARDED = (BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)


def skip_shared_memory_op() -> None:
    """Keep ``init_distributed`` from compiling a CPU collective that training never calls.

    The op (90 s to build) only serves ``inference_all_reduce``.
    """
    # ``import deepspeed.comm.torch as m`` would bind torch itself, which that module re-exports.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


_CURRENT_NAMES = {
    "all_gather_function": "all_gather_single",
    "reduce_scatter_function": "reduce_scatter_single",
}


def use_current_collectives() -> None:
    """Let DeepSpeed call two of torch's collectives by the names that torch recommends.

    They are the same functions; by the names that DeepSpeed uses, torch 2.14 warns of them.
    """
    backend = deepspeed.comm.comm.cdb
    for attribute, name in _CURRENT_NAMES.items():
        if hasattr(dist, name):
            setattr(backend, attribute, getattr(dist, name))


@contextlib.contextmanager
def tested_optimizer() -> Iterator[None]:
    """Inside, DeepSpeed does not warn that it has not tested the optimizer under ZeRO: we have."""

    def is_other(record: logging.LogRecord) -> bool:
        return "ZeRO with an untested optimizer" not in record.getMessage()

    deepspeed.utils.logger.addFilter(is_other)
    try:
        yield
    finally:
        deepspeed.utils.logger.removeFilter(is_other)


def supports_fp16() -> bool:
    """Whether DeepSpeed accepts ``fp16`` on this device."""
    return bool(get_accelerator().is_fp16_supported())


def supports_bf16() -> bool:
    """Whether DeepSpeed accepts ``bf16`` on this device."""
    return bool(get_accelerator().is_bf16_supported())


LOSS_SCALE_ADVICE = "Write bf16 or torch_autocast instead of fp16, or a smaller lr."


@contextlib.contextmanager
def named_loss_scale_error() -> Iterator[None]:
    """Give DeepSpeed's bare exception at the smallest float16 loss scale a name.

    Raises:
        LossScaleError: When the scale cannot shrink any further.
    """
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise LossScaleError(
            "float16 gradients overflow even at the smallest loss scale (fp16.min_loss_scale); "
            f"training stopped. {LOSS_SCALE_ADVICE}"
        ) from None


@contextlib.contextmanager
def untimed(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, forwards of the bare module are left out of ``wall_clock_breakdown``'s times.

    Hooks of DeepSpeed's on the module start and stop these timers, whoever calls it.
    """
    timers = engine.engine_timers
    names, timers.forward_timers = timers.forward_timers, []
    try:
        yield
    finally:
        timers.forward_timers = names


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages this parameter and holds only this rank's shard right now."""
    return hasattr(parameter, "ds_status") and parameter.ds_status.name == "NOT_AVAILABLE"


def loss_scale(engine: DeepSpeedEngine) -> float:
    """The factor on a float16 loss right now; 1 in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_loss_scale(engine: DeepSpeedEngine, saved: Mapping[str, Any]) -> None:
    """Go on with the float16 loss scale that DeepSpeed's optimizer of any ZeRO stage has saved."""
    if not engine.fp16_enabled():
        return
    source = vars(saved["loss_scaler"]) if "loss_scaler" in saved else saved
    unfused = isinstance(engine.optimizer, FP16_UnfusedOptimizer)
    scaler = engine.optimizer.loss_scale_config if unfused else engine.optimizer.loss_scaler
    for name in _SCALER_STATE:
        if name in source and hasattr(scaler, name):
            setattr(scaler, name, source[name])


def missing_loss_scale(engine: DeepSpeedEngine) -> float:
    """Factor for the loss that ``backward`` leaves out although ``step`` divides by it.

    DeepSpeed 0.19.8 scales float16 losses under ZeRO 1 to 3, and forgets to at ZeRO-0.
    """
    return 1.0 if isinstance(engine.optimizer, ZeROOptimizer) else loss_scale(engine)


def reduce_in_backward(engine: DeepSpeedEngine, enabled: bool) -> None:
    """Whether ``backward`` averages gradients over ranks, at ZeRO-0.

    Where it does not, DeepSpeed's check for overflow in 16 bits asks all ranks by itself.
    """
    engine.enable_backward_allreduce = enabled


def leaves_out_non_finite(engine: DeepSpeedEngine) -> bool:
    """Whether DeepSpeed leaves out a step whose gradients are not finite, on all ranks alike.

    It then knows on the host, in every step, and counts it in ``skipped_steps``. In float32 and
    under autocast at ZeRO-0 it looks at no gradient, and ZeRO 1 and 2 may be told not to.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        takes_norm = optimizer.compute_grad_norm and optimizer.dtype != torch.bfloat16
        return bool(optimizer.check_grad_overflow or takes_norm)
    return hasattr(optimizer, "overflow")


@torch.no_grad()
def gradient_norm(engine: DeepSpeedEngine) -> Tensor:
    """Largest entry, in magnitude, of the gradients that a ZeRO-0 step is about to take, ``()``.

    NaN where one is; without waiting for the device. Zero where DeepSpeed holds them elsewhere.
    """
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=accelerator_device())
    return torch.stack([n.float() for n in torch._foreach_norm(gradients, math.inf)]).amax()


def loss_scale_is_smallest(engine: DeepSpeedEngine) -> bool:
    """Whether the factor on float16 losses cannot shrink: it is fixed, or at its minimum."""
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "dynamic"):  # ZeRO 1 to 3
        return not scaler.dynamic or scaler.cur_scale <= scaler.min_scale
    config = getattr(optimizer, "loss_scale_config", None)
    if config is not None:  # ZeRO-0
        return not config.dynamic_loss_scale or config.cur_scale <= config.min_loss_scale
    return gradient_scale(engine) <= 1


_HUGE = 2.0**48  # the squares of a billion of these still add up in float32


def skip_huge_gradients_together(engine: DeepSpeedEngine) -> None:
    """Let all ranks skip a 16-bit step at ZeRO-0 where one's gradients are too large for a norm.

    DeepSpeed asks all ranks whether an entry is infinite or NaN, but decides on each alone whether
    the norm is: with gradients of each rank's own, ranks would fall out of step.
    """

    def is_out_of_range(gradient: Tensor, index: int) -> bool:
        return gradient.numel() > 0 and not bool(gradient.abs().amax() < _HUGE)

    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.overflow_checker._has_inf_or_nan = is_out_of_range


@torch.no_grad()
def copy_master_weights(engine: DeepSpeedEngine) -> None:
    """Make the model's 16-bit parameters those of the float32 ones that a ZeRO-0 step updates."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_(halves, masters)


def gradient_scale(engine: DeepSpeedEngine) -> float:
    """The factor on all gradients right now, under ``fp16`` or float16 autocast; else 1."""
    scaler = grad_scaler(engine)
    return loss_scale(engine) if scaler is None else float(scaler.get_scale())


def grad_scaler(engine: DeepSpeedEngine) -> torch.amp.GradScaler | None:
    """The scaler of torch under float16 autocast; None elsewhere."""
    scaler: torch.amp.GradScaler | None = engine.torch_autocast_z0_gradscaler or getattr(
        engine.optimizer, "torch_autocast_gradscaler", None
    )
    return scaler


_AVERAGE_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


def replace_gradient_averaging(
    engine: DeepSpeedEngine,
    average: Callable[[str, Tensor], Tensor],
    scatter: Callable[[str, Sequence[Tensor]], list[Tensor]],
) -> None:
    """Let others average gradients over the ranks, in DeepSpeed's place and at its time.

    Args:
        engine: With ``reduce_scatter`` off at ZeRO stages 1 and 2, and on at stage 3.
        average: Stages 0 to 2: a name of the bucket, and its flat gradients in any dtype, to their
            mean. The name stands for the parameters in it (at stage 0 for their number).
        scatter: Stage 3: a name of the bucket, and the gradients of its parameters, to this rank's
            share of the mean of each, ``ceil(numel / ranks)`` entries.

    Raises:
        UserError: If this DeepSpeed has no such method.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()

    def allreduce_bucket(bucket: list[Tensor], group: Any, ranks: Any = None) -> Tensor:
        flat: Tensor = engine.flatten(bucket)
        return flat.copy_(average(str(flat.numel()), flat))

    def reduce_in_place(flat: Tensor, dtype: torch.dtype) -> Tensor:
        places = [place[:2] for place in optimizer.ipg_buckets[dtype].params]
        return flat.copy_(average(str(places), flat))

    def average_scatter(parameters: list[Any], dtype: torch.dtype) -> list[Tensor]:
        shares = scatter(str([order[id(p)] for p in parameters]), [p.grad for p in parameters])
        return [share.to(optimizer.gradient_accumulation_dtype) for share in shares]

    if stage == 0:
        _replace(engine, "allreduce_bucket", allreduce_bucket)
    elif stage < 3:
        _replace(optimizer, "gradient_reduction_w_predivide", reduce_in_place)
    else:
        order = {id(p): i for i, p in enumerate(engine.module.parameters())}
        _replace(optimizer, _AVERAGE_SCATTER, average_scatter)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put ``function`` in the place of a method of one object."""
    if not hasattr(owner, name):
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{name}, in whose "
            "place dat.compression works: install deepspeed>=0.19.8,<0.20."
        )
    setattr(owner, name, function)


class _GatheredParameters:
    """Parameters whose values are known, in the place of DeepSpeed's handle of a gather."""

    def __init__(self, parameters: list[Any], values: list[Tensor]) -> None:
        self._pending = list(zip(parameters, values, strict=True))
        accelerator = get_accelerator()
        self._event = None if accelerator.is_synchronized_device() else accelerator.Event()
        if self._event is not None:
            self._event.record()  # on the stream of gathers, which is not the one that waits

    def wait(self, handle_dependency: bool = True) -> None:
        """Hand the values over to the stream that computes."""
        if self._event is not None and self._pending:
            get_accelerator().current_stream().wait_event(self._event)
        for parameter, value in self._pending:
            if self._event is not None:
                value.record_stream(get_accelerator().current_stream())
            parameter.data = value
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._pending.clear()


def replace_parameter_gathers(
    engine: DeepSpeedEngine,
    gather: Callable[[Sequence[Tensor], Sequence[int]], list[Tensor] | None],
) -> None:
    """Let others gather ZeRO-3 parameters for forward and backward passes.

    Gathers outside the passes, as for exporting the model, stay DeepSpeed's.

    Args:
        engine: At ZeRO stage 3, without secondary shards (``zero_hpz_partition_size``).
        gather: From this rank's shard of each parameter, flat and without padding, and the entries
            of a shard with it, to each whole parameter, flat, with the padding at its end; None
            leaves the gather to DeepSpeed.

    Raises:
        UserError: If this DeepSpeed has no such method.
    """

    def replaced(original: Any) -> Callable[..., Any]:
        def all_gather(parameters: Any, safe_mode: bool = False, quantize: bool = False) -> Any:
            ordered = sorted(parameters, key=lambda p: p.ds_id)
            shards = [_own_entries(p).to(engine.device) for p in ordered]
            whole = gather(shards, [p.ds_tensor.ds_numel for p in ordered])
            if whole is None:
                return original(ordered, safe_mode=safe_mode, quantize=quantize)
            values = []
            for parameter, flat in zip(ordered, whole, strict=True):
                value = flat[: parameter.ds_numel].view(parameter.ds_shape)
                values.append(value.to(parameter.ds_tensor.dtype))
                parameter.ds_status = ZeroParamStatus.INFLIGHT
            return _GatheredParameters(ordered, values)

        return all_gather

    name = "all_gather_coalesced"
    for parameter in engine.module.parameters():
        _replace(parameter, name, replaced(getattr(parameter, name, None)))


def _own_entries(parameter: Any) -> Tensor:
    """This rank's ZeRO-3 shard of a parameter, without the padding, which is uninitialised."""
    shard: Tensor = parameter.ds_tensor
    start = dist.get_rank(parameter.ds_process_group) * shard.ds_numel  # type: ignore[attr-defined]
    return shard[: max(0, parameter.ds_numel - start)]


def resident_parameters(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager[None]:
    """See :func:`dat_ds.zero3.resident_parameters`."""
    return zero3.resident_parameters(engine.module, engine.optimizer)


def release_parameters(engine: DeepSpeedEngine) -> None:
    """See :func:`dat_ds.zero3.release_parameters`."""
    zero3.release_parameters(engine.module)


def held_weights(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that hold this rank's weights: whole parameters, or ZeRO-3 shards.

    Who writes to shards has to call :func:`release_parameters`: gathered copies of them exist.
    """
    return [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]


def trained_weights(engine: DeepSpeedEngine) -> Callable[[], list[Tensor]]:
    """A function that gives those of :func:`held_weights` that are trained.

    To be called while no attack has frozen the others; the function may be called at any time.
    """
    trained = [i for i, p in enumerate(engine.module.parameters()) if p.requires_grad]

    def weights() -> list[Tensor]:
        held = held_weights(engine)
        return [held[i] for i in trained]

    return weights


def trained_pieces(engine: DeepSpeedEngine) -> list[Piece]:
    """What lies in each of :func:`trained_weights`; to be called as that."""
    pairs = zip(held_pieces(engine), engine.module.parameters(), strict=True)
    return [piece for piece, p in pairs if p.requires_grad]


def weights_are_finite(engine: DeepSpeedEngine) -> bool:
    """Whether this rank's weights are, whole parameters or ZeRO-3 shards; waits for the device."""
    held = []
    for parameter in engine.module.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        if shard is None:
            held.append(parameter.data)
        elif shard.status.name == "AVAILABLE":  # not where it lies on a disk
            held.append(_own_entries(parameter))
    return all(bool(tensor.isfinite().all()) for tensor in held)


def gathered_numel(engine: DeepSpeedEngine) -> int:
    """Number of parameters of the whole model, wherever they are."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


def gathered_bytes(engine: DeepSpeedEngine) -> int:
    """See :func:`dat_ds.zero3.gathered_bytes`."""
    return zero3.gathered_bytes(engine.module)


def full_state_dict(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The module's whole state on the CPU; a collective under ZeRO-3, called by every rank.

    Returns:
        Names to tensors in the module's dtypes on rank 0; empty on other ranks.
    """
    is_writer = engine.global_rank == 0
    state: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        if is_writer:
            state[name] = tensor.detach().to("cpu", copy=True)

    for name, parameter in engine.module.named_parameters():
        # One parameter at a time: the whole model need not fit on a device.
        gather: Sequence[nn.Parameter] = [parameter] if is_partitioned(parameter) else []
        with deepspeed.zero.GatheredParameters(gather, enabled=bool(gather)):
            keep(name, parameter.data)
    first_name = {id(p): name for name, p in engine.module.named_parameters()}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        tied_to = first_name.get(id(tensor))
        if tied_to is None:
            keep(name, tensor)  # a buffer: never partitioned
        elif is_writer:
            state[name] = state[tied_to]
    return state


def accelerator_device() -> torch.device:
    """The device that DeepSpeed assigns to this process."""
    accelerator = get_accelerator()
    return torch.device(accelerator.current_device_name())


def basic_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that ZeRO or the mixed precision drives: the one that was passed in."""
    basic: torch.optim.Optimizer = engine.basic_optimizer
    return basic


_STEP = "step"  # where an optimizer counts steps in its groups, they are not an option of its


def hyperparameters(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """Options of the optimizer's parameter groups, such as its rates before any schedule."""
    base_rates = getattr(engine.lr_scheduler, "base_lrs", None)
    groups = basic_optimizer(engine).param_groups
    options = [{k: v for k, v in g.items() if k not in ("params", _STEP)} for g in groups]
    rates = [group["lr"] for group in options] if base_rates is None else base_rates
    return [{**group, "lr": rate} for group, rate in zip(options, rates, strict=True)]


def set_hyperparameters(engine: DeepSpeedEngine, options: Sequence[Mapping[str, Any]]) -> None:
    """Put the options of :func:`hyperparameters` in the place of those of a checkpoint."""
    groups = basic_optimizer(engine).param_groups
    for group, new in zip(groups, options, strict=True):
        group.update(new)
    scheduler = engine.lr_scheduler
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["lr"] for group in options]
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate


def attach_layers(engine: DeepSpeedEngine, optimizer: LayerwiseOptimizer) -> None:
    """Tell ``optimizer``, which ``engine`` drives, where the layers lie in what it is handed.

    ZeRO steps one group of its shards after another, and copies each to the model's parameters at
    once; what needs whole layers waits for the last, and then the earlier groups are copied again.
    """
    zero = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if not isinstance(zero, _SHARDED):
        masters, parameters = _whole_masters(zero)
        whole = {p: Segments((p.numel(),), (layer,)) for layer, p in enumerate(masters)}
        shapes = tuple(p.shape for p in masters)
        optimizer.attach(Layout(tuple(names[id(p)] for p in parameters), whole, shapes=shapes))
        return
    groups = _flat_groups(zero)
    deferred = not isinstance(zero, BF16_Optimizer)
    layout = Layout(
        names=tuple(names[id(p)] for group in groups for p in group.parameters),
        segments={
            group.flat: group.cut(layer)
            for group, layer in zip(groups, _starts([len(g.sizes) for g in groups]), strict=True)
        },
        process_group=zero.dp_process_group if dist.get_world_size() > 1 else None,
        device=accelerator_device(),
        deferred=deferred,
        shapes=tuple(getattr(p, "ds_shape", p.shape) for g in groups for p in g.parameters),
    )
    optimizer.attach(layout)
    if deferred:
        zero._optimizer_step = _applied_after_the_last(zero, optimizer, len(groups))


def _applied_after_the_last(
    zero: Any, optimizer: LayerwiseOptimizer, num_groups: int
) -> Callable[[int], None]:
    step_group = zero._optimizer_step

    @functools.wraps(step_group)
    def step(index: int) -> None:
        step_group(index)
        if index == num_groups - 1:
            optimizer.apply()
            for earlier in range(index):
                _copy_to_parameters(zero, earlier)

    return step


def _copy_to_parameters(zero: Any, index: int) -> None:
    """Copy the master weights of one group to the model's parameters, as ZeRO's step does."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    else:
        rank = dist.get_rank(zero.real_dp_process_group[index])
        shard = zero.parallel_partitioned_bit16_groups[index][rank]
        shard.data.copy_(zero.single_partition_of_fp32_groups[index].data)


Piece = tuple[str, int, int, int]
"""Elements of a parameter within a flat tensor: its name, the index of the first one in the
flattened parameter, their number, and where they begin in the tensor."""


@dataclass(frozen=True)
class MasterWeights:
    """A tensor that the optimizer is handed, in the order in which it numbers them.

    Attributes:
        tensor: This rank's, float32, with padding under ZeRO.
        pieces: What lies in it.
    """

    tensor: Tensor
    pieces: list[Piece]


def master_weights(engine: DeepSpeedEngine) -> list[MasterWeights]:
    """What the optimizer of this rank updates, at any ZeRO stage and precision."""
    zero = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if isinstance(zero, _SHARDED):
        return [MasterWeights(group.flat, group.pieces(names)) for group in _flat_groups(zero)]
    masters, parameters = _whole_masters(zero)
    return [
        MasterWeights(master, [(names[id(p)], 0, p.numel(), 0)])
        for master, p in zip(masters, parameters, strict=True)
    ]


def _whole_masters(zero: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The whole tensors that an optimizer without shards updates, and the parameter of each."""
    masters = [p for group in zero.param_groups for p in group["params"]]
    if not isinstance(zero, FP16_UnfusedOptimizer):
        return masters, masters
    return masters, [p for group in zero.fp16_groups for p in group]


def accounted_bytes(engine: DeepSpeedEngine) -> dict[str, int]:
    """Bytes of the tensors that this rank keeps between two steps, each storage once.

    Returns:
        ``parameters`` of the model, whole or ZeRO-3's shards, gathered ones left out; ``master``
        weights that are not parameters; ``optimizer``, its states; ``gradients``.
    """
    counted: set[int] = set()

    def size(tensors: Iterable[Tensor | None]) -> int:
        total = 0
        for tensor in tensors:
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    masters = [held.tensor for held in master_weights(engine)]
    states = basic_optimizer(engine).state.values()
    found = {
        "parameters": size(held_weights(engine)),
        "master": size(masters),
        "optimizer": size(
            v for s in states for v in s.values() if isinstance(v, Tensor) and v.numel() > 1
        ),
    }
    kept = [getattr(engine.optimizer, "grad_partitions_flat_buffer", None)]
    gradients = [tensor.grad for tensor in (*engine.module.parameters(), *masters)]
    return {**found, "gradients": size([*kept, *gradients])}


def held_pieces(engine: DeepSpeedEngine) -> list[Piece]:
    """What lies in each of :func:`held_weights`."""
    pieces = []
    for name, p in engine.module.named_parameters():
        first, numel = 0, p.numel()
        if hasattr(p, "ds_tensor"):
            first = p.ds_tensor.ds_numel * dist.get_rank(p.ds_process_group)
            numel = min(p.ds_tensor.ds_numel, max(0, p.ds_numel - first))
        pieces.append((name, first, numel, 0))
    return pieces


@dataclass(frozen=True)
class _FlatGroup:
    """A flat tensor of master weights of this rank, and where parameters lie.

    Attributes:
        parameters: In the order in which they lie.
        flat: Elements ``[start, start + numel)`` of a space.
        offsets: Where each parameter begins in that space.
        sizes: Its elements in that space.
        start: See ``flat``.
        firsts: Index of each parameter's first element in that space; None for 0.
    """

    parameters: Sequence[nn.Parameter]
    flat: Tensor
    offsets: Sequence[int]
    sizes: Sequence[int]
    start: int = 0
    firsts: Sequence[int] | None = None

    def pieces(self, names: dict[int, str]) -> list[Piece]:
        """What lies in ``flat``, by the names of parameters' identities."""
        firsts = self.firsts or [0] * len(self.offsets)
        return [
            (
                names[id(self.parameters[layer])],
                firsts[layer] + left - self.offsets[layer],
                right - left,
                left - self.start,
            )
            for layer, left, right in self._overlaps()
        ]

    def _overlaps(self) -> Iterator[tuple[int, int, int]]:
        """Each parameter that has elements in ``flat``: its place, and their range in the space."""
        end = self.start + self.flat.numel()
        for layer, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            left, right = max(offset, self.start), min(offset + size, end)
            if left < right:
                yield layer, left, right

    def cut(self, first_layer: int) -> Segments:
        """The pieces of ``flat``, whose layers are numbered from ``first_layer``."""
        pieces, position, end = [], self.start, self.start + self.flat.numel()
        for layer, left, right in self._overlaps():
            pieces += [(left - position, PADDING), (right - left, first_layer + layer)]
            position = right
        pieces = [piece for piece in [*pieces, (end - position, PADDING)] if piece[0]]
        return Segments(tuple(size for size, _ in pieces), tuple(layer for _, layer in pieces))


def _flat_groups(zero: Any) -> list[_FlatGroup]:
    """The flat tensors that the sharding optimizer hands out, in its order."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return [
            _slices(parameters, flat)
            for parameters, flat in zip(
                zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True
            )
        ]
    ranks = [dist.get_rank(group) for group in zero.real_dp_process_group]
    if isinstance(zero, BF16_Optimizer):
        flats, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        sizes = [[p.numel() for p in group] for group in groups]
        offsets = [_starts(size) for size in sizes]
    else:
        # Not from ``_hp_mapping``, which is wrong where round_robin_gradients reorders parameters.
        flats, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        sizes = [[shape.numel() for shape in shapes] for shapes in zero.round_robin_bit16_meta]
        offsets = zero.round_robin_bit16_offsets
    return [
        _FlatGroup(groups[i], flat, offsets[i], sizes[i], flat.numel() * ranks[i])
        for i, flat in enumerate(flats)
    ]


def _slices(parameters: Sequence[Any], flat: Tensor) -> _FlatGroup:
    """ZeRO-3's slices of parameters one after another; the last rank's end in unset memory."""
    lengths = [p.partition_numel() for p in parameters]
    begins = [p.partition_numel() * dist.get_rank(p.ds_process_group) for p in parameters]
    sizes = [
        min(length, max(0, p.ds_numel - begin))
        for p, length, begin in zip(parameters, lengths, begins, strict=True)
    ]
    return _FlatGroup(parameters, flat, _starts(lengths), sizes, firsts=begins)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)][:-1]
