"""Build a pixel classifier from a timm name or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.layers import set_reentrant_ckpt
from torch import nn

from dat_ds.errors import ModelError
from dat_ds.kinds import Checkpointing, Head
from dat_ds.models.families import huggingface
from dat_ds.models.families.huggingface import build_huggingface
from dat_ds.models.families.projection import use_projection_head
from dat_ds.models.families.stem import use_cifar_stem
from dat_ds.models.families.timm import TIMM_OVERRIDES, build_timm, timm_head_names
from dat_ds.models.normalize import PixelModel
from dat_ds.models.pretrained import PUBLISHED, Statistics, load_pretrained
from dat_ds.models.saved import SPEC_NAME, WEIGHTS_NAME, find_saved, read_spec

logger = logging.getLogger("dat_ds")
_HEADS = get_args(Head)
_CHECKPOINTING_KINDS = get_args(Checkpointing)
_STEMS = ("default", "cifar")
# Keyword arguments and config fields that would defeat the arguments of build_model.
_RESERVED = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "dtype",
        "features_only",
        "image_size",
        "img_size",
        "in_chans",
        "num_channels",
        "num_classes",
        "num_labels",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)


def build_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    stem: Literal["default", "cifar"] = "default",
    head: Head = "classes",
    pretrained: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    activation_checkpointing: Checkpointing = "none",
    seed: int | None = None,
) -> PixelModel:
    """Build a classifier that takes pixels in [0, 1].

    None leaves the architecture's own value. The overrides from ``patch_size`` to
    ``drop_path_rate`` are for timm; the fields of a Hugging Face config are set with ``options``.

    Args:
        name: A timm model name, or 'hf:' and a local folder (or hub id) of a Hugging Face image
            classifier.
        num_classes: Number of outputs K; 0 for the features themselves.
        in_chans: Number of image channels C.
        mean: C values in pixel units; None takes the ones saved with ``pretrained`` or in its
            file, else those published with the model if they are for C channels (timm: 3), else
            0.5.
        std: C positive values in pixel units; None as for ``mean``.
        img_size: Height and width of the images in pixels, one number if square. Models that
            take any size, such as CNNs, do not have this argument and it is dropped for them.
        patch_size: Side of a patch in pixels.
        depth: Number of blocks.
        embed_dim: Width of the tokens.
        num_heads: Number of attention heads, a divisor of the width.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Largest stochastic-depth probability.
        stem: 'cifar' replaces the stem of a ResNet, for images of 32 pixels and less.
        head: Kind of outputs. 'projection' puts two layers in the place of the classifier;
            the others tell whether the classifier of a saved model serves the same purpose.
        pretrained: A local checkpoint file, or 'timm', see ``load_pretrained``; or a saved model
            of ours, see ``dat_ds.models.load``, whose head is taken over if it has the same purpose
            and, where both are known, the same classes in the same order.
        class_names: Names of the classes in the order of the outputs, where they are known.
        options: Further keyword arguments of the timm model, or fields of the Hugging Face
            config; JSON-serialisable.
        activation_checkpointing: Recompute activations in the backward pass. 'reentrant' works
            with ``backward()`` only: ``torch.autograd.grad`` raises. timm models checkpoint in both
            modes, Hugging Face models in training mode only.
        seed: If given, the weights depend on it alone (the same on every rank) and the global
            random state is left as it was.

    Returns:
        The model in training mode, float32; its ``spec`` holds the arguments, with ``mean`` and
        ``std`` filled in.

    Raises:
        ModelError: An argument does not fit the model, or files are missing or do not match.
    """
    spec: dict[str, Any] = {
        "name": name,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "img_size": img_size,
        "patch_size": patch_size,
        "depth": depth,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "stem": stem,
        "head": head,
        "pretrained": None if pretrained is None else str(pretrained),
        "options": dict(options or {}),
        "activation_checkpointing": activation_checkpointing,
        "seed": seed,
    }
    _check_choices(spec)
    if class_names is not None:
        # For an evaluation on data whose classes stand in another order.
        spec["class_names"] = list(class_names)
    saved = _saved_folder(spec["pretrained"])
    saved_spec = {} if saved is None else read_spec(saved / SPEC_NAME)
    with contextlib.nullcontext() if seed is None else _seeded(seed):
        body, in_file = _build_body(spec, saved, saved_spec)
    if isinstance(body, huggingface.HuggingFaceBody):
        spec["hf_config"] = body.config_dict()
    if activation_checkpointing != "none":
        _enable_checkpointing(body, activation_checkpointing == "reentrant", name)
    if mean is None or std is None:
        default_mean, default_std = _default_statistics(body, name, in_chans, saved_spec, in_file)
        mean, std = mean or default_mean, std or default_std
    elif in_file is not None:
        _warn_of_other_statistics(spec["pretrained"], (mean, std), in_file)
    spec["mean"] = _checked("mean", mean, in_chans)
    spec["std"] = _checked("std", std, in_chans)
    return PixelModel(
        body, num_classes=num_classes, mean=spec["mean"], std=spec["std"], spec=spec
    ).train()


def _check_choices(spec: Mapping[str, Any]) -> None:
    """Raise a ModelError that lists every value which is invalid for any model."""
    problems = []
    for key, valid in (
        ("stem", _STEMS),
        ("head", _HEADS),
        ("activation_checkpointing", _CHECKPOINTING_KINDS),
    ):
        if spec[key] not in valid:
            choices = ", ".join(f"'{choice}'" for choice in valid)
            problems.append(f"dat.model.{key}='{spec[key]}' is unknown. Valid: {choices}.")
    # A Hugging Face config has fields of the same names, which only options can set.
    reserved = (
        _RESERVED if huggingface.is_hugging_face(spec["name"]) else _RESERVED.union(TIMM_OVERRIDES)
    )
    problems += [
        f"dat.model.options.{key} is not allowed: it is set by the data or by a key of dat.model."
        for key in sorted(reserved.intersection(spec["options"]))
    ]
    try:
        json.dumps(spec["options"])
    except (TypeError, ValueError) as error:
        problems.append(f"dat.model.options must be plain JSON data: {error}.")
    if problems:
        raise ModelError("\n".join(problems))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed`` on the CPU, without touching any global random state."""
    # torch.manual_seed would reseed the CUDA generators as well; initialising on the CPU needs
    # none of them and gives the same weights on every machine.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _saved_folder(pretrained: str | None) -> Path | None:
    """Folder of the saved model of ours that ``pretrained`` names, if it does."""
    if pretrained is None or pretrained == PUBLISHED:
        return None
    path = Path(pretrained).expanduser()
    is_ours = path.name == WEIGHTS_NAME and path.with_name(SPEC_NAME).is_file()
    return find_saved(path) if path.is_dir() or is_ours else None


