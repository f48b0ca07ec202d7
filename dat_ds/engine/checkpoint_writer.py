"""Writing the files of a checkpoint: at once, or from a snapshot while training goes on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from dat_ds.checkpoints import described
from dat_ds.errors import CheckpointError
from dat_ds.files import writing


@dataclass(frozen=True)
class Job:
    """Files that are written together.

    Args:
        write: Writes them.
        names: Their names, relative to the folder of the checkpoint.
    """

    write: Callable[[], None]
    names: tuple[str, ...]


class CheckpointWriter:
    """Writes this rank's files of one checkpoint, syncs them, and takes their checksums.

    Args:
        folder: Folder of the checkpoint, within ``.partial``.
        jobs: What to write. With ``in_background`` nothing in it may be changed any more.
        in_background: Whether a thread does it.

    Attributes:
        entries: Those of the manifest for the files, once they are written.
    """

    def __init__(self, folder: Path, jobs: list[Job], *, in_background: bool) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        self._jobs = jobs
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if in_background:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    @property
    def is_done(self) -> bool:
        """Whether all is written, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            CheckpointError: If a file cannot be written; earlier checkpoints are intact.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is None:
            return
        if not _is_write_error(self._error):
            raise self._error
        raise CheckpointError(
            f"Cannot write a checkpoint into {self.folder.parent}: {self._error}. Earlier "
            "checkpoints are intact: make room and continue from the newest (dat-ds train: "
            "--resume auto)."
        ) from None

    def _run(self) -> None:
        try:
            while self._jobs:
                job = self._jobs.pop(0)
                job.write()
                self.entries |= described(self.folder, job.names)
        except Exception as error:  # raised by the training loop, in wait()
            self._error = error
            self._jobs.clear()


def deepspeeds_files(engine: DeepSpeedEngine, folder: Path, *, copied: bool) -> list[Job]:
    """What DeepSpeed's ``save_checkpoint`` would write on this rank; a collective.

    Args:
        engine: DeepSpeed's engine.
        folder: Folder of the checkpoint, in that of all checkpoints.
        copied: Whether the state is copied, since it is written while training goes on.
    """
    writer, jobs = engine.checkpoint_engine, []
    original = writer.save

    def save(state_dict: Any, path: str) -> None:
        state = snapshot(state_dict) if copied else state_dict
        name = Path(path).relative_to(folder).as_posix()
        jobs.append(Job(lambda: original(state, path), (name,)))

    vars(writer)["save"] = save
    try:
        with writing(folder):  # DeepSpeed puts a script of its own beside it
            DeepSpeedEngine.save_checkpoint(
                engine, str(folder.parent), tag=folder.name, save_latest=False
            )
    finally:
        del vars(writer)["save"]  # uncovers the class's own
    return jobs


def snapshot(value: Any) -> Any:
    """A copy on the CPU of tensors and what holds them, which training does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return type(value)((k, snapshot(v)) for k, v in value.items())  # type: ignore[call-arg]
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(snapshot, value))
    return copy.deepcopy(value)


def _is_write_error(error: Exception) -> bool:
    """Whether a file could not be written, and not a rank that died meanwhile."""
    # torch's writer reports a full disk as a RuntimeError of its own.
    return isinstance(error, OSError) or (
        isinstance(error, RuntimeError)
        and any(w in str(error) for w in ("PytorchStreamWriter", "unexpected pos", "file write"))
    )
