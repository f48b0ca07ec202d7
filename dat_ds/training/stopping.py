"""Stopping a run, or saving it, when a signal asks for it or its launcher has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import PurePath

import psutil

from dat_ds.errors import INTERRUPTED

_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
_PROGRAM = 4  # words of a command line that name the program
_GRACE = 2.0  # seconds for the main thread to take an interrupt itself
_LOOK = 2.0  # seconds between two looks at the launcher
_LAUNCHERS = ("deepspeed", "torchrun")
_OF_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # that each sets for its ranks
_INNER = "deepspeed.launcher.launch"
_LAUNCHER_MODULES = (
    "deepspeed.launcher.runner",
    _INNER,
    "torch.distributed.run",
    "torch.distributed.launch",
)


class StopSignal:
    """Remembers what signals asked for, for the training loop to ask between two steps.

    SIGTERM, SIGHUP, SIGUSR1 and SIGINT ask to save and stop, and so does the end of the launcher
    that started this process; a second SIGINT interrupts at once. SIGUSR2 asks to save and go on.

    Attributes:
        reason: What asked this process to stop, in words; None while nothing has. Ranks agree on
            it themselves.
        saves: Whether this process was asked to save.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.saves = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside, instead of dying of them; of the main thread."""
        before = {number: signal.signal(number, self._request_stop) for number in _STOPPING}
        before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._request_save)
        ended = threading.Event()
        watching = threading.Thread(target=self._watch, args=(launchers(), ended), daemon=True)
        watching.start()
        heard, tells = socket.socketpair()
        tells.setblocking(False)
        interrupting = threading.Thread(target=_interrupt, args=(heard,), daemon=True)
        interrupting.start()
        told = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(told)
            tells.close()
            ended.set()
            interrupting.join()
            watching.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request_stop(self, signum: int, _frame: object) -> None:
        name = signal.Signals(signum).name
        if name == "SIGINT" and self.reason == name:
            raise KeyboardInterrupt
        self.reason = self.reason or name

    def _request_save(self, _signum: int, _frame: object) -> None:
        self.saves = True

    def _watch(self, processes: list[psutil.Process], ended: threading.Event) -> None:
        has_ended = not processes and any(name in os.environ for name in _OF_LAUNCHERS)
        if has_ended or (processes and was_orphaned(processes[-1])):
            self.reason = self.reason or "the end of its launcher, before it began"
        while processes and not ended.wait(_LOOK):
            dead = [process for process in processes if not _is_alive(process)]
            if dead:
                self.reason = self.reason or f"the end of its launcher (process {dead[0].pid})"
                return


def _interrupt(heard: socket.socket) -> None:
    """End this process on a second SIGINT while its main thread waits for other ranks.

    Python's own handlers run in the main thread, once it is back from such a wait.
    """
    interrupts = 0
    with heard:
        while interrupts < 2:
            numbers = heard.recv(64)
            if not numbers:
                return
            interrupts += numbers.count(signal.SIGINT)
        heard.settimeout(_GRACE)
        with contextlib.suppress(TimeoutError):
            while heard.recv(64):
                pass
            return  # closed: the main thread took it
    os.write(2, b"\ndat-ds: error: Interrupted. Complete checkpoints are intact.\n")
    os._exit(INTERRUPTED)


def launchers() -> list[psutil.Process]:
    """The launchers among the processes that this one descends from, nearest first."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process().parent()
        while process is not None:
            if _is_launcher(process.cmdline()):
                found.append(process)
            process = process.parent()
    return found


def was_orphaned(launcher: psutil.Process) -> bool:
    """Whether the outermost launcher that is left was started by another one, which has ended.

    ``deepspeed`` starts ``deepspeed.launcher.launch``. Where it has ended since, the latter was
    adopted by a process of another session, and still is in the process group of the former. Those
    that people start themselves may outlive what started them: ``nohup torchrun ... &``.
    """
    with contextlib.suppress(OSError, psutil.Error):
        if _INNER not in launcher.cmdline()[:_PROGRAM]:
            return False
        pid, parent = launcher.pid, launcher.ppid()
        is_adopted = parent == 0 or os.getsid(parent) != os.getsid(pid)
        return is_adopted and os.getpgid(pid) != pid
    return False


def _is_launcher(words: list[str]) -> bool:
    # python /usr/bin/deepspeed ..., or python -u -m deepspeed.launcher.launch ...
    first = words[:_PROGRAM]
    return any(PurePath(w).name in _LAUNCHERS or w in _LAUNCHER_MODULES for w in first)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
