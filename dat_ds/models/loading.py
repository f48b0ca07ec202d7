"""The saved model: a folder with ``model.safetensors`` (weights) and ``model.json`` (spec).

Nothing in it is executed on loading, and a model can be loaded without the files, the network or
the config that it was built from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dat_ds.checkpoints import MANIFEST, damage_in_words, damage_of
from dat_ds.errors import CheckpointError, ModelError
from dat_ds.files import sync
from dat_ds.models.build import build_model
from dat_ds.models.families import huggingface
from dat_ds.models.families.projection import use_projection_head
from dat_ds.models.normalize import PixelModel
from dat_ds.models.pretrained import read_weights
from dat_ds.models.saved import FORMAT, SPEC_NAME, WEIGHTS_NAME, find_saved, read_spec

# Part of a spec, but of no use for a model whose weights are at hand: an attack by
# torch.autograd.grad must work on it, and its Hugging Face folder may be gone.
_NOT_REBUILT = ("pretrained", "seed", "activation_checkpointing", "hf_config", "class_names")


def save_weights(path: Path, state_dict: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """Write a saved model; a crash or a full disk leaves any earlier one intact.

    Args:
        path: Folder to write into; made if need be.
        state_dict: State dict of a ``PixelModel``, on any device, in any floating dtype, complete
            (gathered, under ZeRO-3). Tied tensors are written as separate copies.
        spec: ``PixelModel.spec``.

    Raises:
        CheckpointError: A file cannot be written.
    """
    weights, description = path / WEIGHTS_NAME, path / SPEC_NAME
    staged = {file: path / f".{file.name}.partial" for file in (description, weights)}
    try:
        path.mkdir(parents=True, exist_ok=True)
        staged[description].write_text(
            json.dumps({"format": FORMAT, "spec": dict(spec)}, indent=2) + "\n", encoding="utf-8"
        )
        safetensors.torch.save_file(
            _unshared(state_dict), staged[weights], metadata={"format": "pt"}
        )
        # safetensors makes files that only their owner can read; follow the umask instead.
        shutil.copymode(staged[description], staged[weights])
        for file, temporary in staged.items():
            sync(temporary)  # so that the rename cannot come before the content
            os.replace(temporary, file)
        sync(path)
    except (OSError, SafetensorError) as error:
        for temporary in staged.values():
            _remove(temporary)
        raise CheckpointError(
            f"'{weights}' could not be written: {error}. Nothing was lost: files saved earlier "
            "are as they were. Free space or fix the folder, then resume from the last checkpoint."
        ) from error


def load(path: str | Path, *, map_location: str | torch.device = "cpu") -> nn.Module:
    """Load a saved model.

    Args:
        path: Of what ``save_weights`` wrote, or of a run; see ``dat_ds.models.saved.find_saved``.
        map_location: Device to put the model on.

    Returns:
        The ``PixelModel`` in eval mode, float32: pixels in [0, 1] (B, C, H, W) to logits (B, K).
        Activation checkpointing is off.

    Raises:
        ModelError: There is no saved model, it cannot be read or rebuilt, or its file is not as the
            checkpoint that it is of was written.
    """
    folder = find_saved(Path(path))
    if (folder / MANIFEST).exists():
        damage = damage_of(folder, only=(WEIGHTS_NAME, SPEC_NAME))
        if damage:
            raise ModelError(damage_in_words(folder, damage))
    spec = read_spec(folder / SPEC_NAME)
    weights = read_weights(folder / WEIGHTS_NAME)
    model = _rebuild(spec, folder)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"'{folder / WEIGHTS_NAME}' does not fit '{folder / SPEC_NAME}': {error}"
        ) from error
    # The file may hold rounded ones, if it was saved in 16 bits.
    model.normalize.restore()
    return model.to(map_location).eval()


def _unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors requires."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _remove(file: Path) -> None:
    """Remove a temporary file; one that cannot be is left, as the error behind it says more."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return


def _rebuild(spec: dict[str, Any], folder: Path) -> PixelModel:
    """Build the model that a spec describes, with weights that are to be overwritten."""
    arguments = {key: value for key, value in spec.items() if key not in _NOT_REBUILT}
    try:
        if "hf_config" in spec:
            with torch.random.fork_rng(devices=[]):
                body = huggingface.body_from_config(spec["hf_config"])
                if spec.get("head") == "projection":
                    use_projection_head(body.model, body.head_names(), spec["name"])
            statistics = {key: spec[key] for key in ("num_classes", "mean", "std")}
            return PixelModel(body, spec=spec, **statistics)
        if isinstance(arguments.get("img_size"), list):
            arguments["img_size"] = tuple(arguments["img_size"])
        # The seed only keeps the global random state as it is.
        model = build_model(**arguments, seed=0)
    except (KeyError, TypeError) as error:
        raise ModelError(f"'{folder / SPEC_NAME}' cannot be rebuilt: {error!r}.") from error
    model.spec = spec
    return model
