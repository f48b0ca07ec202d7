"""Normalisation inside the model, so that every attack and every epsilon lives in pixel space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _per_channel(values: Sequence[float]) -> Tensor:
    """``values`` as a float32 tensor of shape (1, C, 1, 1)."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel, in float32.

    Args:
        mean: C values in pixel units, i.e. for pixels in [0, 1].
        std: C positive values in pixel units.

    Attributes:
        mean: float32 buffer of shape (1, C, 1, 1).
        std: float32 buffer of shape (1, C, 1, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._values = (tuple(mean), tuple(std))
        self.register_buffer("mean", _per_channel(mean))
        self.register_buffer("std", _per_channel(std))

    def restore(self) -> None:
        """Set both buffers to their exact float32 values again, on the device they are on."""
        mean, std = self._values
        self.mean = _per_channel(mean).to(self.mean.device)
        self.std = _per_channel(std).to(self.std.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        # module.bfloat16() and the like, which DeepSpeed calls on the whole model, cast buffers
        # too, and casting back does not undo the rounding. All of them, .to(device) included,
        # come through here.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self.restore()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch.

        Args:
            x: Pixels in [0, 1], any floating dtype, shape (B, C, H, W).

        Returns:
            float32 (float64 if x is float64), shape (B, C, H, W).
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x - self.mean) / self.std


class PixelModel(nn.Module):
    """A classifier of pixels: normalise in float32, cast, call the body.

    The cast to the body's dtype comes after normalisation and inside the model because bfloat16
    values near 1 are 0.0039 apart: pixels rounded to bfloat16 would leave the epsilon ball.
    Under ``torch.autocast`` the parameters, and so the body's input, stay float32.

    Only ``body.__call__`` is used and parameters are asked for their dtype alone, so the model runs
    under ZeRO-3, where a parameter has no elements outside of its own module's call.

    Args:
        body: Maps normalised images (B, C, H, W) to logits (B, num_classes).
        num_classes: Number of classes K.
        mean: C values in pixel units.
        std: C positive values in pixel units.
        spec: Arguments that the model was built with, JSON-serialisable, for saving and reloading.

    Attributes:
        body: The network.
        num_classes: Number of classes K.
        spec: A copy of the argument.
    """

    body: nn.Module

    def __init__(
        self,
        body: nn.Module,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        spec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.body = body
        self.num_classes = num_classes
        self.spec: dict[str, Any] = dict(spec or {})

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            x: Pixels in [0, 1], float32, shape (B, C, H, W).

        Returns:
            Logits in the dtype of the body's output, shape (B, num_classes).
        """
        normalized = self.normalize(x)
        logits: Tensor = self.body(normalized.to(self._body_dtype()))
        return logits

    @property
    def casts_input(self) -> bool:
        """Whether everything behind the normalisation computes in the body's dtype."""
        dtype = self._body_dtype()
        return all(b.dtype == dtype for b in self.body.buffers() if b.is_floating_point())

    def _body_dtype(self) -> torch.dtype:
        """Dtype of the body's first floating-point parameter, else float32."""
        dtypes = (p.dtype for p in self.body.parameters() if p.dtype.is_floating_point)
        return next(dtypes, torch.float32)
