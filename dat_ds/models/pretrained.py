"""Weights from a local checkpoint file, matched against a model key by key."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dat_ds.errors import ModelError

logger = logging.getLogger("dat_ds")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# Where training scripts put the state dict, and what wrappers put before its keys.
_CONTAINERS = ("state_dict", "model", "module")
_WRAPPERS = ("module.", "_orig_mod.", "body.", "model.")
_LISTED = 8


def load_pretrained(
    model: nn.Module, path: str | Path, head: tuple[str, ...], *, skips_head: bool = False
) -> None:
    """Load a checkpoint file into ``model``, in place.

    A classifier of another shape, or none, is allowed: the model keeps its fresh one, and a
    warning says so and what was left out. Where timm knows how to convert the file (another
    format, position embeddings of another image size) its conversion is used, with a warning as
    well.

    Args:
        model: The network, without normalisation.
        path: A ``.pt``, ``.pth``, ``.bin`` (read with ``weights_only=True``) or
            ``.safetensors`` file that holds a state dict, possibly under 'state_dict', 'model' or
            'module', possibly one saved by dat_ds.
        head: Names of the modules that make up the classifier.
        skips_head: Leave the file's classifier out whatever its shape: it was trained for
            something else.

    Raises:
        ModelError: The file is missing or unreadable, or something other than the classifier
            does not match; the first such keys are listed.
    """
    target = model.state_dict()
    weights = unwrapped(read_weights(Path(path).expanduser()), target)
    if _problems(weights, target, head):
        weights = _converted(weights, model, path)
    problems = _problems(weights, target, head)
    if problems:
        more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ModelError(
            f"dat.model.pretrained='{path}' does not fit the model; only the classifier "
            f"({', '.join(head)}) may differ:\n  " + "\n  ".join(problems[:_LISTED]) + more
        )
    kept = {
        k: v
        for k, v in weights.items()
        if k in target and v.shape == target[k].shape and not (skips_head and _in_head(k, head))
    }
    fresh = sorted(k for k in target if k not in kept and _in_head(k, head))
    left_out = sorted(k for k in weights if k not in kept and _in_head(k, head))
    if fresh:
        logger.warning(
            "dat.model.pretrained='%s': the classifier does not have the shape of this model's, or "
            "another purpose; freshly initialised instead: %s",
            path,
            ", ".join(fresh),
        )
    if left_out:
        logger.warning("dat.model.pretrained='%s': left out %s", path, ", ".join(left_out))
    model.load_state_dict(kept, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, on the CPU, without executing anything the file contains.

    Args:
        path: A ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file.

    Raises:
        ModelError: The file is missing, has another suffix, or does not hold a state dict.
    """
    if path.suffix not in (*_TORCH_SUFFIXES, ".safetensors"):
        raise ModelError(
            f"Cannot read weights from '{path}': name a file that ends in "
            f"{', '.join(_TORCH_SUFFIXES)} or .safetensors."
        )
    if not path.is_file():
        raise ModelError(f"Cannot read weights from '{path}': there is no such file.")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"Cannot read weights from '{path}': {reason} "
            "The file must hold tensors only: write it with "
            "torch.save(model.state_dict(), path) or as .safetensors."
        ) from error
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(
            f"Cannot read weights from '{path}': it does not hold a state dict. Write it with "
            "torch.save(model.state_dict(), path)."
        )
    return dict(content)


def unwrapped(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the normalisation of a PixelModel and the prefixes that wrappers add to every key."""
    weights = {k: v for k, v in weights.items() if not k.startswith("normalize.")}
    for prefix in _WRAPPERS:
        shared = bool(weights) and all(k.startswith(prefix) for k in weights)
        if shared and not all(k.startswith(prefix) for k in target):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _converted(weights: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Weights as converted by the model's own timm module, unchanged if it cannot."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        converted: dict[str, Tensor] = convert(dict(weights), model)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError):
        # Not a file that timm knows: the list of mismatches tells more than its error would.
        return weights
    logger.warning(
        "dat.model.pretrained='%s' was saved for another format or image size; timm converted it "
        "(position embeddings are interpolated).",
        path,
    )
    return converted


def _in_head(key: str, head: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{module}.") for module in head)


def _problems(
    weights: Mapping[str, Tensor], target: Mapping[str, Tensor], head: tuple[str, ...]
) -> list[str]:
    """Describe every key outside of the classifier that is missing, unexpected or misshapen."""
    problems = []
    for key in sorted({*weights, *target}):
        # Files older than torch 0.4.1 do not have the batch-norm counter.
        if _in_head(key, head) or key.endswith("num_batches_tracked"):
            continue
        if key not in weights:
            problems.append(f"{key}: missing from the file")
        elif key not in target:
            problems.append(f"{key}: not in the model")
        elif weights[key].shape != target[key].shape:
            found, wanted = tuple(weights[key].shape), tuple(target[key].shape)
            problems.append(f"{key}: shape {found} in the file, {wanted} in the model")
    return problems
