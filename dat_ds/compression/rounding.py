"""Codecs that round at random to multiples of a step: int8, int4, QSGD."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.compression.base import BlockCodec
from dat_ds.compression.packing import HUGE, TINY, as_bytes, l2_norm, pack, random_bits, unpack
from dat_ds.method import at_least, option

_NOISE_STEPS = 2**16


@dataclass(frozen=True, kw_only=True)
class StochasticRounding(BlockCodec):
    """Each block's entries, rounded at random to multiples of its own step.

    With ``y = t / step``, an entry becomes ``step * (floor(y) + 1)`` with probability
    ``y - floor(y)``, else ``step * floor(y)``.
    """

    norm: ClassVar[Literal["max", "l2"]] = "max"

    @property
    @abstractmethod
    def max_level(self) -> int:
        """Largest multiple of the step."""

    @property
    def width(self) -> int:
        """Bits of a code."""
        return next(w for w in (2, 4, 8) if self.max_level < 2 ** (w - 1))

    def parts_of(self, numel: int) -> tuple[int, ...]:
        """``4 b`` and ``ceil(m width / 8)``."""
        return 4 * self.blocks_of(numel), -(-numel * self.width // 8)

    def variance_bound(self, numel: int) -> float:
        """``min((B - 1) / (4 s^2), sqrt(B - 1) / (2 s))`` with ``s`` the largest level."""
        # An entry's variance is at most step^2 / 4 and at most |t| step; the largest is exact, but
        # that its level may miss an integer by float32's last bit, which one noise in 2^16 sees.
        others, levels = self.block_of(numel) - 1, self.max_level
        bound = min(others / (4 * levels**2), math.sqrt(others) / (2 * levels))
        return bound + 1 / (_NOISE_STEPS * levels**2)

    def _encode(
        self, rows: Tensor, generator: torch.Generator | None, valid: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The steps, then the levels, signed or packed after a shift."""
        blocks, levels = self._blocks(rows), self.max_level
        peak = blocks.abs().amax(dim=2)
        # Between these bounds neither the step's inverse nor the largest multiple overflows.
        step = (self._length(blocks, peak) / levels).clamp(TINY, HUGE / levels)
        step = step.masked_fill(~peak.isfinite(), math.nan)
        noise = self._noise(blocks, generator)
        inverse = step.reciprocal().unsqueeze(2)
        codes = torch.addcmul(noise, blocks, inverse, out=noise).round_().clamp_(-levels, levels)
        codes = codes.to(torch.int8).reshape(len(rows), -1)[:, : rows.shape[1]]
        if self.width == 8:
            packed = codes.contiguous().view(torch.uint8)
        else:
            packed = pack((codes + 2 ** (self.width - 1)).view(torch.uint8), self.width)
        return as_bytes(step), packed

    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Levels times steps."""
        step, codes = parts
        if self.width == 8:
            levels = codes.view(torch.int8)
        else:
            levels = unpack(codes, self.width, out.shape[1]).view(torch.int8)
            levels = levels - 2 ** (self.width - 1)
        self._scale_up(levels, step, out)

    def _noise(self, blocks: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise in (-1/2, 1/2), symmetric, which makes rounding to the nearest level unbiased."""
        return _rounding_noise(blocks, generator)

    def _length(self, blocks: Tensor, peak: Tensor) -> Tensor:
        """Magnitude of the largest level ``(n, b)``."""
        if self.norm == "max":
            return peak
        return l2_norm(blocks, peak)


@dataclass(frozen=True, kw_only=True)
class Int8(StochasticRounding):
    """Block-wise abs-max, 255 levels, stochastic rounding: 8 bits an entry and 32 a block.

    Unbiased. With ``s = 127``, ``w = min((B - 1) / (4 s^2), sqrt(B - 1) / (2 s))``. The default
    block keeps the relative error at 0.0313 at most, whatever the gradient's distribution.
    """

    name = "int8"
    unbiased = True
    block_size: int = at_least(0, 64)
    """Entries that share a scale; 0 makes one block of each rank's share of a bucket."""

    @property
    def max_level(self) -> int:
        """127."""
        return 127


@dataclass(frozen=True, kw_only=True)
class Int4(StochasticRounding):
    """As ``int8`` with 15 levels (``s = 7``), two codes to a byte: 4 bits an entry, 32 a block."""

    name = "int4"
    unbiased = True
    block_size: int = at_least(0, 64)
    """Entries that share a scale; 0 makes one block of each rank's share of a bucket."""

    @property
    def max_level(self) -> int:
        """7."""
        return 7


@dataclass(frozen=True, kw_only=True)
class Qsgd(StochasticRounding):
    """QSGD (Alistarh et al., NeurIPS 2017, section 3.1, arXiv 1610.02132).

    ``Q_s(v_i) = |v|_2 sign(v_i) xi_i`` over buckets, with ``xi_i`` one of the two neighbours of
    ``|v_i| / |v|_2`` in ``{0, 1/s, ..., 1}``, unbiased; ``w = min(B / s^2, sqrt(B) / s)`` (their
    Lemma 3.1). Codes have a fixed width instead of their Elias code, whose length depends on the
    data: a collective needs one length.

    Args:
        levels: ``s``: 1 takes 2 bits an entry, up to 7 take 4, up to 127 take 8.
        block_size: Entries per bucket, of 32 bits each.
    """

    paper: ClassVar[str] = "Alistarh et al., NeurIPS 2017, arXiv 1610.02132, sec. 3.1"
    name = "qsgd"
    unbiased = True
    norm = "l2"
    levels: int = option(127, "an integer in [1, 127]", lambda v: 1 <= v <= 127)
    """Levels of a magnitude; 1 takes 2 bits, up to 7 take 4, up to 127 take 8."""
    block_size: int = at_least(0, 64)
    """Entries that share a scale; 0 makes one block of each rank's share of a bucket."""

    @property
    def max_level(self) -> int:
        """``levels``."""
        return self.levels

    def variance_bound(self, numel: int) -> float:
        """``min(B / s^2, sqrt(B) / s)``."""
        size = self.block_of(numel)
        return min(size / self.levels**2, math.sqrt(size) / self.levels)


@dataclass(frozen=True, kw_only=True)
class NearestInt8(Int8):
    """As ``int8``, rounded to the nearest level: for parameters, which all passes of a step share.

    What is encoded twice is the same twice, so gradients belong to the weights of the forward.
    """

    name = "int8-nearest"
    unbiased = False

    def _noise(self, blocks: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.zeros_like(blocks)


def _rounding_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise in (-1/2, 1/2), symmetric, float32; rounding ``y + noise`` is unbiased to ``2^-17``.

    Sixteen random bits an entry: float32 would not resolve more beside a level of 127.
    """
    noise = random_bits(like, torch.int16, generator).to(torch.float32)
    return noise.add_(0.5).mul_(1 / _NOISE_STEPS)
