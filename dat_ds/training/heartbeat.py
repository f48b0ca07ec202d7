"""A thread beside the training loop that ends the run where a rank hangs or has died.

Every rank publishes signs of life and looks at those of others. A rank that is stopped or dead is
silent; one whose main thread hangs is not, but makes no progress, and in the end nobody does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn, cast

import psutil
import torch.distributed as dist

from dat_ds.checkpoints import CHECKPOINTS, CheckpointFolder
from dat_ds.errors import FAULT, FaultError, NumericsError, UserError
from dat_ds.processes import end_process
from dat_ds.progress import PROGRESS
from dat_ds.ranks import Ranks
from dat_ds.training.beats import Beat, Beats, Fault, Rank
from dat_ds.training.twin import TWIN_FOLDER

logger = logging.getLogger("dat_ds")

_NEIGHBOURS = 8  # ranks that each rank watches: a constant, so that files stay few
_PATIENCE = 10.0  # seconds in which someone finds out which rank's connection broke
_GLANCE = 2.0  # seconds between two looks at whether a fault has been found
_IN_A_HURRY = 0.2
_GRACE = 5.0  # seconds for what should take no time
_UNSEEN = 60.0  # seconds after which a file on another host ought to be seen here
_OF_STEPS = ("data", "step", "attack", "update")  # phases that end within a step
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/", "/dat_ds/ranks.py")
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


class Heartbeat:
    """Signs of life of this rank, and a look at those of others.

    Only time in which this process ran itself counts against others, so that a job may be
    suspended as a whole.

    Args:
        beats: Folder of the signs of life.
        processes: Of all ranks, in order.
        rank: This one.
        timeout: Seconds without a sign of life, or without progress of any rank, above 0.
    """

    def __init__(self, beats: Beats, processes: Sequence[Rank], rank: int, timeout: float) -> None:
        self._beats, self._processes, self._rank, self._timeout = beats, processes, rank, timeout
        self._period = min(max(timeout / 20, 0.2), 5.0)
        others = [(rank + i) % len(processes) for i in range(1, len(processes))]
        self._watched = others[:_NEIGHBOURS]
        self._silent = dict.fromkeys(self._watched, 0.0)
        self._last: dict[int, Beat] = {}
        self._all_began = False
        self._count, self._idle = 0, 0.0
        self._seen: object = None
        self._looked_at = time.monotonic()
        self._ended, self._wake = threading.Event(), threading.Event()
        self._hurries = False
        self._main = threading.main_thread().ident

    @contextlib.contextmanager
    def beating(self, ranks: Ranks) -> Iterator[None]:
        """Watch over what happens inside; a collective.

        Raises:
            FaultError: Where the connection to another rank is lost.
        """
        thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        failed = ""
        with contextlib.suppress(OSError):  # the others will say that they do not see it
            self._write()
        thread.start()
        try:
            ranks.barrier()
            self._all_began = True
            yield
        except (UserError, NumericsError, KeyboardInterrupt):
            raise
        except BaseException as error:
            if len(self._processes) > 1 and _is_lost_connection(error):
                self._await_finder()
                raise FaultError(self._lost(error)) from None
            failed = type(error).__name__
            raise
        finally:
            self._ended.set()
            self._wake.set()
            thread.join(_PATIENCE)  # a file system may hang
            if failed:
                with contextlib.suppress(OSError):
                    self._write(failed)
            else:
                self._beats.remove(self._rank)

    # ---- the thread

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(_IN_A_HURRY if self._hurries else min(self._period, _GLANCE))
            self._wake.clear()
            if self._ended.is_set():
                return
            with contextlib.suppress(OSError):  # what cannot be read is not a sign of anything
                fault = self._beats.fault()
                if fault is not None:
                    self._end(fault, says=False)
                if self._hurries or time.monotonic() - self._looked_at >= self._period:
                    self._look()

    def _look(self) -> None:
        now = time.monotonic()
        # What is longer is no time in which this process ran.
        passed = min(now - self._looked_at, self._timeout / 4)
        self._looked_at = now
        if self._beats.is_superseded():
            words = f"{self._me()} ends: the run has been started again without it."
            self._end(Fault(words, FAULT))
        self._idle = 0.0 if self._progressed() else self._idle + passed
        with contextlib.suppress(OSError):
            self._write()
        fault = self._fault_of_others(passed) or self._standstill()
        if fault is not None:
            says = True
            with contextlib.suppress(OSError):
                says = self._beats.publish(fault)
            self._end(fault, says=says)

    def _progressed(self) -> bool:
        seen: object = PROGRESS.count
        if PROGRESS.phase not in _OF_STEPS:
            # These may take longer than any timeout: a main thread that moves makes progress.
            seen = (PROGRESS.count, *((id(f.f_code), f.f_lasti) for f in self._frames()))
        before, self._seen = self._seen, seen
        return before != seen

    def _frames(self) -> Iterator[FrameType]:
        """Of the main thread, innermost first."""
        frame = sys._current_frames().get(cast(int, self._main))
        while frame is not None:
            yield frame
            frame = frame.f_back

    def _write(self, failed: str = "") -> None:
        self._count += 1
        frame = next(self._frames(), None)
        file = "" if frame is None else frame.f_code.co_filename
        where = "" if frame is None else f"{file[-150:]}:{frame.f_lineno}"
        waits = any(part in file for part in _COLLECTIVES)
        beat = Beat(self._count, PROGRESS.step, PROGRESS.phase, self._idle, waits, where, failed)
        self._beats.write(self._rank, beat)

    # ---- what is found

    def _fault_of_others(self, passed: float) -> Fault | None:
        for rank in list(self._watched):
            if not self._listens_to(rank, passed):
                continue
            process, beat = self._processes[rank], self._last.get(rank)
            if process.is_here and not process.is_running():
                if not self._listens_to(rank, 0.0):  # it may have taken leave since
                    continue
                return self._death(rank)
            failed = beat is not None and beat.failed != ""
            if failed and self._silent[rank] >= _PATIENCE and not process.is_here:
                return self._death(rank)
            if self._silent[rank] >= self._timeout:
                return self._silence(rank)
        return None

    def _listens_to(self, rank: int, passed: float) -> bool:
        """Take in the sign of life of another rank; False where it is not to be judged."""
        try:
            beat = self._beats.read(rank)
        except FileNotFoundError:
            if rank in self._last:
                self._forget(rank)  # it has taken leave
                return False
            beat = None
        if beat is not None and beat != self._last.get(rank):
            self._last[rank], self._silent[rank] = beat, 0.0
            return True
        self._silent[rank] += passed
        if rank in self._last or not self._all_began:
            return True
        if self._silent[rank] > _UNSEEN:
            logger.warning(
                "%s cannot be watched from %s: it does not see its file in %s, which is not on a "
                "file system that both share.",
                self._processes[rank],
                self._me(),
                self._beats.folder,
            )
            self._forget(rank)
        return False

    def _forget(self, rank: int) -> None:
        self._watched.remove(rank)

    def _death(self, rank: int) -> Fault:
        process, beat = self._processes[rank], self._last.get(rank)
        if beat is not None and beat.failed:
            words = f"{process} ended with {beat.failed} in {beat}; its output says more."
            return Fault(f"{words} {self._advice(1)}", 1)
        words = f"{process} is dead: killed by a signal, or for want of memory."
        if beat is not None:
            words = f"{words} Its last sign of life was in {beat}."
        return Fault(f"{words} {self._advice()}", FAULT)

    def _silence(self, rank: int) -> Fault:
        process, beat = self._processes[rank], self._last.get(rank)
        last = "" if beat is None else f"; the last was in {beat}"
        words = (
            f"{process} has given no sign of life for {self._timeout:g} s (dat.fault.timeout)"
            f"{last}; rank {self._rank} is in step {PROGRESS.step}, phase {PROGRESS.phase}. "
            f"{self._advice()}"
        )
        return Fault(words, FAULT, (process,))

    def _standstill(self) -> Fault | None:
        """The fault where no rank has made progress for too long."""
        if self._idle < self._timeout or not self._all_began:
            return None
        beats: dict[int, Beat] = {}
        for rank in range(len(self._processes)):
            with contextlib.suppress(FileNotFoundError):
                beat = self._beats.read(rank)
                if beat is None or beat.idle < self._timeout:
                    return None
                beats[rank] = beat
        named = culprits(beats)
        listed = "; ".join(
            f"{self._processes[rank]} in {beats[rank]}, at {beats[rank].where}"
            for rank in list(named or beats)[:_NEIGHBOURS]
        )
        what = "the others wait for this" if named else "all wait"
        words = f"No progress for {self._timeout:g} s (dat.fault.timeout), {what}: {listed}."
        return Fault(
            f"{words} {self._advice()}", FAULT, tuple(self._processes[rank] for rank in named)
        )

    def _advice(self, code: int = FAULT) -> str:
        """What happens to this run, and how to go on with it."""
        output, latest = self._beats.folder.parent, None
        for folder in (output, output / TWIN_FOLDER):
            with contextlib.suppress(UserError, OSError):
                latest = CheckpointFolder(folder / CHECKPOINTS).latest() or latest
        goes_on = "starts anew" if latest is None else f"goes on from {latest}"
        return f"All ranks end with exit code {code}; --resume auto {goes_on}."

    def _me(self) -> str:
        return str(self._processes[self._rank])

    # ---- a connection that broke

    def _await_finder(self) -> None:
        """Give the threads time to find out who has died: then this process ends meanwhile."""
        self._hurries = True
        self._wake.set()
        time.sleep(_PATIENCE)

    def _lost(self, error: BaseException) -> str:
        text = str(error).strip().split("\n")[0]
        silent = [r for r in self._watched if self._silent[r] > 1.5 * self._period]
        named = ", ".join(str(self._processes[rank]) for rank in silent) or "another rank"
        words = (
            f"{self._me()} has lost the connection to {named} in step {PROGRESS.step}, phase "
            f"{PROGRESS.phase} ({text}); the other's output says more. {self._advice()}"
        )
        with contextlib.suppress(OSError):
            self._beats.publish(Fault(words, FAULT))
        return words

    # ---- the end

    def _end(self, fault: Fault, *, says: bool = True) -> NoReturn:
        """End this process from beside its main thread, which may never come back."""
        if says:
            _in_time(lambda: sys.stderr.write(f"\ndat-ds: error: {fault.message}\n"))
        own = self._processes[self._rank]
        for culprit in fault.culprits:
            if culprit != own and culprit.is_here:
                _end_other(culprit)
        _kill(psutil.Process().children(recursive=True))
        _in_time(lambda: end_process(fault.code))
        os._exit(fault.code)


def culprits(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that the others wait for, where none makes progress; empty if all look alike.

    Those are the ranks that are not in a collective; else those behind in steps; else those in
    another phase than most.
    """
    phases = [beat.phase for beat in beats.values()]
    common = max(phases, key=phases.count)
    first = min(beat.step for beat in beats.values())
    for found in (
        [rank for rank, beat in beats.items() if not beat.waits],
        [rank for rank, beat in beats.items() if beat.step == first],
        [rank for rank, beat in beats.items() if beat.phase != common],
    ):
        if 0 < len(found) < max(len(beats), 2):
            return found
    return []


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def _end_other(culprit: Rank) -> None:
    """Let another process of this machine end itself, or else kill it and what it has started."""
    with contextlib.suppress(OSError, psutil.Error):
        process = psutil.Process(culprit.pid)
        if not culprit.is_running():
            return
        # Its own thread knows the fault as soon as it runs, and gives the right exit code.
        process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + _GRACE
        while culprit.is_running():
            if time.monotonic() > deadline:
                _kill([*process.children(recursive=True), process])
                return
            time.sleep(0.05)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _in_time(action: Callable[[], object]) -> None:
    """Do what may wait for ever, such as writing to a pipe that nobody reads, but not for long."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_GRACE)