def _build_body(
    spec: Mapping[str, Any], saved: Path | None, saved_spec: Mapping[str, Any]
) -> tuple[nn.Module, Statistics | None]:
    """Build the network without normalisation: architecture, stem, head, weights.

    Returns:
        The network, and the normalisation that a file of weights was trained with, if it says.
    """
    name: str = spec["name"]
    body = build_huggingface(spec) if huggingface.is_hugging_face(name) else build_timm(spec)
    if spec["stem"] == "cifar":
        use_cifar_stem(body, name)
    network, classifier = body, timm_head_names(body)
    if isinstance(body, huggingface.HuggingFaceBody):
        network, classifier = body.model, body.head_names()
    if spec["head"] == "projection":
        use_projection_head(network, classifier, name)
    in_file = None
    if spec["pretrained"] is not None:
        file = spec["pretrained"] if saved is None else saved / WEIGHTS_NAME
        skips_head = bool(saved_spec) and not _has_the_head(saved_spec, spec)
        in_file = load_pretrained(network, file, classifier, skips_head=skips_head)
    return body, None if saved_spec else in_file


def first_difference(there: Sequence[str] | None, here: Sequence[str] | None) -> str | None:
    """The first class whose name differs, in words; None where none does, or names are unknown."""
    if not there or not here:
        return None
    pairs = enumerate(zip_longest(there, here, fillvalue="none"))
    words = (f"class {i} is {a!r} there and {b!r} here" for i, (a, b) in pairs if a != b)
    return next(words, None)


