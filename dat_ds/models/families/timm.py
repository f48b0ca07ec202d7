"""Networks of timm, by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from dat_ds.errors import ModelError

TIMM_OVERRIDES = (
    "patch_size",
    "depth",
    "embed_dim",
    "num_heads",
    "drop_rate",
    "drop_path_rate",
)


# What timm raises for values that a model does not take; it has no error class of its own.
_TIMM_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def build_timm(spec: Mapping[str, Any]) -> nn.Module:
    """Build a timm model with random weights."""
    _check_timm_name(spec["name"])
    body, rejected = _create_accepted(spec["name"], _arguments(spec))
    rejected.pop("img_size", None)
    if rejected:
        raise ModelError(
            f"dat.model.name='{spec['name']}' does not accept "
            + ", ".join(
                f"dat.model.{'options.' if key in spec['options'] else ''}{key}={value!r}"
                for key, value in rejected.items()
            )
            + ". Remove it, or choose an architecture that has it."
        )
    _check_patches(body, spec["name"])
    return body


def timm_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with which ``timm.create_model`` builds the network of a spec.

    Args:
        spec: ``PixelModel.spec`` of a timm model.

    Returns:
        Those that the model accepts, as JSON-serialisable values; ``num_classes`` and ``in_chans``
        among them.
    """
    arguments = _arguments(spec)
    _, rejected = _create_accepted(spec["name"], arguments)
    return {key: value for key, value in arguments.items() if key not in rejected}


def _arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("num_classes", "in_chans", "img_size", *TIMM_OVERRIDES)
    return {key: spec[key] for key in keys if spec[key] is not None} | dict(spec["options"])


def _check_timm_name(name: str) -> None:
    """Raise a ModelError with suggestions unless timm has a model of that name."""
    if timm.is_model(name):
        return
    close = [f"'{match}'" for match in difflib.get_close_matches(name, timm.list_models())]
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    raise ModelError(
        f"dat.model.name='{name}' is not a timm model{hint} "
        "Valid: any of timm.list_models() or 'hf:/path/to/model'."
    )


def _create_accepted(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model with the arguments that it accepts.

    What a model accepts is spread over its entry point, class and config, so the only reliable
    way to know is to try. The arguments are rejected before any weight is made.

    Returns:
        The model, and the arguments that it does not accept.
    """
    accepted, rejected = dict(arguments), dict[str, Any]()
    while True:
        try:
            return timm.create_model(name, pretrained=False, **accepted), rejected
        except _TIMM_ERRORS as error:
            refused = [key for key in _refused_keywords(error) if key in accepted]
            if not refused:
                raise _creation_error(name, accepted, error) from error
            rejected.update({key: accepted.pop(key) for key in refused})


def _refused_keywords(error: Exception) -> list[str]:
    """Names in Python's (and timm's) messages about arguments that cannot be given."""
    pattern = r"unexpected keyword argument.*|multiple values for keyword argument.*"
    found = re.search(pattern, str(error))
    return re.findall(r"'(\w+)'", found.group()) if found else []


def _creation_error(name: str, arguments: Mapping[str, Any], error: Exception) -> ModelError:
    """Turn what timm raised into a ModelError that names the keys to change."""
    values = [
        f"dat.model.{key}={arguments[key]}"
        for key in ("embed_dim", "num_heads")
        if key in arguments
    ]
    if values and "divisible by num_heads" in str(error):
        return ModelError(
            f"{' with '.join(values)}: the width of '{name}' must be a multiple of its number of "
            "attention heads. Set dat.model.num_heads to a divisor of dat.model.embed_dim."
        )
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    reason = (str(error) or type(error).__name__).rstrip(".")
    advice = ""
    if isinstance(arguments.get("img_size"), tuple):
        side = published_side(timm.get_pretrained_cfg(name))
        advice = f" If it takes square images only, write dat.data.img_size={side or 224}."
    return ModelError(
        f"dat.model.name='{name}' cannot be built by timm with {given}: {reason}.{advice}"
    )


def _check_patches(body: nn.Module, name: str) -> None:
    """Raise a ModelError if patches do not tile the image; timm would drop the remainder."""
    # The mixers have theirs in a stem, and fix its patch size.
    embed = getattr(body, "patch_embed", getattr(body, "stem", None))
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    padded = getattr(embed, "dynamic_img_pad", False)
    if padded or not isinstance(size, tuple) or not isinstance(patch, tuple):
        return
    if any(s % p for s, p in zip(size, patch, strict=True)):
        side = side_for_patches(size[0], max(patch))
        remedy = f"Write dat.data.img_size={side}."
        if hasattr(body, "patch_embed"):
            # The largest patch of which there are several; a pixel always fits.
            fits = (p for p in range(2, max(patch)) if not any(s % p for s in size))
            most = max((p for p in fits if 2 * p <= min(size)), default=1)
            remedy = (
                f"Set dat.model.patch_size to a divisor of the image size, such as {most}, or "
                f"write dat.data.img_size={side}."
            )
        raise ModelError(
            f"dat.model.patch_size={'x'.join(map(str, patch))} does not divide the image size "
            f"{'x'.join(map(str, size))} of dat.model.name='{name}'. {remedy}"
        )


def published_side(config: Any) -> int | None:
    """Side of the images that a network was published for, by timm's config of it."""
    size = getattr(config, "input_size", None)
    return None if size is None else int(size[-1])


def side_for_patches(pixels: int, patch: int) -> int:
    """Side of square images near ``pixels`` that patches tile."""
    return max(1, round(pixels / patch)) * patch


def timm_head_names(body: nn.Module) -> tuple[str, ...]:
    """Names of the classifier modules."""
    names = getattr(body, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
