"""Hugging Face image classifiers as plain modules from images to logits.

transformers takes seconds to import, so it is imported only when such a model is asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dat_ds.errors import ModelError
from dat_ds.models.families import huggingface
from dat_ds.models.families.timm import TIMM_OVERRIDES, side_for_patches
from dat_ds.models.pretrained import resized_positions

logger = logging.getLogger("dat_ds")
_PREFIX = "hf:"
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Position embeddings of a square, which the model itself interpolates to the image it is given.
_INTERPOLATING = frozenset({"dinov2", "dinov2_with_registers"})


def is_hugging_face(name: str) -> bool:
    """Whether a model name stands for a Hugging Face model."""
    return name.startswith(_PREFIX)


def location_of(name: str) -> str:
    """Folder or hub id in a model name, with '~' expanded."""
    return str(Path(name.removeprefix(_PREFIX)).expanduser())


class HuggingFaceBody(nn.Module):
    """Adapter that calls a Hugging Face image classifier and returns its logits tensor.

    Args:
        model: The image classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits

    def head_names(self) -> tuple[str, ...]:
        """Names of the top modules of ``model`` that are not its backbone."""
        backbone = getattr(self.model, "base_model_prefix", "")
        return tuple(name for name, _ in self.model.named_children() if name != backbone)

    def config_dict(self) -> dict[str, Any]:
        """Full model config as JSON-serialisable data."""
        config: Any = self.model.config
        data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return data

    def enable_checkpointing(self, reentrant: bool) -> None:
        """Switch on activation checkpointing, which Hugging Face does in training mode only.

        Raises:
            ValueError: The model does not support it.
        """
        model: Any = self.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(model).__name__} does not support gradient checkpointing")
        # The second name is deprecated from transformers 5 on.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSource:
    """Where a model comes from and what is to be changed about it."""

    location: str
    """A local folder, or the id of a model on the Hugging Face hub."""
    num_classes: int
    """Number of classes K; a head of another size is replaced by a fresh one."""
    in_chans: int
    """Number of image channels."""
    img_size: int | tuple[int, int] | None
    """Height and width in pixels, one number if square, None for the config's own."""
    options: Mapping[str, Any]
    """Fields of the model's config to overwrite."""

    @property
    def label(self) -> str:
        """How error messages name the model."""
        return f"dat.model.name='{_PREFIX}{self.location}'"


def build_body(source: HuggingFaceSource) -> HuggingFaceBody:
    """Build an image classifier, with its weights where there are any.

    A folder with a ``config.json`` and no weights gives a model with random weights; a log message
    says so. With ``torch.device("meta")`` none are read.

    Args:
        source: Model to build.

    Returns:
        The model in training mode, float32, on the CPU.

    Raises:
        ModelError: The folder or its config is missing, the model is not an image classifier, an
            option is not a field of its config, or something other than the head does not match.
    """
    import transformers

    is_empty = torch.get_default_device().type == "meta"
    has_weights = _check_location(source) and not is_empty
    config = _adapted_config(source)
    auto = transformers.AutoModelForImageClassification
    try:
        if has_weights:
            model, report = auto.from_pretrained(
                source.location,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        else:
            if not is_empty:
                logger.warning("%s has no weights: its config is built from scratch.", source.label)
            model, report = auto.from_config(config), {}
    except (OSError, TypeError, ValueError, ImportError) as error:
        # What comes of dividing a height and width as if they were one number.
        if isinstance(source.img_size, tuple) and "'list' and 'int'" in str(error):
            raise _only_square(source, source.img_size) from error
        raise _not_usable(source, error) from error
    body = HuggingFaceBody(model)
    if has_weights:
        _check_report(source, body, _with_positions(source, model, report))
    return body.float().train()


def body_from_config(config_dict: Mapping[str, Any]) -> HuggingFaceBody:
    """Build a float32 image classifier with random weights from what ``config_dict()`` returned.

    Raises:
        ModelError: This version of transformers does not know the model.
    """
    import transformers

    fields = dict(config_dict)
    try:
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = transformers.AutoModelForImageClassification.from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"The saved Hugging Face config cannot be rebuilt by transformers "
            f"{transformers.__version__}: {error}"
        ) from error
    # A config may ask for 16-bit weights.
    return HuggingFaceBody(model).float()


def read_mean_std(location: str) -> tuple[list[float], list[float]] | None:
    """Read the normalisation from ``preprocessor_config.json``.

    Args:
        location: A local folder or a hub id.

    Returns:
        Mean and standard deviation per channel for pixels in [0, 1], or None if there is no such
        file or it does not say.
    """
    import transformers.utils

    try:
        file = transformers.utils.cached_file(location, "preprocessor_config.json")
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    mean, std = data.get("image_mean"), data.get("image_std")
    if not isinstance(mean, list) or not isinstance(std, list):
        return None
    if not data.get("do_normalize", True):
        return [0.0] * len(mean), [1.0] * len(std)
    return mean, std


def _check_location(source: HuggingFaceSource) -> bool:
    """Whether there are weights to load; a hub id is taken to have some."""
    folder = Path(source.location)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{source.label}: the folder has no config.json. Write one with "
                "model.save_pretrained(folder)."
            )
        return any((folder / name).is_file() for name in _WEIGHT_FILES)
    if source.location.startswith((".", "/")) or source.location.count("/") > 1:
        raise ModelError(f"{source.label}: there is no folder '{folder}'.")
    return True