def _has_the_head(saved: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    """Whether the head of a saved model does what that of a spec is to do."""
    if saved.get("head", "classes") != spec["head"]:
        return False
    other = first_difference(saved.get("class_names"), spec.get("class_names"))
    if other is not None:
        logger.warning(
            "dat.model.pretrained='%s': its classifier is not taken over, since it is of other "
            "classes: %s.",
            spec["pretrained"],
            other,
        )
    return other is None


def _enable_checkpointing(body: nn.Module, reentrant: bool, name: str) -> None:
    """Switch on activation checkpointing, or raise a ModelError if the model has none."""
    try:
        if isinstance(body, huggingface.HuggingFaceBody):
            body.enable_checkpointing(reentrant)
            return
        set_grad_checkpointing: Any = body.set_grad_checkpointing
        set_grad_checkpointing(True)
    except (AssertionError, AttributeError, ValueError) as error:
        raise ModelError(
            f"dat.model.activation_checkpointing: dat.model.name='{name}' does not support it. "
            "Set dat.model.activation_checkpointing='none'."
        ) from error
    # timm keeps the kind in a global that it reads in forward, so that of the model built last
    # would hold for all. Setting it on every call makes it this model's own.
    body.register_forward_pre_hook(functools.partial(_select_kind, reentrant))


def _select_kind(reentrant: bool, module: nn.Module, args: tuple[Any, ...]) -> None:
    set_reentrant_ckpt(reentrant)


def _default_statistics(
    body: nn.Module,
    name: str,
    in_chans: int,
    saved_spec: Mapping[str, Any],
    in_file: Statistics | None,
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation saved or published with the model, else 0.5."""
    published: tuple[Sequence[float], Sequence[float]] | None
    if saved_spec:
        published = (saved_spec["mean"], saved_spec["std"])
    elif in_file is not None:
        published = in_file
    elif isinstance(body, huggingface.HuggingFaceBody):
        published = huggingface.read_mean_std(huggingface.location_of(name))
    else:
        config = getattr(body, "pretrained_cfg", {})
        published = (config.get("mean", ()), config.get("std", ()))
    if published is not None and len(published[0]) == len(published[1]) == in_chans:
        return published
    logger.info("dat.model.name='%s' comes with no mean and std for its channels: 0.5.", name)
    return [0.5] * in_chans, [0.5] * in_chans


def _warn_of_other_statistics(
    pretrained: str, given: tuple[Sequence[float], Sequence[float]], in_file: Statistics
) -> None:
    for key, own, other in zip(("mean", "std"), given, in_file, strict=True):
        if len(own) != len(other) or any(
            abs(a - b) > 1e-3 for a, b in zip(own, other, strict=True)
        ):
            logger.warning(
                "dat.model.%s=%s, but the network of dat.model.pretrained='%s' was trained with "
                "%s: leave it out to take that.",
                key,
                [round(value, 4) for value in own],
                pretrained,
                [round(value, 4) for value in other],
            )


def _checked(key: str, values: Sequence[float], in_chans: int) -> list[float]:
    """``values`` as floats; raise a ModelError unless there is one valid value per channel."""
    result = [float(value) for value in values]
    if len(result) != in_chans:
        raise ModelError(
            f"dat.model.{key}={result} has {len(result)} values for images of {in_chans} "
            f"channel(s). Give one value per channel."
        )
    if key == "std" and min(result) <= 0:
        raise ModelError(f"dat.model.std={result} must be positive.")
    return result
