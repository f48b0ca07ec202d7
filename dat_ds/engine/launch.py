"""Joining the process group that a launcher prepared."""

from __future__ import annotations

import os
from typing import cast

import deepspeed
import torch.distributed as dist

from dat_ds.engine import hooks
from dat_ds.errors import ConfigError
from dat_ds.processes import free_port
from dat_ds.ranks import Ranks


def setup_ranks() -> Ranks:
    """Join the process group that the launcher prepared; without a launcher, be the only rank.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, which the
    ``deepspeed`` launcher, ``torchrun`` and SLURM set-ups export.
    """
    if not dist.is_initialized() and "RANK" not in os.environ:
        _become_single_rank()
    if not deepspeed.comm.is_initialized():
        hooks.skip_shared_memory_op()
        deepspeed.init_distributed(verbose=False)
    hooks.use_current_collectives()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    deepspeed.accelerator.get_accelerator().set_device(local_rank)
    cpu_group = None
    if dist.get_world_size() > 1 and dist.get_backend() != "gloo":
        cpu_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
    return Ranks(
        rank=dist.get_rank(),
        count=dist.get_world_size(),
        device=hooks.accelerator_device(),
        cpu_group=cpu_group,
    )


def _become_single_rank() -> None:
    for key in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        started_here = key != "SLURM_NTASKS" or "SLURM_STEP_ID" in os.environ  # by srun
        if int(os.environ.get(key, "1")) > 1 and started_here:
            raise ConfigError(
                f"{key}={os.environ[key]}, but RANK is not set: every task would train by itself. "
                "Start one torchrun per machine under srun, as docs/launching.md shows."
            )
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
