"""The folder of a run's checkpoints: which are there, whether their files are whole, which may go.

``<run>/checkpoints/``, or a folder of the user's own::

    latest            name of the newest complete checkpoint
    step-00000120/    one checkpoint: the files that :mod:`dat_ds.engine.checkpoint` writes,
      state.json      what the training loop goes on from, and
      manifest.json   the size and SHA-256 of every other file, written last
    best/             the model of the best validation

A checkpoint is written into ``.partial``, synced to the disk, and renamed. An earlier one of that
name goes into ``.replaced`` meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_ds.errors import CheckpointError
from dat_ds.files import replace_text, sha256_of, sync, write_json, writing

logger = logging.getLogger("dat_ds")

CHECKPOINTS = "checkpoints"  # in the folder of a run
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
PARTIAL, _REPLACED = ".partial", ".replaced"
FORMAT = 3  # of state.json: since 3 with the layout of the shards, since 2 with a manifest
_WITHOUT_MANIFEST = 1  # the format of dat_ds 0.1
_OF_STEPS = re.compile(r"step-\d{8,}")
_NAME = re.compile(r"[\w-][\w.=+-]*")
_LISTED = 3


def is_checkpoint_name(name: str) -> bool:
    """Whether ``name`` can be that of a checkpoint: a folder beside ``latest``, no path."""
    return bool(_NAME.fullmatch(name)) and name != LATEST


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None for any other path."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def name_of_step(step: int) -> str:
    """The name of the checkpoint after so many optimizer steps, where the user gives none."""
    return f"step-{step:08d}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: If it is missing, unreadable, or of another version's format.
    """
    try:
        state = json.loads(_text_of(checkpoint / STATE))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint of dat_ds, or damaged: {checkpoint / STATE}: "
            f"{reason}."
        ) from None
    if not isinstance(state, dict) or state.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{checkpoint / STATE} has a format that this version cannot read: it reads 1 to "
            f"{FORMAT}."
        )
    return state


def _text_of(file: Path) -> str:
    """Text of a file; opening a pipe would wait for ever.

    Raises:
        OSError: If it is none, or cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(file))
    return file.read_text(encoding="utf-8")


# ---- whole files


def files_in(folder: Path) -> list[str]:
    """Names of the files below ``folder`` but for its manifest, in order."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def described(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Entries of a manifest for these files, which are synced to the disk.

    Raises:
        CheckpointError: If one cannot be read or synced.
    """
    entries = {}
    for name in names:
        file = folder / name
        with writing(file):
            sync(file)
            entries[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return entries


def write_manifest(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of ``folder``, and sync the names in it and below.

    Raises:
        CheckpointError: If it cannot be written.
    """
    files = dict(sorted(entries.items()))
    write_json(folder / MANIFEST, {"files": files, "sha256": _digest(files)})
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        with writing(path):
            sync(path)


