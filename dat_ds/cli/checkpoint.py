"""``dat-ds checkpoint``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.checkpoints import CHECKPOINTS, STATE, CheckpointFolder, damage_of, read_state
from dat_ds.cli.arguments import add_command
from dat_ds.errors import CheckpointError, UserError

_DESCRIPTION = """\
verify reads every file of every checkpoint and compares it with the size and SHA-256 that were
written down; exit code 1 where one differs. list names the checkpoints, newest first. prune removes
all but the newest that were written at their step; folders that you named yourself stay.

PATH is a run, its folder of checkpoints, or one checkpoint."""


def add(commands: Any) -> None:
    """Add the command."""
    summary = "verify, list or prune the checkpoints of a run"
    parser = add_command(commands, "checkpoint", _checkpoint, summary, description=_DESCRIPTION)
    parser.add_argument("what", choices=("verify", "list", "prune"))
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument(
        "--keep", type=int, metavar="N", help="with prune: number of checkpoints to keep"
    )


def _checkpoint(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    path: Path = options.path
    if options.what == "prune":
        return _prune(_folder_of(path), options.keep)
    if options.keep is not None:
        raise UserError(f"--keep is for prune, not for {options.what}.")
    if (path / STATE).exists():
        checkpoints = [path]
    else:
        folder = _folder_of(path)
        checkpoints = folder.newest_first()
        if not checkpoints:
            raise CheckpointError(f"There is no checkpoint in {folder.folder}.")
    return (_verify if options.what == "verify" else _list)(checkpoints)


def _folder_of(path: Path) -> CheckpointFolder:
    inside = path / CHECKPOINTS
    folder = inside if inside.is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(path)!r}.")
    return CheckpointFolder(folder)


def _verify(checkpoints: list[Path]) -> int:
    found = {checkpoint: damage_of(checkpoint) for checkpoint in checkpoints}
    for checkpoint, damage in found.items():
        print(f"{checkpoint}: {'damaged' if damage else 'whole'}")
        for problem in damage:
            print(f"  {problem}")
    return 1 if any(found.values()) else 0


def _list(checkpoints: list[Path]) -> int:
    for checkpoint in checkpoints:
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        try:
            state = read_state(checkpoint)
            words = f"step {state['step']}, {state['ranks']} rank(s)"
        except (CheckpointError, KeyError):
            words = f"{STATE} is damaged"
        print(f"{checkpoint}: {words}, {size / 1e6:.1f} MB")
    return 0


def _prune(folder: CheckpointFolder, keep: int | None) -> int:
    if keep is None or keep < 1:
        raise UserError("prune: write how many checkpoints stay, at least 1: --keep 2")
    removed = folder.prune(keep)
    for checkpoint in removed:
        print(f"removed {checkpoint}")
    print(f"{len(folder.newest_first())} stay in {folder.folder}")
    return 0
