"""From a processor's values to pixels and back.

Shapes: ``B`` batch; images ``(B, C, H, W)`` or ``(C, H, W)``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.errors import ConfigError
from dat_ds.models import Normalize

logger = logging.getLogger("dat_ds")

_MAX_PIXEL = 255
_SLACK = 1e-3  # of the pixel range: rounding of normalised float32 values, and more
_HALF_SLACK = 0.02  # of 16-bit values
_HOW_TO_SAY = (
    "Pass mean=[...] and std=[...] in pixel units to the callback (mean=[0, 0, 0], std=[1, 1, 1] "
    "where the data hold raw pixels in [0, 1]), or Trainer(processing_class=image_processor)."
)


def pixels_of(
    mean: Sequence[float] | None, std: Sequence[float] | None, processor: Any
) -> PixelScale:
    """The scale of the data: from the arguments, else from the image processor.

    Args:
        mean: Per channel, pixel units.
        std: Per channel, pixel units.
        processor: The Trainer's ``processing_class``.

    Raises:
        ConfigError: Where neither says.
    """
    if mean is not None and std is not None:
        return PixelScale(mean, std)
    processor = getattr(processor, "image_processor", processor)
    if processor is None:
        raise ConfigError(f"The scale of pixel_values is unknown. {_HOW_TO_SAY}")
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = [0.0], [1.0]
    if mean is None or std is None:
        raise ConfigError(
            f"{type(processor).__name__} has no image_mean and image_std. {_HOW_TO_SAY}"
        )
    mean, std = ([v] if isinstance(v, (int, float)) else list(v) for v in (mean, std))
    # value = (level * factor - offset - mean) / std for a level of 0 to 255.
    rescales = getattr(processor, "do_rescale", True)
    factor = float(getattr(processor, "rescale_factor", 1 / _MAX_PIXEL)) if rescales else 1.0
    offset = 1.0 if rescales and getattr(processor, "rescale_offset", False) else 0.0
    top = factor * _MAX_PIXEL
    top = 1.0 if abs(top - 1) < 1e-9 else top
    return PixelScale([(m + offset) / top for m in mean], [s / top for s in std])


class PixelScale:
    """Where pixels in [0, 1] lie among the values that the data hold.

    ``values = (pixels - mean) / std``, computed as :class:`dat_ds.models.Normalize` does.

    Args:
        mean: Per channel, pixel units; a single one serves all channels.
        std: Per channel, positive, pixel units.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise ConfigError(
                f"mean={list(mean)} and std={list(std)} must have one number per channel, and std "
                "positive ones."
            )
        self.mean, self.std = list(mean), list(std)
        self._normalize = Normalize(mean, std)

    def to_values(self, x: Tensor) -> Tensor:
        """Values of pixels ``x``, float32, differentiable."""
        values: Tensor = self._normalize_on(x.device)(x)
        return values

    def __str__(self) -> str:
        """How pixels follow from values, for messages."""
        return f"pixels are pixel_values * std + mean, with mean={self.mean} and std={self.std}"

    def to_pixels(self, values: Tensor) -> Tensor:
        """Pixels of ``values`` in float32, moved by the values' rounding."""
        normalize = self._normalize_on(values.device)
        shape = (-1, 1, 1)
        return values.float() * normalize.std.view(shape) + normalize.mean.view(shape)

    def _normalize_on(self, device: torch.device) -> Normalize:
        if self._normalize.mean.device != device:
            self._normalize.to(device)
        return self._normalize

    def check_kind(self, values: Tensor) -> None:
        """Refuse values that are not floating-point images of the scale's channels.

        Raises:
            ConfigError: With what was found.
        """
        if not values.is_floating_point():
            raise ConfigError(_integers(values.dtype))
        channels = values.shape[-3]
        if len(self.mean) not in (1, channels):
            raise ConfigError(
                f"pixel_values have {channels} channels, but mean={self.mean}: give one number per "
                "channel."
            )

    def check(self, values: Tensor, threat: ThreatModel) -> None:
        """Refuse values that no pixels of the threat model's range have; waits for the device.

        Raises:
            ConfigError: With what the values look like.
        """
        self.check_kind(values)
        pixels = self.to_pixels(values)
        low, high = float(pixels.min()), float(pixels.max())
        raw_low, raw_high = float(values.min()), float(values.max())
        slack = rounding_of(values.dtype) * (threat.upper - threat.lower)
        if not (low >= threat.lower - slack and high <= threat.upper + slack):
            raise ConfigError(
                f"pixel_values span [{raw_low:g}, {raw_high:g}]; with mean={self.mean} and "
                f"std={self.std} these are pixels in [{low:g}, {high:g}], outside of "
                f"[{threat.lower:g}, {threat.upper:g}]. {_looks_like(raw_low, raw_high)}"
            )
        if raw_low >= 0 and raw_high <= 1 and min(self.mean) > 0:
            logger.warning(
                "pixel_values span [%g, %g] without a negative number, which normalised images "
                "hardly do. Where they are raw pixels, pass mean=[0, 0, 0] and std=[1, 1, 1].",
                raw_low,
                raw_high,
            )


def _integers(dtype: torch.dtype) -> str:
    return (
        f"pixel_values are {dtype}: let the processor rescale and normalise them (do_rescale, "
        "do_normalize), or write x.float() / 255 in the data."
    )


def rounding_of(dtype: torch.dtype) -> float:
    """Share of the pixel range by which normalised values' rounding may move pixels."""
    return _SLACK if dtype in (torch.float32, torch.float64) else _HALF_SLACK


def _looks_like(low: float, high: float) -> str:
    if low >= 0 and high > 1:
        return "They look like levels of 0 to 255: let the processor rescale them."
    if low >= 0:
        return f"They look like raw pixels. {_HOW_TO_SAY}"
    return (
        f"They were normalised by other numbers, or an augmentation left the range. {_HOW_TO_SAY}"
    )


class Float32Collator:
    """Hands ``pixel_values`` over as the bits of their float32, which no one casts.

    Under DeepSpeed the Trainer casts every floating-point input to the training precision; bfloat16
    pixels near 1 lie 0.0039 apart, further than an attack's steps.

    Args:
        collate: The data loader's own collator.
    """

    is_wrapped = True

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        """A batch with ``pixel_values`` as int32, where they were float32."""
        batch = self.collate(samples)
        values = batch.get("pixel_values")
        if values is not None and values.dtype == torch.float32:
            batch["pixel_values"] = values.view(torch.int32)
        elif values is not None and not values.is_floating_point():
            raise ConfigError(_integers(values.dtype))
        return batch


def unpacked(values: Tensor) -> Tensor:
    """Undo :class:`Float32Collator`, which leaves 16-bit values alone."""
    return values.view(torch.float32) if values.dtype == torch.int32 else values
