"""Calls a function in a process of its own, under a time limit: a hang or a crash is an outcome."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.preloaded import SERVER
from tests.settings import without_launcher

ROOT = Path(__file__).parents[1]
Outcome = tuple[str, str]
"""Kind and words."""


def isolated(function: Callable[..., Outcome], *args: Any, seconds: float) -> Outcome:
    """What ``function(*args)`` returns, or how it failed to.

    Args:
        function: Of the top level of a module.
        args: To be pickled.
        seconds: Time limit.

    Returns:
        Its outcome; ``("traceback", ...)`` where it raised, ``("hang", ...)`` with where it was at
        the limit, ``("died", ...)`` where the process ended by itself.
    """
    receiving, sending = SERVER.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = SERVER.Process(target=_call, args=(sending, str(log), seconds, function, args))
        process.start()
        sending.close()
        try:
            if receiving.poll(seconds + 5):
                with contextlib.suppress(EOFError):
                    outcome: Outcome = receiving.recv()
                    return outcome
            process.join(1)
            shown = log.read_text(errors="replace") if log.exists() else ""
            if "Timeout (" in shown or process.is_alive():
                return "hang", _deepest(shown)
            return "died", f"exit code {process.exitcode}: {shown[-300:]}"
        finally:
            receiving.close()
            process.kill()
            process.join()


def _call(
    sending: Connection,
    log: str,
    seconds: float,
    function: Callable[..., Outcome],
    args: tuple[Any, ...],
) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        inherited = without_launcher()
        os.environ.clear()
        os.environ.update(inherited)
        try:
            outcome = function(*args)
        except BaseException as error:
            outcome = "traceback", where(error)
        faulthandler.cancel_dump_traceback_later()
    sending.send(outcome)
    sending.close()
    os._exit(0)  # the libraries' own ways out may wait for threads


def where(error: BaseException) -> str:
    """Class and text of an error, with the last places in this package and in all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "dat_ds" in Path(frame.filename).parts]
    places = dict.fromkeys(
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])
    )
    try:
        words = " ".join(str(error).split())[:200]
    except ValueError:
        words = "(too large to print)"
    return f"{type(error).__name__} at {', '.join(places)}: {words}"


def _deepest(shown: str) -> str:
    shown = shown[shown.rfind(" (most recent call first)") :]  # the main thread's
    lines = [line.strip() for line in shown.splitlines() if line.startswith("  File ")]
    ours = [line for line in lines if f"{os.sep}dat_ds{os.sep}" in line]
    return " <- ".join((lines[:1] + ours[:1]) or ["(no traceback)"])
