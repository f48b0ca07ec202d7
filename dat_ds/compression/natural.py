"""Natural compression: powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.compression.base import Codec
from dat_ds.compression.packing import pack, random_bits, unpack

_HALF_MANTISSA = 2**22 + 2**6


_LARGEST_EXPONENT = 254  # of 2 ** 127


@dataclass(frozen=True, kw_only=True)
class Natural(Codec):
    """Natural compression (Horvath et al., MSML 2022, section 2, arXiv 1905.10988): 9 bits.

    ``t`` is rounded at random to one of the two powers of two around it; sign and exponent travel.
    Unbiased, ``w = 1 / 8`` (their Theorem 1). Entries above ``2^127`` become ``2^127``.
    """

    paper: ClassVar[str] = "Horvath et al., MSML 2022, arXiv 1905.10988, sec. 2"
    name = "natural"
    unbiased = True

    def parts_of(self, numel: int) -> tuple[int, ...]:
        """``m`` and ``ceil(m / 8)``."""
        return numel, -(-numel // 8)

    def variance_bound(self, numel: int) -> float:
        """``1 / 8``."""
        return 1 / 8

    def _encode(
        self, rows: Tensor, generator: torch.Generator | None, valid: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The exponents, then the signs."""
        bits = rows.contiguous().view(torch.int32)
        # A carry out of the mantissa, of probability mantissa / 2^23, moves up to the next power.
        # Noise of 16 bits is spread over the mantissa's 23. Widened first: added as it is, it would
        # be converted much more slowly.
        noise = random_bits(rows, torch.int16, generator).to(torch.int32)
        carried = noise.mul_(128).add_(_HALF_MANTISSA).add_(bits)
        # Byte by byte, which takes the exponent and leaves the sign: 2^127 is not carried over, and
        # what is not finite, whose carry may have gone into the sign, stays.
        up = carried.bitwise_right_shift_(23).to(torch.uint8).clamp_(max=_LARGEST_EXPONENT)
        shifted = torch.bitwise_right_shift(bits, 23, out=carried)
        exponent = torch.maximum(up, shifted.to(torch.uint8))
        negative = shifted.bitwise_right_shift_(8).neg_().to(torch.uint8)
        return exponent, pack(negative, 1)

    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Powers of two with their signs; infinite where the entry was not finite."""
        exponent, negative = parts
        sign = unpack(negative, 1, out.shape[1]).to(torch.int16).bitwise_left_shift_(15)
        upper = exponent.to(torch.int16).bitwise_left_shift_(7).bitwise_or_(sign)
        out.copy_(upper.view(torch.bfloat16))  # the upper half of a float32
