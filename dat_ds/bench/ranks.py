"""Gloo processes on this machine, for benchmarks that need several ranks."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from dat_ds.bench.hosts import free_port

_RESULT = "result.json"


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """Call ``function(*arguments)`` in each of several processes, of one thread each.

    Args:
        function: Of a module; joins the process group by :func:`dat_ds.initialize`, or otherwise.
        ranks: Number of processes.
        arguments: What can be pickled.

    Returns:
        What rank 0's call returned, through JSON.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (function, ranks, port, folder, arguments), nprocs=ranks)  # type: ignore[no-untyped-call]
        return json.loads((Path(folder) / _RESULT).read_text(encoding="utf-8"))


def _run(
    rank: int,
    function: Callable[..., Any],
    ranks: int,
    port: int,
    folder: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    from dat_ds.cli.main import end_process

    result = function(*arguments)
    if rank == 0:
        (Path(folder) / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    end_process(0)
