"""Processes: starting ranks on this machine, and ending one."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """Call ``function(*arguments)`` in each of several processes, as :func:`start_ranks` does.

    Returns:
        What rank 0's call returned, through JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        start_ranks(_write_result, ranks, function, arguments, file)
        return json.loads(file.read_text(encoding="utf-8"))


def _write_result(function: Callable[..., Any], arguments: Sequence[Any], file: Path) -> None:
    result = function(*arguments)
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(result), encoding="utf-8")


def start_ranks(
    function: Callable[..., object],
    ranks: int,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    start_method: Literal["spawn", "forkserver"] = "spawn",
) -> None:
    """Run ``function(*arguments)`` as so many gloo ranks of one thread each; wait for all.

    Args:
        function: Of a module; joins the process group by :func:`dat_ds.initialize`, or otherwise.
        ranks: Number of processes.
        arguments: Picklable arguments.
        environment: Further variables of every rank.
        start_method: Of :mod:`multiprocessing`: ``"forkserver"`` where what the ranks import was
            preloaded.
    """
    from torch.multiprocessing.spawn import start_processes  # here: ending one needs no torch

    port = free_port()
    # A server hands on the variables that it was started with, and not those of now.
    now = {} if start_method == "spawn" else dict(os.environ)
    variables = [
        {**now, **rank_environment(rank, ranks, port, local=ranks), **(environment or {})}
        for rank in range(ranks)
    ]
    start_processes(  # type: ignore[no-untyped-call]
        _run_rank, (variables, function, arguments), nprocs=ranks, start_method=start_method
    )


def _run_rank(
    rank: int,
    environment: Sequence[Mapping[str, str]],
    function: Callable[..., object],
    arguments: Sequence[Any],
) -> None:
    import torch

    os.environ.update(environment[rank])
    torch.set_num_threads(1)
    function(*arguments)
    end_process(0)


def rank_environment(
    rank: int, ranks: int, port: int, *, address: str = "127.0.0.1", local: int = 1
) -> dict[str, str]:
    """Variables by which a process on a CPU joins the process group, as launchers export them.

    Args:
        rank: The process.
        ranks: Number of processes.
        port: Of the machine of rank 0.
        address: That machine.
        local: Processes that share this machine.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_SIZE": str(local),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }


def adopt_slurm_step() -> None:
    """Take from ``srun`` what a launcher would have set, where there was none."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    # Without a step, the process is the batch script's own and not one of the tasks.
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ or int(tasks) == 1:
        return
    step, job = os.environ["SLURM_STEP_ID"], os.environ.get("SLURM_JOB_ID", "0")
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    local = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "1"))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    has_own_device = shown != "" and "," not in shown  # --gpus-per-task=1
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK="0" if has_own_device else os.environ["SLURM_LOCALID"],
        LOCAL_SIZE=re.split(r"\D", local)[0],
    )
    os.environ.setdefault("MASTER_ADDR", _first_node(nodes))
    os.environ.setdefault("MASTER_PORT", str(20000 + (7 * int(job) + int(step)) % 10000))


def _first_node(nodes: str) -> str:
    """``gpu07`` of ``gpu[07-09,12],cpu1``, as SLURM writes lists of nodes."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def end_process(code: int) -> NoReturn:
    """Write out what is buffered and end, without taking Python down.

    Threads of torch's CPU collectives may still ask for Python while it is taken down, which now
    and then aborts a process whose work is done, also after its process group was destroyed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
