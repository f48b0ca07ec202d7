"""Every reach into DeepSpeed's internals, each pinned by a test in ``tests/distributed``.

Written against deepspeed 0.19.8; ``pyproject.toml`` allows ``>=0.19.8,<0.20``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import deepspeed.comm.comm
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from dat_ds.errors import NumericsError


def skip_shared_memory_op() -> None:
    """Keep ``init_distributed`` from compiling a CPU collective that training never calls.

    The op (90 s to build) only serves ``inference_all_reduce``.
    """
    # ``import deepspeed.comm.torch as m`` would bind torch itself, which that module re-exports.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def supports_fp16() -> bool:
    """Whether DeepSpeed accepts ``fp16`` on this device."""
    return bool(get_accelerator().is_fp16_supported())


@contextlib.contextmanager
def named_loss_scale_error() -> Iterator[None]:
    """Give DeepSpeed's bare exception at the smallest float16 loss scale a name.

    Raises:
        NumericsError: When the scale cannot shrink any further.
    """
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise NumericsError(
            "float16 gradients overflow even at the smallest loss scale (fp16.min_loss_scale); "
            "training stopped. Write bf16 or torch_autocast instead of fp16, or a smaller lr."
        ) from None


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages this parameter and holds only this rank's shard right now."""
    return hasattr(parameter, "ds_status") and parameter.ds_status.name == "NOT_AVAILABLE"


def loss_scale(engine: DeepSpeedEngine) -> float:
    """The factor that DeepSpeed puts on a float16 loss right now; 1 in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def reduce_in_backward(engine: DeepSpeedEngine, enabled: bool) -> None:
    """Whether ``backward`` averages gradients over ranks, at ZeRO-0.

    Where it does not, DeepSpeed's check for overflow in 16 bits asks all ranks by itself.
    """
    engine.enable_backward_allreduce = enabled


@torch.no_grad()
def copy_master_weights(engine: DeepSpeedEngine) -> None:
    """Make the model's 16-bit parameters those of the float32 ones that a ZeRO-0 step updates."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_(halves, masters)


def gradient_scale(engine: DeepSpeedEngine) -> float:
    """The factor on all gradients right now, under ``fp16`` or float16 autocast; else 1."""
    scaler = engine.torch_autocast_z0_gradscaler or getattr(
        engine.optimizer, "torch_autocast_gradscaler", None
    )
    return loss_scale(engine) if scaler is None else float(scaler.get_scale())


AVERAGE_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


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
        scatter: Stage 3: likewise a name and the gradients of some parameters, to this rank's
            share of the mean of each, ``ceil(numel / ranks)`` entries.
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
        engine.allreduce_bucket = allreduce_bucket
    elif stage < 3:
        optimizer.gradient_reduction_w_predivide = reduce_in_place
    else:
        order = {id(p): i for i, p in enumerate(engine.module.parameters())}
        setattr(optimizer, AVERAGE_SCATTER, average_scatter)


_RESIDENT = -1  # in the place of a module's id, which DeepSpeed counts from 0
_RELEASE_DECISION = "_PartitionedParameterCoordinator__params_to_release"


@contextlib.contextmanager
def resident_parameters(engine: DeepSpeedEngine) -> Iterator[None]:
    """Keep ZeRO-3 parameters on the device once gathered, and re-partition them on exit.

    The first forward inside gathers each parameter; later passes find it in place. Parameters that
    count as used by one more module are never released, whether or not DeepSpeed knows the order
    of modules yet. Its releases depend on decisions that it caches per module, once for all passes,
    so those of this block are kept out of its cache: training would follow them otherwise.
    """
    coordinator = engine.optimizer._get_param_coordinator()
    held = [p for p in engine.module.parameters() if not p.ds_persist]
    for parameter in held:
        parameter.ds_active_sub_modules.add(_RESIDENT)
    setattr(coordinator, _RELEASE_DECISION, lambda module, step: set())
    try:
        yield
    finally:
        delattr(coordinator, _RELEASE_DECISION)  # uncovers the class's own
        for parameter in held:
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()


def release_parameters(engine: DeepSpeedEngine) -> None:
    """Re-partition every gathered ZeRO-3 parameter; the next forward gathers it from the shards."""
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_status"):
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()


def held_weights(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that hold this rank's weights: whole parameters, or ZeRO-3 shards.

    Who writes to shards has to call :func:`release_parameters`: gathered copies of them exist.
    """
    return [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]


def gathered_numel(engine: DeepSpeedEngine) -> int:
    """Number of parameters of the whole model, wherever they are."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


def gathered_bytes(engine: DeepSpeedEngine) -> int:
    """Memory that all parameters take on one device when gathered, in bytes."""
    return sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.module.parameters()
    )


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
