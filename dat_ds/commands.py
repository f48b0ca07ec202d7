"""Carrying out a command: its log goes to stdout, and what the user can mend is a message."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from dat_ds.errors import NumericsError, UserError

logger = logging.getLogger("dat_ds")


def carry_out(command: Callable[[], int]) -> int:
    """Carry out a command of ``dat-ds``, or what a recipe does.

    Args:
        command: Returns an exit code.

    Returns:
        The exit code: 0 done or stopped cleanly, 1 training failed, 2 the user can mend it.
    """
    _log_to_stdout()
    try:
        return command()
    except UserError as error:
        return _fail(str(error), 2)
    except NumericsError as error:
        return _fail(str(error), 1)


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
