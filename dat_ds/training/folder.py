"""The folder of a run: choosing it, and what it holds already."""

from __future__ import annotations

import re
from pathlib import Path

from dat_ds.config import RunConfig
from dat_ds.engine.checkpoint import Checkpoints
from dat_ds.errors import CheckpointError


def choose_output(run: RunConfig, resume: str) -> str:
    """The folder of the run: what the config says, or a free default name."""
    if resume not in ("none", "auto"):
        path = Path(resume)
        inside = path.parent.parent if path.name.startswith("step-") else path
        return str(inside)
    dat = run.dat
    if dat.output_dir is not None:
        folder = Path(dat.output_dir)
        if resume == "none" and _holds_run(folder):
            raise CheckpointError(
                f"dat.output_dir={dat.output_dir!r} holds a run already. To continue it: --resume "
                "auto. To start a new one: choose another folder or remove this one."
            )
        return str(folder)
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", dat.model.name).strip("-")
    base = Path("runs") / f"{dat.data.name}-{model}-{dat.attack.name}-zero{run.zero_stage}"
    taken = [base.with_name(f"{base.name}-{i}") if i > 1 else base for i in range(1, 10_000)]
    for i, folder in enumerate(taken):
        if not _holds_run(folder):
            newest = taken[max(0, i - 1)]
            return str(newest if resume == "auto" else folder)
    raise CheckpointError(f"Too many runs named {base}-*: set dat.output_dir.")


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "record.json", "checkpoints"))


def find_checkpoint(output: Path, resume: str) -> Path | None:
    """The checkpoint to continue from; None where the run starts anew."""
    if resume == "none":
        return None
    path = Path(resume)
    if path.name.startswith("step-") and path.exists():
        return path
    checkpoint = Checkpoints(output / "checkpoints", keep=1).latest()
    if checkpoint is None and resume != "auto":
        raise CheckpointError(f"--resume {resume}: there is no checkpoint in {output}/checkpoints.")
    return checkpoint


def make_folder(output: Path) -> None:
    """Make the folder of a run, where it is not there.

    Raises:
        CheckpointError: If it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot make the run's folder {str(output)!r}: {error.strerror}. Set dat.output_dir."
        ) from None
