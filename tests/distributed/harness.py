"""Runs a function on several gloo ranks; one start of them serves many cases."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dat_ds.processes import start_ranks
from tests.preloaded import SERVER


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank and return what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        # Minutes: ranks that fall out of step fail instead of hanging.
        start_ranks(
            _save_result,
            ranks,
            function,
            args,
            folder,
            environment={"DEEPSPEED_TIMEOUT": "2"},
            start_method=SERVER.get_start_method(),
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)
        ]


def _save_result(function: Callable[..., Any], args: tuple, folder: str) -> None:
    torch.save(function(*args), Path(folder) / f"{os.environ['RANK']}.pt")


def allow_fp16() -> None:
    """Make DeepSpeed accept float16 on this rank's CPU, which runs it slowly but correctly."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.float16]
