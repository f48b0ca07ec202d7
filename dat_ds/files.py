"""Writing files such that nothing earlier is lost and a failure is one clear message."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dat_ds.errors import CheckpointError, ConfigError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, and never wait for one that is something else.

    Opening a FIFO waits for a writer, and reading a device may never end.

    Raises:
        OSError: Also where the path is a FIFO, a socket, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((words for is_it, words in _OTHERS if is_it(mode)), "no regular file")
            raise OSError(errno.EINVAL, f"It is {kind}, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


_OTHERS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything that follows.

    Raises:
        OSError: If the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders: theirs are safe when the call returns.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def why_unwritable(folder: Path) -> str:
    """Why no file can be written into a folder, which may have to be made; empty where it can."""
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            return ""
    except (OSError, ValueError) as error:  # ValueError: a null character
        return getattr(error, "strerror", None) or str(error)


def check_files(**files: str | Path | None) -> None:
    """Refuse files that could not be written at the end, before anything is made for them.

    Args:
        files: Each by the option that names it; None where it was not given.

    Raises:
        ConfigError: With all of them.
    """
    problems = []
    for option, file in files.items():
        if file is None:
            continue
        folder = os.path.dirname(file) or "."
        if not os.path.isdir(folder):
            problems.append(f"--{option} {file}: there is no folder {folder!r}: make it.")
        elif os.path.isdir(file):
            problems.append(f"--{option} {file} is a folder: name a file.")
        elif os.path.exists(file) and not os.access(file, os.W_OK):
            problems.append(f"--{option} {file} may not be written: name another file.")
        elif reason := why_unwritable(Path(folder)):
            problems.append(f"--{option} {file} cannot be written ({reason}): name another file.")
    if problems:
        raise ConfigError("\n".join(problems))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a file error inside, such as a full disk, into a :class:`CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {path}: {error.strerror or error}. What was written earlier is intact: "
            "make room, and repeat the command (dat-ds train: with --resume auto)."
        ) from None


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one.

    Raises:
        CheckpointError: If it cannot be written; the old file stays.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """:func:`replace_text` with ``values`` as JSON."""
    replace_text(path, json.dumps(values, indent=1) + "\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line.

    Raises:
        CheckpointError: If it cannot be written.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def sync_rows(path: Path) -> None:
    """Have the rows of a file, and its name, on the disk; nothing where there is no such file.

    Raises:
        CheckpointError: If they cannot be written.
    """
    with writing(path), contextlib.suppress(FileNotFoundError):
        sync(path)
        sync(path.parent)


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after ``step``, which a continued run writes again, and half-written ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a crash can leave half a line
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    replace_text(path, "".join(kept))
