"""The weights of a checkpoint without their average, read without ranks.

The model beside DeepSpeed's files holds the moving average of the weights where there is one; what
training itself goes on with is in DeepSpeed's own files.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from dat_ds.checkpoints import damage_in_words, damage_of, read_state
from dat_ds.engine.safe_loading import read_file, refuse_code
from dat_ds.errors import CheckpointError
from dat_ds.finetuning import LoraConfig
from dat_ds.finetuning.lora import merged
from dat_ds.models.pretrained import read_weights
from dat_ds.models.saved import WEIGHTS_NAME

_MODEL_STATES = "mp_rank_00_model_states.pt"
_SEVERAL_WEIGHTS = "zero_one_adam"


def unaveraged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that training goes on with from a checkpoint of any ZeRO stage.

    Under ZeRO-3 DeepSpeed's own ``zero_to_fp32`` puts the shards together. Files that name code
    to run are refused before it unpickles them.

    Args:
        checkpoint: A folder that ``engine.save_checkpoint`` wrote, complete with all ranks' files.

    Returns:
        The state dict of the whole model on the CPU, in the dtypes of its forward. Buffers, which
        have no average over time, are those of ``model.safetensors``: means over the ranks.

    Raises:
        CheckpointError: A file is missing or damaged, or ranks held different weights.
    """
    state = read_state(checkpoint)
    damage = damage_of(checkpoint)
    if damage:
        raise CheckpointError(damage_in_words(checkpoint, damage))
    _check_same_weights(checkpoint, state)
    saved = read_weights(checkpoint / WEIGHTS_NAME)
    stage = state["config"].get("zero_optimization", {}).get("stage", 0)
    try:
        parts = _read_module(checkpoint, stage)
        raw = _gathered(checkpoint) if stage == 3 else parts["module"]
        raw = _without_adapters(raw, state["config"])
    except (CheckpointError, OSError, KeyError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"The un-averaged weights of {checkpoint} cannot be read: {reason}. All files of all "
            "ranks must lie in it. The averaged weights are in its model.safetensors: leave out "
            "--weights raw."
        ) from error
    buffers = set(parts["buffer_names"])
    missing = sorted(set(saved) - set(raw) - buffers)
    if missing:
        raise CheckpointError(
            f"DeepSpeed's files in {checkpoint} lack {', '.join(missing)}: the checkpoint is "
            "incomplete, or of another model."
        )
    return {
        name: tensor if name in buffers else raw[name].to(tensor.dtype)
        for name, tensor in saved.items()
    }


def _check_same_weights(checkpoint: Path, state: Mapping[str, Any]) -> None:
    optimizer = state["config"].get("dat", {}).get("optimizer") or {}
    if state["ranks"] > 1 and optimizer.get("name") == _SEVERAL_WEIGHTS:
        raise CheckpointError(
            f"{checkpoint} has no one set of un-averaged weights: each of its {state['ranks']} "
            f"ranks steps by itself (dat.optimizer.name={_SEVERAL_WEIGHTS!r}). Their average is in "
            "its model.safetensors: leave out --weights raw."
        )


def _without_adapters(raw: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    lora = config.get("dat", {}).get("finetuning", {}).get("lora")
    return raw if lora is None else merged(raw, LoraConfig(**lora).scale)


def _read_module(checkpoint: Path, stage: int) -> dict[str, Any]:
    """What DeepSpeed saved of the module: all of it, but for its parameters under ZeRO-3."""
    name = f"zero_pp_rank_0_{_MODEL_STATES}" if stage == 3 else _MODEL_STATES
    parts: dict[str, Any] = read_file(checkpoint / name)
    return parts


def _gathered(checkpoint: Path) -> dict[str, Tensor]:
    """The float32 parameters of a ZeRO-3 checkpoint, put together from every rank's shards."""
    refuse_code(sorted(checkpoint.glob("*.pt")))
    # DeepSpeed prints its progress.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), checkpoint.name
        )
    return state
