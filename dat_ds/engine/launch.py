"""Joining the process group that a launcher prepared."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import cast

import deepspeed
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

from dat_ds.engine import hooks
from dat_ds.errors import ConfigError, FaultError
from dat_ds.processes import adopt_slurm_step, free_port
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_SCHEME = "dat-ds"  # of our rendezvous, for torch
_AFTER_STOP = 20.0  # seconds to wait for the others, once asked to stop
_MARGIN = 60.0  # seconds by which torch waits longer than the heartbeat


def setup_ranks(
    *, waits: float | None = None, stop: Callable[[], str | None] = lambda: None
) -> Ranks:
    """Join the process group that the launcher prepared; without a launcher, be the only rank.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, which the
    ``deepspeed`` launcher and ``torchrun`` export, or what ``srun`` does.

    Args:
        waits: Seconds until a rank that has not joined is missed, and after which a thread of the
            caller's ends this process if a collective has not returned. None: DeepSpeed decides,
            and ends a collective after 10 minutes.
        stop: Says what has asked this process to stop. It still joins, for all to stop together,
            but does not wait long for that.

    Raises:
        FaultError: If a rank has not joined in time, with its number.
        ConfigError: If this machine has no GPU for this rank.
    """
    adopt_slurm_step()
    if not deepspeed.comm.is_initialized():
        _check_places()
    if not dist.is_initialized() and "RANK" not in os.environ:
        _become_single_rank()
    if not deepspeed.comm.is_initialized():
        hooks.skip_shared_memory_op()
        _join(waits, stop)
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


def _check_places() -> None:
    """Refuse a rank without a GPU of its own; say so where ranks outnumber the cores."""
    accelerator = deepspeed.accelerator.get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        count = accelerator.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"LOCAL_RANK={local_rank} is the rank number {local_rank + 1} of this machine, "
                f"which shows {count} GPU(s): start one rank per GPU (deepspeed --num_gpus "
                f"{count}, or torchrun --nproc_per_node {count}), or train on the CPU with "
                "DS_ACCELERATOR=cpu."
            )
        return
    sizes = (int(os.environ.get(name, "1")) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
    ranks, cores = max(sizes), os.cpu_count() or 1
    if ranks > cores and local_rank == 0:
        logger.warning(
            "%d ranks share %d cores, so every step takes longer: start at most %d ranks here.",
            ranks,
            cores,
            cores,
        )


def _join(waits: float | None, stop: Callable[[], str | None]) -> None:
    if not waits or dist.is_initialized() or os.environ["WORLD_SIZE"] == "1":
        deepspeed.init_distributed(verbose=False)
        return
    # Ours speaks first, and with the rank's name.
    patience = timedelta(seconds=waits + _MARGIN)
    if "DEEPSPEED_TIMEOUT" in os.environ:
        patience = default_pg_timeout
    store = _await_ranks(waits, stop)
    try:
        deepspeed.init_distributed(verbose=False, timeout=patience, init_method=f"{_SCHEME}://")
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "connectFullMesh" in str(error):
            raise FaultError(f"The ranks did not connect to each other: {error}") from None
        raise
    del store  # rank 0's serves the process group meanwhile


def _serves_store() -> bool:
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return os.environ["RANK"] == "0" and not is_agents


def _store(timeout: timedelta) -> PrefixStore:
    """The store of this start of the ranks, whom nobody has to await to open it.

    torchrun may keep its store from one start to the next, where torch itself would then find the
    addresses of processes that have died.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        _serves_store(),
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"dat_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _rendezvous(
    _url: str, timeout: timedelta, **_options: object
) -> Iterator[tuple[PrefixStore, int, int]]:
    """What torch asks for the store of a process group."""
    yield _store(timeout), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


register_rendezvous_handler(_SCHEME, _rendezvous)  # type: ignore[no-untyped-call]


def _await_ranks(timeout: float, stop: Callable[[], str | None]) -> PrefixStore:
    """Wait until every rank has called; torch itself would not say which has not."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keys = [f"here/{other}" for other in range(count)]
    began, asked = time.monotonic(), math.inf

    def is_over() -> bool:
        nonlocal asked
        now = time.monotonic()
        asked = asked if stop() is None else min(asked, now)
        time.sleep(0.1)
        return now - began > timeout or now - asked > _AFTER_STOP

    missing = [0]
    try:
        # The waits of the store itself cannot be ended, and warn in a way of their own.
        while not (is_there := _serves_store() or _is_served()) and not is_over():
            pass
        if is_there:
            store = _store(timedelta(seconds=timeout))
            store.set(keys[rank], "")
            while not store.check(keys) and not is_over():
                pass
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
    except dist.DistError:  # rank 0 has stopped, or ended
        missing = [0]
    if not missing:
        return store
    name = f"Rank {', '.join(map(str, missing))} of {count}"
    if asked < math.inf:
        raise FaultError(f"Stopped by {stop()}; {name} has not started. Nothing was changed.")
    raise FaultError(
        f"{name} has not started within {timeout:g} s (dat.fault.timeout): its output says why, or "
        "where it hangs. Nothing was changed."
    )


def _is_served() -> bool:
    """Whether the process that has the store listens already."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=2.0):
        return True
    return False


def _become_single_rank() -> None:
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if int(tasks) > 1:
        raise ConfigError(
            f"OMPI_COMM_WORLD_SIZE={tasks}, but RANK is not set: every task would train by itself. "
            "Start one torchrun per machine, as docs/launching.md shows."
        )
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
