"""Ranks of ``dat-ds train`` that start in a second, and one of which stops, hangs or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from dat_ds.processes import free_port, rank_environment

_VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Event:
    """What happens to a rank, when it enters a phase for the so-manieth time.

    Attributes:
        rank: The rank.
        phase: Of :class:`dat_ds.progress.Progress`, or ``"join"``: before it joins the others.
        nth: From 1.
        delay: Seconds after it.
        what: ``"stop"``, ``"hang"`` in Python, or ``"die"``.
    """

    rank: int
    phase: str
    nth: int = 1
    delay: float = 0.0
    what: str = "stop"


def start(words: Sequence[str], ranks: int, logs: Path, event: Event | None) -> list[BaseProcess]:
    """Start ``dat-ds`` with ``words`` as so many ranks, which write into ``logs/RANK.log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.fault_ranks", "dat_ds.training.run"])
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    with _environment(_VARIABLES):
        for rank in range(ranks):
            environment = rank_environment(rank, ranks, port, local=ranks)
            arguments = (environment, list(words), logs / f"{rank}.log", event)
            processes.append(context.Process(target=_run, args=arguments, daemon=True))
            processes[-1].start()
    return list(processes)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(environment: Mapping[str, str], words: list[str], log: Path, event: Event | None) -> None:
    import torch

    from dat_ds.cli.main import main
    from dat_ds.processes import end_process

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if event is not None and environment["RANK"] == str(event.rank):
        if event.phase == "join":
            _let_happen(event.what)
        else:
            _plant(event)
    end_process(main(words))


def _plant(event: Event) -> None:
    from dat_ds.progress import Progress

    enter, entered = Progress.enter, [0]

    def watched(self: Progress, phase: str, step: int | None = None) -> None:
        enter(self, phase, step)  # type: ignore[arg-type]
        entered[0] += phase == event.phase
        if phase == event.phase and entered[0] == event.nth:
            if event.delay:
                threading.Timer(event.delay, _let_happen, (event.what,)).start()
            else:
                _let_happen(event.what)

    Progress.enter = watched  # type: ignore[method-assign, assignment]


def _let_happen(what: str) -> None:
    if what == "hang":
        while True:
            time.sleep(60)
    os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
