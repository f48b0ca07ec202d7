"""Where a saved model is, and what was written beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dat_ds.checkpoints import CHECKPOINTS, LATEST, CheckpointFolder
from dat_ds.errors import ModelError

WEIGHTS_NAME = "model.safetensors"
SPEC_NAME = "model.json"
FORMAT = 1


def find_saved(path: Path) -> Path:
    """The folder of the saved model that ``path`` stands for.

    Args:
        path: A folder of ``save_weights``, the ``model.safetensors`` in it, or the folder of a run.
            Of a run, ``checkpoints/best`` is taken if it has a model, else its
            newest checkpoint.

    Raises:
        ModelError: There is none, with the places looked at.
        CheckpointError: The run's ``latest`` names something that is not beside it.
    """
    if path.name == WEIGHTS_NAME:
        path = path.parent
    checkpoints = CheckpointFolder(path / CHECKPOINTS)
    candidates = [path, checkpoints.best_folder]
    latest = checkpoints.latest()
    if latest is not None:
        candidates.append(latest)
    for folder in candidates:
        if (folder / WEIGHTS_NAME).is_file():
            return folder
    looked_for = [str(folder / WEIGHTS_NAME) for folder in candidates]
    if latest is None:
        looked_for.append(str(checkpoints.folder / LATEST))
    raise ModelError(
        f"No saved model at '{path}'. Looked for: {', '.join(looked_for)}. Give the folder of a "
        f"run, of a checkpoint, or of an export."
    )


def read_spec(file: Path) -> dict[str, Any]:
    """The description of a saved model.

    Raises:
        ModelError: It is missing, or of another format.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version, spec = data["format"], dict(data["spec"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"'{file}' is missing or is not a description of a saved model: {error!r}. It belongs "
            f"beside {WEIGHTS_NAME}; copy both."
        ) from error
    if version != FORMAT:
        raise ModelError(
            f"'{file}' has format {version}; this version of dat_ds reads format {FORMAT}."
        )
    return spec
