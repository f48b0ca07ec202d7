"""Weights from a local checkpoint file, matched against a model key by key."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dat_ds.errors import ModelError

logger = logging.getLogger("dat_ds")
PUBLISHED = "timm"
"""In the place of a file: the weights that timm publishes under the model's name."""
STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".pth.tar")
"""How the names of files of weights end."""
# Where training scripts put the state dict; averages of the weights come first, as in timm.
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model", "net", "module"),
)
# What wrappers put before the keys: ``1.`` is of ``nn.Sequential(normalisation, network)``.
_WRAPPERS = ("module.", "_orig_mod.", "body.", "model.", "net.", "1.")
_MEAN, _STD = ("mean", "mu"), ("std", "sigma")
_MOST_CHANNELS, _DEEPEST = 64, 2
_LISTED = 8

Statistics = tuple[list[float], list[float]]


def load_pretrained(
    model: nn.Module, path: str | Path, head: tuple[str, ...], *, skips_head: bool = False
) -> Statistics | None:
    """Load a checkpoint file into ``model``, in place.

    Where timm knows how to convert the file (another format, position embeddings of another image
    size) its conversion is used; position embeddings of Hugging Face's encoders are interpolated in
    the same way. A warning says so; another lists what the file holds and the model does not take,
    and a third what the file lacks and stays freshly initialised: the classifier, where its shape
    is another one.

    Args:
        model: The network, without normalisation.
        path: A file that holds a state dict, see :func:`read_weights`, possibly of a wrapped
            model, see :func:`unwrapped`; or :data:`PUBLISHED`.
        head: Names of the modules that make up the classifier.
        skips_head: Leave the file's classifier out whatever its shape: it was trained for
            something else.

    Returns:
        Mean and standard deviation by channel that the file's model normalises by, where it says.

    Raises:
        ModelError: The file is missing or unreadable, a tensor outside of the classifier has
            another shape, or fewer than half of the file's, or of the model's, fit.
    """
    target = model.state_dict()
    everything = (
        _published(model) if str(path) == PUBLISHED else read_weights(Path(path).expanduser())
    )
    weights = unwrapped(everything, target)
    if not _fits(weights, target, head):
        weights = _converted(weights, model, path)
    _refuse_misfit(weights, target, head, path)
    kept = {
        k: v
        for k, v in weights.items()
        if k in target and v.shape == target[k].shape and not (skips_head and _in_head(k, head))
    }
    # Files older than torch 0.4.1 do not have the batch-norm counter.
    fresh = sorted(k for k in target if k not in kept and not k.endswith("num_batches_tracked"))
    left_out = sorted(k for k in weights if k not in kept)
    if fresh:
        logger.warning(
            "dat.model.pretrained='%s': not in the file, of another shape or another purpose; "
            "freshly initialised instead: %s",
            path,
            ", ".join(fresh),
        )
    if left_out:
        logger.warning("dat.model.pretrained='%s': left out %s", path, ", ".join(left_out))
    model.load_state_dict(kept, strict=False)
    return statistics_of(everything)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, on the CPU, without executing anything the file contains.

    It may be the file itself, or lie under a usual key (``state_dict``, ``model``, ...). Where
    there is an average of the weights as well (``state_dict_ema``, ``model_ema``, ``ema``), that is
    taken, as timm does, and a log message says so.

    Args:
        path: A file with one of :data:`STATE_SUFFIXES`. Those of torch are read with
            ``weights_only=True``; the ``argparse.Namespace`` that training scripts, timm's too,
            put beside the weights is let in and dropped.

    Raises:
        ModelError: The file is missing, has another suffix, or does not hold a state dict.
    """
    if not path.name.endswith(STATE_SUFFIXES):
        raise ModelError(
            f"Cannot read weights from '{path}': name a file that ends in "
            f"{', '.join(STATE_SUFFIXES[:-1])} or {STATE_SUFFIXES[-1]}."
        )
    if not path.is_file():
        raise ModelError(f"Cannot read weights from '{path}': there is no such file.")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
            return tensors
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"Cannot read weights from '{path}': {reason} "
            "The file must hold tensors only: write it with "
            "torch.save(model.state_dict(), path) or as .safetensors."
        ) from error
    content = _contained(content, path)
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(
            f"Cannot read weights from '{path}': it does not hold a state dict. Write it with "
            "torch.save(model.state_dict(), path)."
        )
    return dict(content)


def _published(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that timm publishes for a network, fetched where it is not cached.

    Raises:
        ModelError: The network is none of timm's, has no published weights, or they cannot be
            fetched.
    """
    published = getattr(model, "pretrained_cfg", {})
    name = ".".join(filter(None, (published.get("architecture"), published.get("tag"))))
    if not name or not any(published.get(key) for key in ("hf_hub_id", "url", "file")):
        raise ModelError(
            f"dat.model.pretrained='{PUBLISHED}': timm publishes no weights of this network: write "
            "a name of timm.list_models(pretrained=True) into dat.model.name, or a file."
        )
    try:
        found: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the network, the hub's library, and timm
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"dat.model.pretrained='{PUBLISHED}': the weights of {name!r} cannot be fetched "
            f"({reason}). Fetch them where there is a network, and name the file."
        ) from None
    return found.state_dict()