def _not_usable(source: HuggingFaceSource, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    return ModelError(
        f"{source.label} cannot be used as an image classifier: {reason} "
        "Give 'hf:' and a folder written by save_pretrained() of a model that "
        "AutoModelForImageClassification knows, for example a ViTForImageClassification."
    )


def _only_square(source: HuggingFaceSource, size: tuple[int, int]) -> ModelError:
    height, width = size
    return ModelError(
        f"{source.label} takes square images only, but those of the data have {height} x {width} "
        f"pixels: write dat.data.img_size={own_side(source.location)}, or choose another model."
    )


def own_side(location: str) -> int | None:
    """Side of the images in the config of a local folder or hub id, None where it has none."""
    import transformers

    size = getattr(_vision(transformers.AutoConfig.from_pretrained(location)), "image_size", None)
    return max(size) if isinstance(size, (list, tuple)) else size


def _vision(config: Any) -> Any:
    """The part of a config that has the image size; beside a text encoder it is one level down."""
    return config if hasattr(config, "image_size") else getattr(config, "vision_config", config)


def _adapted_config(source: HuggingFaceSource) -> Any:
    """Read the model's config and put the number of classes, channels and pixels into it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source.location)
    except (OSError, ValueError, KeyError) as error:
        raise _not_usable(source, error) from error
    unknown = [key for key in source.options if not hasattr(config, key)]
    if unknown:
        keys = ", ".join(f"dat.model.options.{key}" for key in unknown)
        raise ModelError(
            f"{keys}: not a field of {type(config).__name__}, the config of {source.label}. "
            "Valid are the keys of its config.json."
        )
    for key, value in source.options.items():
        setattr(config, key, value)
    config.num_labels = source.num_classes
    if hasattr(config, "num_channels"):
        config.num_channels = source.in_chans
    elif source.in_chans != 3:
        raise ModelError(f"dat.model.in_chans={source.in_chans}: {source.label} takes 3 channels.")
    _set_image_size(source, config)
    return config


def _set_image_size(source: HuggingFaceSource, config: Any) -> None:
    """Set the image size where the config has one, after checking it against the patch size."""
    size, vision = source.img_size, _vision(config)
    if size is None or not hasattr(vision, "image_size"):
        return
    height, width = (size, size) if isinstance(size, int) else size
    patch = getattr(vision, "patch_size", None)
    if isinstance(patch, int) and (height % patch or width % patch):
        raise ModelError(
            f"dat.model.img_size={height}x{width} is not a multiple of the patch size {patch} of "
            f"{source.label}. Resize the images, for example with "
            f"dat.data.img_size={side_for_patches(height, patch)}."
        )
    if height != width and config.model_type in _INTERPOLATING:
        return
    is_one_number = height == width and not isinstance(vision.image_size, (list, tuple))
    vision.image_size = height if is_one_number else [height, width]


@torch.no_grad()
def _with_positions(
    source: HuggingFaceSource, model: nn.Module, report: Mapping[str, Any]
) -> dict[str, Any]:
    """What transformers reported, after interpolating position embeddings of another image size."""
    mismatched = {item[0] for item in report["mismatched_keys"]}
    resized = {name for name in mismatched if name.endswith("position_embeddings")}
    stored = _stored(source, resized)
    for name in sorted(resized):
        wanted = model.get_parameter(name)
        found = resized_positions(stored[name].float(), wanted) if name in stored else None
        if found is None:
            continue
        wanted.copy_(found)
        mismatched.remove(name)
        logger.warning("%s: %s is interpolated for another image size.", source.label, name)
    left = [item for item in report["mismatched_keys"] if item[0] in mismatched]
    return {**report, "mismatched_keys": left}


def _stored(source: HuggingFaceSource, names: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a local folder, by name; those that are not found are left out."""
    stored: dict[str, Tensor] = {}
    for file in sorted(Path(source.location).glob("*.safetensors")) if names else ():
        with safe_open(file, "pt") as tensors:
            stored |= {n: tensors.get_tensor(n) for n in names if n in tensors.keys()}  # noqa: SIM118
    return stored


def _check_report(
    source: HuggingFaceSource, body: HuggingFaceBody, report: Mapping[str, Any]
) -> None:
    """Raise if weights outside of the head are fresh, warn if those of the head are."""
    mismatched = {item[0] for item in report["mismatched_keys"]}
    fresh = sorted(mismatched | set(report["missing_keys"]))
    heads = tuple(f"{name}." for name in body.head_names())
    others = [key for key in fresh if not key.startswith(heads)]
    if others:
        side = own_side(source.location)
        of_its_own = f" (dat.data.img_size={side})" if side else ""
        raise ModelError(
            f"{source.label}: only the classifier may differ from the stored weights, but these "
            f"are missing or of another shape: {', '.join(others)}. The image size{of_its_own}, "
            "the channels and dat.model.options must be those of the stored model; build one from "
            "its config.json alone to train it from scratch."
        )
    if fresh:
        logger.warning(
            "%s: the classifier does not have the shape of this model's; freshly initialised "
            "instead: %s",
            source.label,
            ", ".join(fresh),
        )


def build_huggingface(spec: Mapping[str, Any]) -> huggingface.HuggingFaceBody:
    """Build a Hugging Face model; the timm overrides are errors."""
    given = [f"dat.model.{key}={spec[key]}" for key in TIMM_OVERRIDES if spec[key] is not None]
    if given:
        raise ModelError(
            f"{', '.join(given)}: not for the Hugging Face model dat.model.name='{spec['name']}'. "
            "Set the fields of its config with dat.model.options, "
            "for example {'num_hidden_layers': 6}."
        )
    return huggingface.build_body(
        huggingface.HuggingFaceSource(
            location=huggingface.location_of(spec["name"]),
            num_classes=spec["num_classes"],
            in_chans=spec["in_chans"],
            img_size=spec["img_size"],
            options=spec["options"],
        )
    )
