"""Codes to bytes and back, and the numbers that codecs share."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


HUGE = torch.finfo(torch.float32).max * (1 - 2**-23)  # what rounds back to at most the largest


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes


def l2_norm(blocks: Tensor, peak: Tensor, divisor: Tensor | float = 1.0) -> Tensor:
    """l2 norm of each block over ``divisor``, whose squares neither overflow nor vanish."""
    peak = peak.clamp(min=TINY)
    relative = torch.linalg.vector_norm(blocks / peak.unsqueeze(2), dim=2)
    norm: Tensor = peak * (relative / divisor)
    return norm


def random_bits(like: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Random bits in the shape of ``like``, drawn as 64-bit words, which is much faster."""
    words = -(-like.numel() * dtype.itemsize // 8)
    bits = torch.empty(words, dtype=torch.int64, device=like.device)
    bits.random_(-(2**63), None, generator=generator)
    return bits.view(dtype)[: like.numel()].view(like.shape)


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack codes of 1, 2 or 4 bits into bytes, the first into the lowest bits.

    Args:
        codes: ``(n, m)`` uint8 below ``2^width``.
        width: Bits of a code.

    Returns:
        ``(n, ceil(m width / 8))`` uint8.
    """
    lanes = 8 // width
    missing = -codes.shape[1] % lanes
    codes = F.pad(codes, (0, missing)) if missing else codes
    # The codes of one byte lie in one integer, a byte apart. This product has them side by side in
    # its highest byte; no two codes meet in the bits below, so nothing is carried into it.
    together = codes.reshape(-1).view(_INTEGERS[lanes]).view(len(codes), -1)
    highest = 8 * (lanes - 1)
    factor = sum(2 ** (highest - (8 - width) * lane) for lane in range(lanes))
    return together.mul(factor).bitwise_right_shift_(highest).to(torch.uint8)


def unpack(packed: Tensor, width: int, numel: int) -> Tensor:
    """The first ``numel`` codes of each row of what :func:`pack` made; ``(n, numel)`` uint8."""
    table = _codes_of_bytes(width, packed.device)
    together = table.index_select(0, packed.reshape(-1).to(torch.int32))
    return together.view(torch.uint8).view(len(packed), -1)[:, :numel]


@functools.cache
def _codes_of_bytes(width: int, device: torch.device) -> Tensor:
    """The codes that each of the 256 bytes holds, as one integer: ``(256,)``."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=device)
    every = torch.arange(256, dtype=torch.uint8, device=device)
    codes = (every.unsqueeze(1) >> shifts).bitwise_and_(2**width - 1)
    return codes.view(_INTEGERS[8 // width]).squeeze(1)


def as_bytes(values: Tensor) -> Tensor:
    """``(n, k)`` of any dtype as ``(n, bytes)`` uint8."""
    return values.contiguous().view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of each row as values; a copy, as bytes anywhere in a row are not aligned for them."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)
