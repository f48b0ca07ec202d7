"""Joining the process group that a launcher prepared."""

from __future__ import annotations

import os
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
    """
    adopt_slurm_step()
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


def _store(timeout: timedelta) -> PrefixStore:
    """The store of this start of the ranks, whom nobody has to await to open it.

    torchrun may keep its store from one start to the next, where torch itself would then find the
    addresses of processes that have died.
    """
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        os.environ["RANK"] == "0" and not is_agents,
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
    try:
        store = _store(timedelta(seconds=timeout))
        store.set(keys[rank], "")
        began, asked = time.monotonic(), None
        while not store.check(keys):  # its own wait warns in a way of its own
            now = time.monotonic()
            if asked is None and stop() is not None:
                asked = now
            if now - began > timeout or (asked is not None and now - asked > _AFTER_STOP):
                break
            time.sleep(0.1)
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        first = str(error).split("\n")[0]
        raise FaultError(f"Rank 0 does not answer at {address}: {first}") from None
    if missing:
        name = f"Rank {', '.join(missing)} of {count}"
        if asked is not None:
            raise FaultError(f"Stopped by {stop()}; {name} has not started. Nothing was changed.")
        raise FaultError(
            f"{name} has not started within {timeout:g} s (dat.fault.timeout): its output says "
            "why, or where it hangs. Nothing was changed."
        )
    return store


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
