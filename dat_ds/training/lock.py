"""One run in one folder: a lock that its process holds, and that goes with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dat_ds.errors import CheckpointError

logger = logging.getLogger("dat_ds")

LOCK = ".lock"
_BEAT, _DEAD = 10.0, 60.0  # seconds between two signs of life, and without one


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, so that no second run writes into it.

    The kernel releases the lock of a process that has ended, however it did. On file systems that
    lock within one host only, the signs of life of another host's run count, too.

    Args:
        folder: Of the run; it is there.

    Raises:
        CheckpointError: If another run is in it, with its host and process.
    """
    file = folder / LOCK
    descriptor = _taken(file)
    if descriptor is None:
        yield
        return
    _write_holder(descriptor)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        file.unlink(missing_ok=True)  # while it is held: nobody takes a file without a name
        os.close(descriptor)


def _taken(file: Path) -> int | None:
    """Descriptor of the locked file; None where the file system has no locks."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"Cannot make {file}: {error.strerror}.") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(descriptor, file):
                _refuse_other_host(descriptor, file)
                return descriptor
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise _in_use(file, holder) from None
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning(
                "%s: this file system has no locks, so a second run in this folder would not be "
                "noticed.",
                file,
            )
            return None
        except CheckpointError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has removed it meanwhile


def _is_same(descriptor: int, file: Path) -> bool:
    """Whether the name still belongs to the locked file."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _refuse_other_host(descriptor: int, file: Path) -> None:
    holder = _holder(descriptor)
    host = holder.get("host")
    if host in (None, socket.gethostname()):
        if holder:
            logger.info("Taking over from process %s, which has ended.", holder.get("pid"))
        return
    last = os.fstat(descriptor).st_mtime
    os.utime(file)  # now, by the clock of the file system
    silent = os.fstat(descriptor).st_mtime - last
    os.utime(file, (last, last))
    if silent < _DEAD:
        raise _in_use(file, holder)
    logger.warning(
        "Taking over from process %s on %s, without a sign of life for %d s.",
        holder.get("pid"),
        host,
        silent,
    )


def _in_use(file: Path, holder: dict[str, object]) -> CheckpointError:
    return CheckpointError(
        f"{file.parent} is in use by process {holder.get('pid', 'unknown')} on host "
        f"{holder.get('host', 'unknown')}: wait until it ends, end it, or choose another folder "
        f"(--set dat.output_dir=...). A dead run on another host counts as ended after {_DEAD:.0f} "
        "s."
    )


def _holder(descriptor: int) -> dict[str, object]:
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write_holder(descriptor: int) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its words
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _beat(descriptor: int, ended: threading.Event) -> None:
    """Sign of life: the time of the file."""
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)
