"""ZeRO-3's parameters during passes that are not DeepSpeed's own: kept, counted, let go.

With :mod:`dat_ds.engine.hooks` the only reach into DeepSpeed 0.19.8's internals, here without
importing it; pinned by the same tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_RESIDENT = -1  # in the place of a module's id, which DeepSpeed counts from 0
_RELEASE_DECISION = "_PartitionedParameterCoordinator__params_to_release"


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 manages the parameters of ``module``."""
    return any(hasattr(p, "ds_status") for p in module.parameters())


def gathered_bytes(module: nn.Module) -> int:
    """Memory that all parameters take on one device when gathered, in bytes."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())


@contextlib.contextmanager
def resident_parameters(module: nn.Module, optimizer: Any) -> Iterator[None]:
    """Keep ZeRO-3 parameters on the device once gathered, and re-partition them on exit.

    The first forward inside gathers each parameter; later passes find it in place. Parameters that
    count as used by one more module are never released, whether or not DeepSpeed knows the order
    of modules yet. Its releases depend on decisions that it caches per module, once for all passes,
    so those of this block are kept out of its cache: training would follow them otherwise.

    Args:
        module: The bare model.
        optimizer: DeepSpeed's ZeRO-3 optimizer.
    """
    coordinator = optimizer._get_param_coordinator()
    parameters: list[Any] = list(module.parameters())
    held = [p for p in parameters if not p.ds_persist]
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


def release_parameters(module: nn.Module) -> None:
    """Re-partition every gathered ZeRO-3 parameter; the next forward gathers it from the shards."""
    parameters: list[Any] = list(module.parameters())
    for parameter in parameters:
        if hasattr(parameter, "ds_status"):
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
