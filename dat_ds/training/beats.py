"""Signs of life of the ranks, as files in the folder of a run.

``RUN/.ranks/``::

    session       changes with every start of the run
    3.json        what rank 3 said last; removed when it ends
    fault.json    why the ranks end, if they do: written by the one that found it

Files, and not the store of the process group: that of the launchers lives in rank 0, which may be
the one that stands still, and checkpoints need a folder that all ranks share anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

RANKS = ".ranks"
_SESSION, _FAULT = "session", "fault.json"
_SIZE = 1024  # bytes of a sign of life: always the same, so that a full disk does not matter


@dataclass(frozen=True)
class Rank:
    """A rank's process.

    Attributes:
        rank: Number in the process group.
        host: Name of its machine.
        place: Machine and process namespace in which ``pid`` is valid.
        pid: Process id.
        started: When the process started, in a unit of the operating system's; with ``pid`` it
            names one process for ever.
    """

    rank: int
    host: str
    place: str
    pid: int
    started: float

    @classmethod
    def of_this_process(cls, rank: int) -> Rank:
        """The present process as ``rank``."""
        return cls(rank, socket.gethostname(), _place(), os.getpid(), _started(os.getpid()) or 0.0)

    @property
    def is_here(self) -> bool:
        """Whether this process can look at it, and signal it."""
        return self.place == _place()

    def is_running(self) -> bool:
        """Whether the process is there; only where :attr:`is_here`."""
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"Rank {self.rank} (host {self.host}, process {self.pid})"


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        count: Grows with every sign of life.
        step: Optimizer steps done.
        phase: What it is doing.
        idle: Seconds without progress.
        waits: Whether its main thread is inside a collective.
        where: Innermost line of its main thread.
        failed: Class of the exception that ended it; empty for none.
    """

    count: int
    step: int
    phase: str
    idle: float = 0.0
    waits: bool = False
    where: str = ""
    failed: str = ""

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


@dataclass(frozen=True)
class Fault:
    """Why the ranks end.

    Attributes:
        message: For the user.
        code: Exit code of every rank.
        culprits: Processes that are not to be left behind.
    """

    message: str
    code: int
    culprits: tuple[Rank, ...] = ()


class Beats:
    """The folder of the signs of life.

    Args:
        output: Folder of the run.
        session: Of this start of the run.
    """

    def __init__(self, output: Path, session: str) -> None:
        self.folder = output / RANKS
        self.session = session

    def begin(self) -> None:
        """Make the folder and remove what earlier starts have left; of rank 0."""
        self.folder.mkdir(exist_ok=True)
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)
        (self.folder / _SESSION).write_text(self.session, encoding="utf-8")

    def is_superseded(self) -> bool:
        """Whether the run has been started again since."""
        try:
            return (self.folder / _SESSION).read_text(encoding="utf-8") not in ("", self.session)
        except OSError:
            return False

    def write(self, rank: int, beat: Beat) -> None:
        """Publish a rank's sign of life.

        Raises:
            OSError: If it cannot be written.
        """
        text = json.dumps({**dataclasses.asdict(beat), "session": self.session}).encode()
        # In place and of one size, so that no room is needed; closed, so that other hosts see it.
        descriptor = os.open(self._file(rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, text.ljust(_SIZE), 0)
        finally:
            os.close(descriptor)

    def read(self, rank: int) -> Beat | None:
        """A rank's last sign of life; None if it is just being written.

        Raises:
            OSError: If there is none (``FileNotFoundError``), or it cannot be read.
        """
        values = _read(self._file(rank))
        if values is None or values.pop("session", None) != self.session:
            return None
        with contextlib.suppress(TypeError):
            return Beat(**values)
        return None

    def remove(self, rank: int) -> None:
        """Take back a rank's sign of life, because it ends; the last one removes the folder."""
        with contextlib.suppress(OSError):
            self._file(rank).unlink(missing_ok=True)
            if {file.name for file in self.folder.iterdir()} <= {_SESSION}:
                (self.folder / _SESSION).unlink(missing_ok=True)
                self.folder.rmdir()

    def publish(self, fault: Fault) -> bool:
        """Tell all ranks why they end; False where another rank has done so already.

        Raises:
            OSError: If it cannot be written.
        """
        values = {**dataclasses.asdict(fault), "session": self.session}
        try:
            with (self.folder / _FAULT).open("x", encoding="utf-8") as file:
                file.write(json.dumps(values))
        except FileExistsError:
            return False
        return True

    def fault(self) -> Fault | None:
        """Why the ranks are to end; None while they are not."""
        try:
            values = _read(self.folder / _FAULT)
        except FileNotFoundError:
            return None
        if values is None or values.pop("session", None) != self.session:
            return None
        culprits = tuple(Rank(**rank) for rank in values["culprits"])
        return Fault(values["message"], values["code"], culprits)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_bytes())
    except ValueError:  # half written
        return None
    return values if isinstance(values, dict) else None


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """When a process started; None where there is none, or only what is left of one."""
    try:
        # Clock ticks since boot, which setting the clock does not move, as it does psutil's time.
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if words[0] in "ZX" else float(words[19])
    except OSError:
        pass
    try:
        process = psutil.Process(pid)
        gone = process.status() == psutil.STATUS_ZOMBIE
        return None if gone else float(process.create_time())
    except psutil.Error:
        return None
