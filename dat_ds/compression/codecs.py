"""Gradient codecs: float32 to the bytes that travel, and back.

Shapes: ``n`` rows of ``m`` entries each; a row is cut into ``b`` blocks of ``B`` entries, the last
of which may be shorter. The bytes of a row depend on ``m`` alone: those of the blocks' scales, then
those of the codes, so one collective of ``uint8`` carries everything.

Non-finite entries stay visible: a block that holds one decodes to NaN throughout (``natural`` and
``topk`` keep it where it is), so a check for overflow after the exchange finds it on every rank.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max * (1 - 2**-23)  # what rounds back to at most the largest
_NOISE_STEPS = 2**16
_CACHED_ENTRIES = 2**18
_MAX_INT16 = 2**15
_MAGNITUDE = 0x7FFFFFFF
_HALF_MANTISSA = 2**22 + 2**6
_LARGEST_EXPONENT = 254  # of 2 ** 127
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes


@dataclass(frozen=True)
class Payload:
    """What a codec made of a tensor.

    Args:
        data: The bytes that travel, ``uint8``, one dimension.
        shape: Shape of the tensor; both ends know it, it does not travel.
    """

    data: Tensor
    shape: torch.Size


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """A lossy code for float32 tensors; pure, on any device, deterministic given the generator.

    Attributes:
        name: Its name in ``dat.compression``.
        unbiased: Whether ``E[decode(encode(t))] = t``. Stochastic rounding is exact to ``2^-17``
            of its step, for entries that are no larger than the decoded value can be.
    """

    name: ClassVar[str]
    unbiased: ClassVar[bool]

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Encode a floating-point tensor of any shape, also an empty one.

        Args:
            tensor: Encoded as float32.
            generator: Source of the random rounding, on the tensor's device; None takes torch's.
        """
        row = tensor.detach().to(torch.float32).reshape(1, -1)
        if not row.numel():
            return Payload(row.new_empty(0, dtype=torch.uint8), tensor.shape)
        return Payload(self.encode_rows(row, generator)[0], tensor.shape)

    def decode(self, payload: Payload) -> Tensor:
        """The float32 tensor that a payload stands for, in its shape."""
        numel = payload.shape.numel()
        if not numel:
            return payload.data.new_empty(payload.shape, dtype=torch.float32)
        return self.decode_rows(payload.data.unsqueeze(0), numel).reshape(payload.shape)

    def num_bytes(self, payload: Payload) -> int:
        """Bytes that travel."""
        return payload.data.numel()

    def bytes_of(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` entries."""
        return sum(self.parts_of(numel))

    @abstractmethod
    def parts_of(self, numel: int) -> tuple[int, ...]:
        """Bytes of the payload's parts, in their order, of ``numel`` entries."""

    @abstractmethod
    def variance_bound(self, numel: int) -> float:
        """``w`` with ``E|decode(encode(t)) - t|^2 <= w |t|^2`` for ``numel`` finite entries.

        Entries below ``2^-126`` may add as much as their own size.
        """

    def block_of(self, numel: int) -> int:
        """Entries per block, of a tensor of ``numel``."""
        return 1

    def encode_rows(
        self, rows: Tensor, generator: torch.Generator | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Encode every row apart.

        Args:
            rows: ``(n, m)`` float32 with ``m >= 1``; padding holds zeros.
            generator: As for :meth:`encode`.
            valid: Entries of each block ``(n, b)`` that are no padding, float32, from
                :meth:`valid_counts`; None where all are.

        Returns:
            ``(n, bytes_of(m))`` uint8.
        """
        block = self.block_of(rows.shape[1])
        slices = [
            self._encode(
                rows[:, start:end],
                generator,
                None if valid is None else valid[:, start // block : -(-end // block)],
            )
            for start, end in self._slices(rows)
        ]
        return torch.cat([piece for part in zip(*slices, strict=True) for piece in part], dim=1)

    def decode_rows(self, data: Tensor, numel: int) -> Tensor:
        """Decode ``(n, bytes_of(m))`` uint8 to ``(n, m)`` float32; ``numel`` is ``m``."""
        rows = torch.empty(len(data), numel, dtype=torch.float32, device=data.device)
        sizes = self.parts_of(numel)
        offsets = [0, *itertools.accumulate(sizes[:-1])]
        for start, end in self._slices(rows):
            bounds = zip(offsets, self.parts_of(start), self.parts_of(end), strict=True)
            self._decode([data[:, at + a : at + b] for at, a, b in bounds], rows[:, start:end])
        return rows

    def _slices(self, rows: Tensor) -> list[tuple[int, int]]:
        """Bounds of the entries of a row that are worked on together.

        On a CPU, as many as stay in its cache: whole blocks and whole bytes, but for the last.
        """
        count, numel = rows.shape
        size, unit = numel, math.lcm(self.block_of(numel), 8)
        if rows.device.type == "cpu" and unit < numel:
            size = max(1, _CACHED_ENTRIES // (count * unit)) * unit
        # The last slice takes what is left over, so that none is shorter than a block.
        return list(itertools.pairwise([0, *range(size, numel - size + 1, size), numel]))

    @abstractmethod
    def _encode(
        self, rows: Tensor, generator: torch.Generator | None, valid: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The parts of the payload, each ``(n, bytes)`` uint8 and in the order of the entries."""

    @abstractmethod
    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Fill ``out`` ``(n, m)`` with what :meth:`_encode` made the parts of."""

    def valid_counts(self, mask: Tensor) -> Tensor | None:
        """Entries of each block that ``mask`` ``(n, m)`` keeps; None where the codec asks not."""
        return None


@dataclass(frozen=True, kw_only=True)
class BlockCodec(Codec):
    """A codec that treats blocks of consecutive entries alike.

    Args:
        block_size: Entries per block; None makes one block of the whole tensor.
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"compression.block_size={self.block_size} must be at least 1.")

    def block_of(self, numel: int) -> int:
        """Entries per block, of a tensor of ``numel``."""
        return max(1, numel if self.block_size is None else min(self.block_size, numel))

    def blocks_of(self, numel: int) -> int:
        """Number of blocks, of a tensor of ``numel``."""
        return -(-numel // self.block_of(numel))

    def _blocks(self, rows: Tensor) -> Tensor:
        """``(n, m)`` as ``(n, b, B)``, filled up with zeros."""
        size = self.block_of(rows.shape[1])
        missing = -rows.shape[1] % size
        if missing:
            rows = F.pad(rows, (0, missing))
        return rows.reshape(len(rows), -1, size)

    def _scale_up(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """``codes`` ``(n, m)`` times each block's scale, ``(n, 4 b)`` uint8, into ``out``."""
        # Converted first: multiplied as they are, codes would be converted much more slowly.
        out.copy_(codes)
        scales, size = _typed(scales, torch.float32), self.block_of(out.shape[1])
        whole = out.shape[1] // size
        blocks = out[:, : whole * size].view(len(out), whole, size)
        blocks.mul_(scales[:, :whole].unsqueeze(2))
        out[:, whole * size :].mul_(scales[:, -1:])  # a shorter one


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
        step = (self._length(blocks, peak) / levels).clamp(_TINY, _HUGE / levels)
        step = step.masked_fill(~peak.isfinite(), math.nan)
        noise = self._noise(blocks, generator)
        inverse = step.reciprocal().unsqueeze(2)
        codes = torch.addcmul(noise, blocks, inverse, out=noise).round_().clamp_(-levels, levels)
        codes = codes.to(torch.int8).reshape(len(rows), -1)[:, : rows.shape[1]]
        if self.width == 8:
            packed = codes.contiguous().view(torch.uint8)
        else:
            packed = pack((codes + 2 ** (self.width - 1)).view(torch.uint8), self.width)
        return _bytes(step), packed

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
        """What the largest level stands for, ``(n, b)``."""
        if self.norm == "max":
            return peak
        return _l2_norm(blocks, peak)


@dataclass(frozen=True, kw_only=True)
class Int8(StochasticRounding):
    """Block-wise abs-max, 255 levels, stochastic rounding: 8 bits an entry and 32 a block.

    Unbiased. With ``s = 127``, ``w = min((B - 1) / (4 s^2), sqrt(B - 1) / (2 s))``. The default
    block keeps the relative error at 0.0313 at most, whatever the gradient's distribution.
    """

    name = "int8"
    unbiased = True
    block_size: int | None = 64

    @property
    def max_level(self) -> int:
        """127."""
        return 127


@dataclass(frozen=True, kw_only=True)
class Int4(StochasticRounding):
    """As ``int8`` with 15 levels (``s = 7``), two codes to a byte: 4 bits an entry, 32 a block."""

    name = "int4"
    unbiased = True
    block_size: int | None = 64

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

    name = "qsgd"
    unbiased = True
    norm = "l2"
    levels: int = 127
    block_size: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= 127:
            raise ValueError(f"compression.levels={self.levels} must lie in [1, 127].")

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


@dataclass(frozen=True, kw_only=True)
class Natural(Codec):
    """Natural compression (Horvath et al., MSML 2022, section 2, arXiv 1905.10988): 9 bits.

    ``t`` is rounded at random to one of the two powers of two around it; sign and exponent travel.
    Unbiased, ``w = 1 / 8`` (their Theorem 1). Entries above ``2^127`` become ``2^127``.
    """

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
        noise = _random_bits(rows, torch.int16, generator).to(torch.int32)
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


@dataclass(frozen=True, kw_only=True)
class TopK(BlockCodec):
    """The entries of largest magnitude of each block, with their places.

    Biased: a contraction with ``w = 1 - k / B`` (Stich et al., NeurIPS 2018, Definition 2.1, arXiv
    1809.07599), to be used with error feedback. ``k = ceil(ratio B)`` entries of a block take 32
    bits each and 16 for the place (32 in blocks above 32768 entries).

    Args:
        ratio: Share of entries that are kept.
        block_size: Entries per block; choosing among all entries of a large tensor is slow.
    """

    name = "topk"
    unbiased = False
    ratio: float = 0.01
    block_size: int | None = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"compression.ratio={self.ratio} must lie in (0, 1].")

    def kept_of(self, numel: int) -> int:
        """Entries kept of each block, of a tensor of ``numel``."""
        return math.ceil(self.ratio * self.block_of(numel))

    def parts_of(self, numel: int) -> tuple[int, ...]:
        """``4 b k`` of values, ``2 b k`` or ``4 b k`` of places."""
        kept = self.kept_of(numel) * self.blocks_of(numel)
        return 4 * kept, self._place_dtype(numel).itemsize * kept

    def _place_dtype(self, numel: int) -> torch.dtype:
        return torch.int16 if self.block_of(numel) <= _MAX_INT16 else torch.int32

    def variance_bound(self, numel: int) -> float:
        """``1 - k / B``."""
        return 1 - self.kept_of(numel) / self.block_of(numel)

    def _encode(
        self, rows: Tensor, generator: torch.Generator | None, valid: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The values, then their places within the block."""
        blocks, numel = self._blocks(rows), rows.shape[1]
        place = _largest(blocks, self.kept_of(numel))
        values = blocks.gather(2, place).reshape(len(rows), -1)
        return _bytes(values), _bytes(place.reshape(len(rows), -1).to(self._place_dtype(numel)))

    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """The values at their places, zero elsewhere."""
        numel, size = out.shape[1], self.block_of(out.shape[1])
        shape = (len(out), self.blocks_of(numel), self.kept_of(numel))
        values = _typed(parts[0], torch.float32).view(shape)
        place = _typed(parts[1], self._place_dtype(numel)).view(shape).long()
        whole = numel // size
        blocks = out.zero_()[:, : whole * size].view(len(out), whole, size)
        blocks.scatter_(2, place[:, :whole], values[:, :whole])
        if whole * size < numel:  # places in the last block's padding lead out of ``out``
            last = out.new_zeros(len(out), size).scatter_(1, place[:, -1], values[:, -1])
            out[:, whole * size :] = last[:, : numel - whole * size]


@dataclass(frozen=True, kw_only=True)
class Sign(BlockCodec):
    """The signs of a block and one scale: 1 bit an entry and 32 a block.

    Biased, to be used with error feedback. With the mean of magnitudes as scale it is a
    contraction, ``w = 1 - 1 / B`` (Karimireddy et al., ICML 2019, Lemma 8, arXiv 1901.09847); with
    the root mean square, as in 1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888) and in
    DeepSpeed, ``w = 2 - 2 / sqrt(B)``. An entry of 0 counts as positive.

    Args:
        scale: ``"mean"`` or ``"rms"``, over entries that are no padding.
    """

    name = "sign"
    unbiased = False
    scale: Literal["mean", "rms"] = "mean"
    block_size: int | None = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("mean", "rms"):
            raise ValueError(f"compression.scale={self.scale!r} is not one of mean, rms.")

    def parts_of(self, numel: int) -> tuple[int, ...]:
        """``4 b`` and ``ceil(m / 8)``."""
        return 4 * self.blocks_of(numel), -(-numel // 8)

    def variance_bound(self, numel: int) -> float:
        """``1 - 1 / B`` or, of the root mean square, ``2 - 2 / sqrt(B)``."""
        size = self.block_of(numel)
        return 1 - 1 / size if self.scale == "mean" else 2 - 2 / math.sqrt(size)

    def valid_counts(self, mask: Tensor) -> Tensor:
        """Entries over which each block's scale is taken."""
        return self._blocks(mask.to(torch.float32)).sum(dim=2)

    def _encode(
        self, rows: Tensor, generator: torch.Generator | None, valid: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The scales, then the signs."""
        blocks = self._blocks(rows)
        if valid is None:
            valid = blocks.new_full(blocks.shape[:2], blocks.shape[2])
            valid[:, -1] -= blocks[0].numel() - rows.shape[1]
        scale = self._scale(blocks, valid.clamp(min=1))
        # As float32: into bool, CPUs compare much more slowly.
        positive = torch.ge(rows, 0, out=torch.empty_like(rows)).to(torch.uint8)
        return _bytes(scale), pack(positive, 1)

    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Plus or minus the block's scale."""
        scale, positive = parts
        signs = unpack(positive, 1, out.shape[1]).view(torch.int8).mul_(2).sub_(1)
        self._scale_up(signs, scale, out)

    def _scale(self, blocks: Tensor, valid: Tensor) -> Tensor:
        if self.scale == "mean":
            # Divided first: the sum of a block may overflow.
            return blocks.abs().div_(valid.unsqueeze(2)).sum(dim=2)
        peak = blocks.abs().amax(dim=2)
        return _l2_norm(blocks, peak, valid.sqrt())


@dataclass(frozen=True, kw_only=True)
class WholeSign(Sign):
    """As ``sign``, with one scale for all rows that are encoded together: a whole tensor's.

    What DeepSpeed's 1-bit optimizers compute; for comparison with them.
    """

    block_size: int | None = None

    def _scale(self, blocks: Tensor, valid: Tensor) -> Tensor:
        if self.scale == "mean":
            scale = blocks.abs().sum() / valid.sum()
        else:
            scale = torch.linalg.vector_norm(blocks) / valid.sum().sqrt()
        return scale.repeat(blocks.shape[:2])


def _largest(blocks: Tensor, kept: int) -> Tensor:
    """Places ``(n, b, k)``, in no order, of each block's ``kept`` largest magnitudes."""
    # Bits are ordered as magnitudes are, NaN last, and integers are compared faster.
    keys = blocks.view(torch.int32) & _MAGNITUDE
    size = blocks.shape[2]
    # Where k groups hold the k largest maxima, they hold the k largest entries. Groups of
    # sqrt(B / k) leave fewest entries to choose among.
    in_group = math.gcd(size, 2 ** int(math.log2(math.sqrt(size / kept))))
    if in_group == 1:
        return keys.topk(kept, dim=2, sorted=False).indices
    groups = keys.view(*keys.shape[:2], in_group, -1)  # a group's entries lie B / in_group apart
    chosen = groups.amax(dim=2).topk(kept, dim=2, sorted=False).indices
    candidates = groups.gather(3, chosen.unsqueeze(2).expand(-1, -1, in_group, -1)).flatten(2)
    best = candidates.topk(kept, dim=2, sorted=False).indices
    places: Tensor = best // kept * groups.shape[3] + chosen.gather(2, best % kept)
    return places


def _l2_norm(blocks: Tensor, peak: Tensor, divisor: Tensor | float = 1.0) -> Tensor:
    """l2 norm of each block over ``divisor``, whose squares neither overflow nor vanish."""
    peak = peak.clamp(min=_TINY)
    relative = torch.linalg.vector_norm(blocks / peak.unsqueeze(2), dim=2)
    norm: Tensor = peak * (relative / divisor)
    return norm


def _rounding_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise in (-1/2, 1/2), symmetric, float32; rounding ``y + noise`` is unbiased to ``2^-17``.

    Sixteen random bits an entry: float32 would not resolve more beside a level of 127.
    """
    noise = _random_bits(like, torch.int16, generator).to(torch.float32)
    return noise.add_(0.5).mul_(1 / _NOISE_STEPS)


def _random_bits(like: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
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


def _bytes(values: Tensor) -> Tensor:
    """``(n, k)`` of any dtype as ``(n, bytes)`` uint8."""
    return values.contiguous().view(torch.uint8)


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of each row as values; a copy, as bytes anywhere in a row are not aligned for them."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)