def damage_of(
    checkpoint: Path, *, first: int = 0, every: int = 1, only: Sequence[str] | None = None
) -> list[str]:
    """What is wrong with the files of a checkpoint; empty where each is as it was written.

    A checkpoint of dat_ds 0.1 has no manifest: sizes alone are compared.

    Args:
        checkpoint: Its folder.
        first: First file of the manifest to read, and
        every: of every so many: ranks share the work.
        only: Names of the files to read; None for all, and then files that are read though the
            manifest does not list them count as damage, too.

    Returns:
        Sentences that begin with the file.
    """
    try:
        entries = _entries(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    found = []
    if only is None and (checkpoint / MANIFEST).exists():
        strange = [n for n in files_in(checkpoint) if n.endswith(".pt") and n not in entries]
        found += [f"{checkpoint / name} is not one of the checkpoint's files." for name in strange]
    names = sorted(entries if only is None else set(only) & set(entries))
    for name in names[first::every]:
        problem = _damage_of_file(checkpoint / name, entries[name])
        found += [] if problem is None else [f"{checkpoint / name} {problem}."]
    return found


def _entries(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint, by name: ``bytes``, and ``sha256`` where it was written down."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        state = read_state(checkpoint)
        if state["format"] != _WITHOUT_MANIFEST:
            raise CheckpointError(f"{manifest} is missing.")
        # Checkpoints before 0.1 listed no files.
        sizes = state.get("files", {})
        if not isinstance(sizes, dict):
            raise CheckpointError(
                f"{checkpoint / STATE} is damaged: its files are not a list of sizes."
            )
        return {name: {"bytes": size} for name, size in sizes.items()}
    try:
        written = json.loads(_text_of(manifest))
        files: dict[str, dict[str, Any]] = written["files"]
        whole = _digest(files) == written["sha256"] and STATE in files
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{manifest} is damaged.")
    return files


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of the entries of a manifest, hexadecimal."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _damage_of_file(file: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} of {entry['bytes']} bytes"
        if "sha256" in entry and sha256_of(file) != entry["sha256"]:
            return "has other bytes than were written"
    except (OSError, ValueError) as error:  # a name may hold a NUL character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    except (KeyError, TypeError):
        return "has no size in the manifest"
    return None


def damage_in_words(checkpoint: Path, damage: Sequence[str]) -> str:
    """A message of what :func:`damage_of` has found: the first of it, and how much there is."""
    more = len(damage) - _LISTED
    listed = " ".join(damage[:_LISTED]) + (f" And {more} more." if more > 0 else "")
    return f"Checkpoint {checkpoint} is damaged. {listed}"


# ---- the folder


class CheckpointFolder:
    """The checkpoints of one run, as files.

    Args:
        folder: ``<run>/checkpoints``, or a folder of the user's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def best_folder(self) -> Path:
        """Where the best model is kept."""
        return self.folder / "best"

    def newest_first(self) -> list[Path]:
        """All complete checkpoints: what ``latest`` names first, then by their steps."""
        steps = dict(self._with_steps())
        pointed = self._pointed()
        return sorted(steps, key=lambda path: (path == pointed, steps[path], path), reverse=True)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where there is none.

        Raises:
            CheckpointError: If ``latest`` names something that is not beside it.
        """
        return next(iter(self.newest_first()), None)

    def latest_in_words(self) -> str:
        """A sentence that says where the newest checkpoint is."""
        latest = self.latest()
        return "No checkpoint was written yet." if latest is None else f"Last checkpoint: {latest}."

    def named(self, tag: str | None) -> Path:
        """The checkpoint ``tag``, or the newest one.

        Raises:
            CheckpointError: If there is no such checkpoint, with those that there are.
        """
        if tag is not None:
            check_name(tag)
        checkpoint = self.latest() if tag is None else self.folder / tag
        if checkpoint is not None and checkpoint.is_dir():
            return checkpoint
        if (self.folder / STATE).exists():
            raise CheckpointError(
                f"{self.folder} is one checkpoint: write the folder that it lies in, "
                f"{str(self.folder.parent)!r}, and tag={self.folder.name!r}."
            )
        what = "no checkpoint" if checkpoint is None else f"no checkpoint {checkpoint.name!r}"
        raise CheckpointError(f"There is {what} in {self.folder} ({self.listed()}).")

    def listed(self) -> str:
        """What the folder has, in words."""
        there = sorted(path.name for path in self.newest_first())
        return f"it has {', '.join(there)}" if there else "nor any other"

    def publish(self, complete: Path) -> Path:
        """Give a complete checkpoint its place, and let ``latest`` name it.

        Args:
            complete: Its folder within ``.partial``, synced to the disk.

        Raises:
            CheckpointError: If it cannot be renamed; earlier checkpoints are intact.
        """
        final, replaced = self.folder / complete.name, self.folder / _REPLACED
        with writing(final):
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                replaced.mkdir()
                os.replace(final, replaced / final.name)
            os.replace(complete, final)
            sync(self.folder)
            sync(self.folder.parent)  # its own name may be new
        replace_text(self.folder / LATEST, final.name)
        for left in (replaced, self.folder / PARTIAL):  # DeepSpeed puts scripts of its own there
            shutil.rmtree(left, ignore_errors=True)
        return final

    def prune(self, keep: int) -> list[Path]:
        """Remove all but the newest checkpoints that were written at their step.

        A folder that was named by the user stays, and so does what ``latest`` names.

        Args:
            keep: How many stay, at least 1.

        Returns:
            What was removed.
        """
        # What latest names comes first, so it is among those that stay.
        removed = [path for path in self.newest_first() if _OF_STEPS.fullmatch(path.name)][keep:]
        for path in removed:
            shutil.rmtree(path, ignore_errors=True)
        return removed

    def clean(self) -> None:
        """Remove what a crash has left half written, and put back what it was about to replace."""
        for kept in (self.folder / _REPLACED).glob("*"):
            if (kept / STATE).is_file() and not (self.folder / kept.name).exists():
                with writing(kept):
                    os.replace(kept, self.folder / kept.name)
        for name in (PARTIAL, _REPLACED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / f"{LATEST}.partial").unlink(missing_ok=True)

    def _pointed(self) -> Path | None:
        pointer = self.folder / LATEST
        try:
            name = _text_of(pointer).strip()
        except (OSError, ValueError) as error:
            if pointer.exists():
                logger.warning("%s cannot be read (%s): going by the steps.", pointer, error)
            return None
        if not is_checkpoint_name(name):
            raise CheckpointError(
                f"{pointer} holds {name[:80]!r}, which is not the name of a folder beside it. "
                "Write the name of a checkpoint into it, or remove it: then the steps decide."
            )
        if not (self.folder / name).is_dir():
            logger.warning("%s names %r, which is not there: going by the steps.", pointer, name)
        return self.folder / name

    def _with_steps(self) -> Iterator[tuple[Path, int]]:
        # One of the two files may be gone: such a checkpoint is looked at too, and said.
        files = (*self.folder.glob(f"*/{STATE}"), *self.folder.glob(f"*/{MANIFEST}"))
        for path in sorted({file.parent for file in files if is_checkpoint_name(file.parent.name)}):
            try:
                yield path, int(read_state(path)["step"])
            except (CheckpointError, KeyError, TypeError, ValueError):
                digits = re.search(r"\d{1,18}", path.name)
                yield path, int(digits[0]) if digits else -1


def check_name(tag: object) -> None:
    """Refuse what cannot be the name of a checkpoint.

    Raises:
        CheckpointError: With what can.
    """
    if not isinstance(tag, str) or not is_checkpoint_name(tag):
        raise CheckpointError(
            f"tag={tag!r} cannot name a checkpoint: write letters, digits, '-', '_' and '.', such "
            "as 'epoch-3', and not 'latest'."
        )
