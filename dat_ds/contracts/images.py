"""Images: what an attack, a training step and an evaluation take.

Floating-point pixels in the threat model's range, one dimension for the samples. 16-bit floats are
computed with in float32; nothing else is converted, because integers and normalised values leave
open what a pixel is.

Shapes: ``B`` images; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dat_ds.errors import DataError

PIXEL_SLACK = 1e-6
"""Share of the pixel range by which rounding may move a pixel out of it."""

_NAMED = 5
_CHANNELS = (1, 3, 4)


def as_images(x: Tensor, model: object = None) -> Tensor:
    """Images in the precision that attacks compute in, by what can be told without their values.

    Args:
        x: Candidates.
        model: Who is to take them: a module takes float64 where that is what it is in.

    Returns:
        ``x`` in float32, in float64 where the model or, for other callables, ``x`` is; detached.

    Raises:
        DataError: For what is not a floating-point tensor with a dimension for the samples.
    """
    if not isinstance(x, Tensor):
        raise DataError(
            f"Images are a {type(x).__module__}.{type(x).__name__}: give a tensor of "
            "floating-point pixels in [0, 1], such as torch.from_numpy(x)."
        )
    if x.layout != torch.strided:
        raise DataError(f"Images are a {x.layout} tensor: give a dense one, as x.to_dense().")
    if not x.is_floating_point():
        raise DataError(
            f"Images are {x.dtype}: give floating-point pixels in [0, 1], as x.float() / 255."
        )
    if x.ndim < 2:
        raise DataError(f"Images have the shape {tuple(x.shape)}: give (B, C, H, W).")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(model, nn.Module):
        floats = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
        if floats:
            dtype = torch.float64 if set(floats) == {torch.float64} else torch.float32
    x = x.detach().to(dtype)
    return x.clone() if x.is_inference() else x  # autograd cannot keep inference tensors


def as_pictures(x: Tensor) -> Tensor:
    """:func:`as_images` for a model of pictures, which are ``(B, C, H, W)``.

    Raises:
        DataError: As there, and for other shapes, with the call that mends them.
    """
    x = as_images(x)
    hint = layout_hint(x)
    if x.ndim == 4 and not hint:
        return x
    if x.ndim == 3:
        hint = " (x.unsqueeze(1) for grey images, x.unsqueeze(0) for a single one)"
    raise DataError(f"Images have the shape {tuple(x.shape)}: give (B, C, H, W){hint}.")


def layout_hint(x: Tensor) -> str:
    """The call that mends images with their channels last; nothing for others."""
    if x.ndim == 4 and x.shape[1] not in _CHANNELS and x.shape[3] in _CHANNELS:
        return " (channels last: x.permute(0, 3, 1, 2))"
    return ""


def faulty_images(x: Tensor, lower: float, upper: float, slack: float = PIXEL_SLACK) -> Tensor:
    """Images with a pixel that is not finite or out of range ``(B,)``, without waiting.

    Args:
        x: Images ``(B, ...)``, floating point.
        lower: Smallest pixel value.
        upper: Largest pixel value.
        slack: What rounding may add, as a share of the range.
    """
    if not len(x):
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    slack *= upper - lower
    low, high = x.flatten(1).aminmax(dim=1)  # NaN where there is one
    return ~((low >= lower - slack) & (high <= upper + slack))


def describe_faulty(x: Tensor, lower: float, upper: float) -> str:
    """In words, what is wrong with images of which some are faulty; waits for the device."""
    finite = x.isfinite()
    if not bool(finite.all()):
        bad = (~finite.flatten(1)).any(dim=1).nonzero().flatten().tolist()
        which = f" ({_listed(bad, len(x))})" if len(x) > 1 else ""
        return f"Images hold NaN or infinite pixels{which}."
    low, high = float(x.min()), float(x.max())
    words = f"Images span [{low:g}, {high:g}], outside the pixel range [{lower:g}, {upper:g}]. "
    span = upper - lower
    if low >= lower and high > lower + 2 * span:
        return f"{words}They look like levels of 0 to 255: divide by 255."
    if low >= lower - 0.2 * span and high <= upper + 0.2 * span:
        return f"{words}They look like an overshoot of resizing or augmentation: clamp them."
    return (
        f"{words}Give raw pixels; normalisation belongs inside the model (dat.model.mean and "
        "dat.model.std, or dat_ds.models.Normalize)."
    )


def check_images(x: Tensor, lower: float, upper: float, slack: float = PIXEL_SLACK) -> None:
    """Refuse images with a pixel that is not finite or out of range; waits for the device.

    Raises:
        DataError: With what they look like.
    """
    faulty = faulty_images(x, lower, upper, slack)
    if bool(faulty.any()):
        raise DataError(describe_faulty(x[faulty] if x.isfinite().all() else x, lower, upper))


def _listed(indices: list[int], total: int) -> str:
    """``2 of 8 images: 0 and 5``, with at most five of them."""
    shown = ", ".join(str(i) for i in indices[:_NAMED])
    more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return f"{len(indices)} of {total}: {shown}{more}"
