"""Runs a function on several gloo ranks; one spawn (9 s) serves many cases."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from dat_ds.cli.main import end_process


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank and return what each returned, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, args=(function, ranks, port, folder, args), nprocs=ranks, join=True)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)
        ]


def _run_rank(
    rank: int, function: Callable[..., Any], ranks: int, port: int, folder: str, args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        DEEPSPEED_TIMEOUT="2",  # minutes: ranks that fall out of step fail instead of hanging
    )
    torch.set_num_threads(1)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    end_process(0)


def allow_fp16() -> None:
    """Make DeepSpeed accept float16 on this rank's CPU, which runs it slowly but correctly."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.float16]