def _contained(content: Any, path: Path) -> Any:
    """What lies in the containers of a file."""
    while isinstance(content, Mapping):
        found = [k for k in _CONTAINERS if isinstance(content.get(k), Mapping) and content[k]]
        if not found:
            break
        if len(found) > 1:
            logger.warning(
                "'%s' holds several models (%s): %r is taken.", path, ", ".join(found), found[0]
            )
        content = content[found[0]]
    return content


def unwrapped(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop normalisation before the network, and the prefixes that wrappers add to every key.

    Those are our ``PixelModel``, ``DataParallel``, ``torch.compile``, RobustBench's models (``mu``
    and ``sigma``, or ``normalize.mean``), and ``nn.Sequential(normalisation, network)``.
    """
    weights = dict(weights)
    while True:
        normalisation = _normalisation_in(weights)
        inner = {k: v for k, v in weights.items() if k in target or k not in normalisation}
        for prefix in _WRAPPERS:
            shared = bool(inner) and all(k.startswith(prefix) for k in inner)
            if shared and not all(k.startswith(prefix) for k in target):
                inner = {k.removeprefix(prefix): v for k, v in inner.items()}
                break
        if inner.keys() == weights.keys():
            return inner
        weights = inner


def statistics_of(weights: Mapping[str, Tensor]) -> Statistics | None:
    """Mean and standard deviation by channel that a wrapped network's state dict holds.

    Returns:
        None where it holds none.
    """
    names = _normalisation_in(weights)
    found = [
        next((weights[n].flatten().tolist() for n in names if n.split(".")[-1] in kind), None)
        for kind in (_MEAN, _STD)
    ]
    mean, std = found
    if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
        return None
    return mean, std


def _normalisation_in(weights: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors that look like an image's mean and standard deviation."""
    found = {
        name
        for name, value in weights.items()
        if name.count(".") <= _DEEPEST
        and name.split(".")[-1] in (*_MEAN, *_STD)
        and value.numel() == max(value.shape, default=1) <= _MOST_CHANNELS
    }
    of_module = {name for name in weights if name.startswith("normalize.")}
    return found | of_module


def _converted(weights: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Weights as converted by the model's own timm module, unchanged if it cannot."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return _interpolated(weights, model, path)
    try:
        converted: dict[str, Tensor] = convert(dict(weights), model)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError):
        # Not a file that timm knows: the list of mismatches tells more than its error would.
        return weights
    if _same(converted, weights):
        return weights
    logger.warning(
        "dat.model.pretrained='%s' was saved for another format or image size; timm converted it "
        "(position embeddings are interpolated).",
        path,
    )
    return converted


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        v.shape == second[k].shape for k, v in first.items()
    )


