"""DeepSpeed's checkpoint files, read without running code that they hold.

DeepSpeed unpickles its files, which runs whatever they name. Here torch's restricted unpickler
reads them, with the four classes of DeepSpeed's own that its files hold.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dat_ds.errors import CheckpointError

_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def read_file(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What DeepSpeed or :func:`torch.save` wrote: tensors and plain types.

    Args:
        path: The file.
        map_location: As of :func:`torch.load`.
        mmap: Whether tensors are read from the disk only where they are used.

    Raises:
        CheckpointError: If the file is missing or damaged, or names code to run.
    """
    try:
        with torch.serialization.safe_globals(_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain types, so it is not loaded"
            + (f": {lines[0]}" if lines else ".")
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"Cannot read {path}: {reason}. The file is damaged.") from None


def load_safely(engine: DeepSpeedEngine) -> None:
    """Have DeepSpeed read its files by :func:`read_file`, whichever of its writers wrote them."""
    vars(engine.checkpoint_engine)["load"] = read_file


def refuse_code(files: Iterable[Path]) -> None:
    """Refuse files that name code, before a tool of DeepSpeed unpickles them.

    Raises:
        CheckpointError: For the first such file.
    """
    for file in files:
        read_file(file)
