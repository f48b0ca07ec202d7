"""Carrying out a command: its log goes to stdout, and what the user can mend is a message."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

from dat_ds.errors import (
    FAULT,
    INTERRUPTED,
    FaultError,
    NumericsError,
    UserError,
    is_out_of_memory,
)
from dat_ds.processes import adopt_slurm_step, end_process

logger = logging.getLogger("dat_ds")

_SETTLED = (
    # torch 2.14 has new names for these functions; DeepSpeed 0.19 and accelerate 1.15 use the old.
    (
        FutureWarning,
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        r"torch\.distributed\.c10d_logger",
    ),
)
"""Warnings of other libraries about one another, which no user can mend: category, beginning of the
message, module. The only place that hides any; others are shown."""


def carry_out(command: Callable[[], int]) -> int:
    """Carry out a command of ``dat-ds``, or what a recipe does.

    Args:
        command: Returns an exit code.

    Returns:
        The exit code: 0 done or stopped cleanly, 1 training failed, 2 a mistake that the user can
        correct, 75 a rank hung or died, 130 interrupted.
    """
    _log_to_stdout()
    try:
        with without_settled_warnings():
            return command()
    except UserError as error:
        return _fail(str(error), 2)
    except NumericsError as error:
        return _fail(str(error), 1)
    except FaultError as error:
        return _fail(str(error), FAULT)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return _fail(
            f"Out of memory: {reason}. Write a smaller train_micro_batch_size_per_gpu, or look for "
            "a size in the config that was not meant. Complete checkpoints are intact.",
            1,
        )
    except KeyboardInterrupt:
        return _fail("Interrupted. Complete checkpoints are intact.", INTERRUPTED)


def run_recipe(command: Callable[[], int]) -> NoReturn:
    """Carry out what a recipe does, as :func:`carry_out`, on any ranks, and end the process.

    Args:
        command: Returns an exit code.
    """
    adopt_slurm_step()
    end_process(carry_out(command))


@contextlib.contextmanager
def without_settled_warnings() -> Iterator[None]:
    """Inside, what libraries warn about one another is not shown; for our commands and recipes."""
    with warnings.catch_warnings():
        for category, message, module in _SETTLED:
            warnings.filterwarnings("ignore", message, category, module)
        yield


def _log_to_stdout() -> None:
    # Models and data log wherever they are built, which is on every rank.
    is_main = os.environ.get("RANK", "0") == "0"
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"dat-ds: error: {message}\n")
    sys.stderr.flush()
    return code