def _interpolated(
    weights: dict[str, Tensor], model: nn.Module, path: str | Path
) -> dict[str, Tensor]:
    """Weights with the position embeddings of a Hugging Face encoder for the model's image size."""
    result = dict(weights)
    for name, wanted in model.state_dict().items():
        found = weights.get(name)
        if not name.endswith("position_embeddings") or found is None:
            continue
        resized = resized_positions(found, wanted)
        if resized is not None:
            result[name] = resized
            logger.warning(
                "dat.model.pretrained='%s' was saved for another image size: %s is interpolated.",
                path,
                name,
            )
    return result


def resized_positions(found: Tensor, wanted: Tensor) -> Tensor | None:
    """Position embeddings of a square image, interpolated to another square image.

    Args:
        found: ``(1, class tokens + patches, width)``.
        wanted: Of the same width.

    Returns:
        Embeddings in the shape of ``wanted``; None where it has that shape already, or the numbers
        of patches are not squares.
    """
    is_other = found.shape != wanted.shape and found.ndim == wanted.ndim == 3
    if not is_other or found.shape[-1] != wanted.shape[-1]:
        return None
    for tokens in (1, 2, 0):  # ViT's, DeiT's, none
        old, new = _side(found, tokens), _side(wanted, tokens)
        if old and new:
            resized: Tensor = resample_abs_pos_embed(
                found, [new, new], [old, old], num_prefix_tokens=tokens
            )
            return resized
    return None


def _side(positions: Tensor, tokens: int) -> int:
    """Patches along a side of the square that they make up; 0 where they make up none."""
    patches = max(0, positions.shape[1] - tokens)
    side = math.isqrt(patches)
    return side if side * side == patches else 0


def _in_head(key: str, head: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{module}.") for module in head)


def _body_keys(state: Mapping[str, Tensor], head: tuple[str, ...]) -> set[str]:
    return {k for k in state if not _in_head(k, head) and not k.endswith("num_batches_tracked")}


def _fits(
    weights: Mapping[str, Tensor], target: Mapping[str, Tensor], head: tuple[str, ...]
) -> bool:
    """Whether everything outside of the classifier has its place."""
    keys = _body_keys(target, head)
    return keys == _body_keys(weights, head) and all(
        weights[k].shape == target[k].shape for k in keys
    )


def _refuse_misfit(
    weights: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    head: tuple[str, ...],
    path: str | Path,
) -> None:
    """Refuse a file of another network.

    Raises:
        ModelError: With the first misfits, and the nearest names.
    """
    theirs, ours = _body_keys(weights, head), _body_keys(target, head)
    shared = theirs & ours
    misshapen = sorted(k for k in shared if weights[k].shape != target[k].shape)
    if misshapen:
        problems = [
            f"{key}: shape {tuple(weights[key].shape)} in the file, "
            f"{tuple(target[key].shape)} in the model"
            for key in misshapen
        ]
        raise ModelError(
            f"dat.model.pretrained='{path}' does not fit the model; only the classifier "
            f"({', '.join(head)}) may have another shape:\n  " + _first(problems)
        )
    if 2 * len(shared) >= max(len(theirs), len(ours)):
        return
    problems = []
    for key in sorted(ours - theirs):
        near = difflib.get_close_matches(key, sorted(theirs - ours)[:1000], n=1, cutoff=0.3)
        problems.append(f"{key}: " + (f"the file has {near[0]}" if near else "nothing like it"))
        if len(problems) > _LISTED:
            break
    raise ModelError(
        f"dat.model.pretrained='{path}' does not fit the model: of the {len(ours)} tensors of the "
        f"model and the {len(theirs)} of the file, the classifier ({', '.join(head)}) left aside, "
        f"have a name in common: {len(shared)}. In the model, and nearest in the file:\n  "
        + _first(problems, len(ours - theirs))
    )


def _first(problems: list[str], count: int | None = None) -> str:
    count = len(problems) if count is None else count
    more = f"\n  ... and {count - _LISTED} more" if count > _LISTED else ""
    return "\n  ".join(problems[:_LISTED]) + more
