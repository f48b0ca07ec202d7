"""The folder of a run: choosing it, and what it holds already."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from dat_ds.checkpoints import CHECKPOINTS, CheckpointFolder, damage_in_words, run_of
from dat_ds.config import RunConfig
from dat_ds.engine.checkpoint import damage_by_ranks
from dat_ds.errors import CheckpointError
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_TEMPORARY = re.compile(
    r"(config|record|trackers)\.json\.partial|metrics\.jsonl\.partial|"
    r"\.model\.(safetensors|json)\.(partial|\d+\.tmp)"  # the latter of 0.1
)


def choose_output(run: RunConfig, resume: str) -> str:
    """The folder of the run: what the config says, or a free default name.

    Raises:
        CheckpointError: If it holds another run, or is not the folder of ``resume``.
    """
    if resume not in ("none", "auto"):
        folder = run_of(Path(resume)) or Path(resume)
        asked = run.dat.output_dir
        if asked is not None and Path(asked).resolve() != folder.resolve():
            raise CheckpointError(
                f"--resume {resume} is of the run in {folder}, and dat.output_dir={asked!r} is "
                "another folder: leave out dat.output_dir to go on in the run's own, or copy the "
                f"run to {asked} and resume it there."
            )
        return str(folder)
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
    return any((folder / name).exists() for name in ("config.json", "record.json", CHECKPOINTS))


def find_checkpoint(output: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint to continue from, with its files as they were written; a collective.

    Args:
        output: Folder of the run.
        resume: ``"none"``, ``"auto"``, or the path of a run or of one of its checkpoints. Of a run,
            the newest checkpoint whose files are whole is taken, and what was passed over is said.
        ranks: The processes, which share the reading.

    Returns:
        Its folder; None where the run starts anew.

    Raises:
        CheckpointError: If a checkpoint that was named is not there or is damaged, or if all are.
    """
    if resume == "none":
        return None
    path, folder = Path(resume), CheckpointFolder(output / CHECKPOINTS)
    with ranks.together():
        if resume != "auto" and run_of(path) is not None:
            candidates = [folder.named(path.name)]
        else:
            candidates = folder.newest_first()
            if not candidates and resume != "auto":
                raise CheckpointError(
                    f"--resume {resume}: there is no checkpoint in {folder.folder}."
                )
    damaged = []
    for checkpoint in candidates:
        damage = damage_by_ranks(checkpoint, ranks)
        if not damage:
            return checkpoint
        damaged.append(damage_in_words(checkpoint, damage))
        if ranks.is_main and len(candidates) > 1:
            logger.warning("%s Going on from an earlier one.", damaged[-1])
    if not damaged:
        return None
    raise CheckpointError(
        "\n".join(damaged) + "\nNothing was changed. To start anew: choose another folder "
        f"(--set dat.output_dir=...). Whole files: dat-ds checkpoint verify {output}."
    )


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


def clean_folder(output: Path) -> None:
    """Remove the temporary files that a crash has left in the folder of a run; no other file."""
    checkpoints = CheckpointFolder(output / CHECKPOINTS)
    checkpoints.clean()
    for folder in (output, checkpoints.best_folder):
        for file in folder.glob("*") if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(file.name) and file.is_file():
                file.unlink(missing_ok=True)
