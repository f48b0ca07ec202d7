"""int8 after a randomised Hadamard rotation of every block.

Suresh et al., ICML 2017, arXiv 1611.00429, sec. 3: rounding errs by the step, which follows the
largest entry of a block; a rotation by ``H D``, with ``D`` random signs and ``H`` Walsh's and
Hadamard's matrix over ``sqrt(B)``, spreads a large entry over the whole block.

Shapes: ``n`` rows of ``m`` entries; blocks of ``B`` entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.compression.packing import HUGE
from dat_ds.compression.rounding import Int8
from dat_ds.method import option

_SIGNS_SEED = 20170611


@dataclass(frozen=True, kw_only=True)
class HadamardInt8(Int8):
    """``int8`` of blocks that were rotated by random signs and a Hadamard matrix.

    Unbiased, and within the variance bound of ``int8``: the rotation keeps lengths. For tensors
    with a few large entries the error is smaller by up to the square root of the block's size; for
    blocks of alike entries it is the same. The signs are the same for every block and step. A last
    block that is shorter is not rotated.
    """

    name: ClassVar[str] = "int8_hadamard"
    paper: ClassVar[str] = "Suresh et al., ICML 2017, arXiv 1611.00429, sec. 3"
    block_size: int = option(
        64, "a power of two, at least 1", lambda v: v >= 1 and math.log2(v).is_integer()
    )
    """Entries that are rotated together and share a scale."""

    def _encode(
        self, rows: Tensor, generator: torch.Generator | None, valid: Tensor | None
    ) -> tuple[Tensor, ...]:
        size = self.block_of(rows.shape[1])
        whole = rows.shape[1] // size * size
        turned = rows.clone()
        if size == self.block_size and whole:
            blocks = turned[:, :whole].view(len(rows), -1, size)
            # Over B and not its root, so that no entry grows; the way back makes up for it.
            turned[:, :whole] = _hadamard(blocks * _signs(size, rows.device) / size).flatten(1)
        return super()._encode(turned, generator, valid)

    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Levels times steps, rotated back."""
        super()._decode(parts, out)
        size = self.block_of(out.shape[1])
        whole = out.shape[1] // size * size
        if size == self.block_size and whole:
            blocks = out[:, :whole].reshape(len(out), -1, size)
            back = _hadamard(blocks) * _signs(size, out.device)
            out[:, :whole] = back.clamp_(-HUGE, HUGE).flatten(1)


def _hadamard(blocks: Tensor) -> Tensor:
    """``blocks`` ``(..., B)`` times the matrix of ones and minus ones, by butterflies.

    Sums in a fixed order: every rank and every number of rows gives the same bits.
    """
    size, half = blocks.shape[-1], 1
    while half < size:
        pairs = blocks.reshape(*blocks.shape[:-1], -1, 2, half)
        left, right = pairs.unbind(-2)
        blocks = torch.stack([left + right, left - right], dim=-2).flatten(-3)
        half *= 2
    return blocks


@functools.cache
def _signs(size: int, device: torch.device) -> Tensor:
    """Random signs ``(B,)``, the same in every process."""
    generator = torch.Generator().manual_seed(_SIGNS_SEED)
    return (2 * torch.randint(2, (size,), generator=generator) - 1).float().to(device)
