"""Gradient codecs: float32 to the bytes that travel, and back.

Shapes: ``n`` rows of ``m`` entries each; a row is cut into ``b`` blocks of ``B`` entries, the last
of which may be shorter. The bytes of a row depend on ``m`` alone: those of the blocks' scales, then
those of the codes, so one collective of ``uint8`` carries everything.

Non-finite entries stay visible: a block that holds one decodes to NaN throughout (``natural`` and
``topk`` keep it where it is), so a check for overflow after the exchange finds it on every rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from dat_ds.compression.packing import (
    from_bytes,
)
from dat_ds.method import Method, above, at_least

_CACHED_ENTRIES = 2**18


@dataclass(frozen=True)
class Payload:
    """An encoded tensor.

    Args:
        data: The bytes that travel, ``uint8``, one dimension.
        shape: Shape of the tensor; both ends know it, it does not travel.
    """

    data: Tensor
    shape: torch.Size


@dataclass(frozen=True, kw_only=True)
class Compression(Method):
    """Section ``dat.compression``: a codec, or none."""

    kind: ClassVar[str] = "codec"

    def resolved(self) -> Self:
        """With the defaults written out that depend on other keys."""
        return self


@dataclass(frozen=True, kw_only=True)
class NoCompression(Compression):
    """Gradients travel as they are."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class Codec(Compression, ABC):
    """A lossy code for float32 tensors; pure, on any device, deterministic given the generator.

    Its keys beyond a codec's own say how what it makes travels.

    Attributes:
        unbiased: Whether ``E[decode(encode(t))] = t``. Stochastic rounding is exact to ``2^-17``
            of its step, for entries that are no larger than the decoded value can be.
    """

    unbiased: ClassVar[bool]

    sides: Literal["single", "double"] | None = None
    """Encode what ranks send to be averaged (``single``), or what comes back as well (``double``):
    the mean or, under ZeRO-3, the parameters, as ``int8``. Default: ``double`` below ZeRO-3,
    ``single`` under it."""
    error_feedback: bool | None = None
    """Add what encoding lost to the next step's gradient, on both sides. Default: true for biased
    codecs, which need it, else false."""
    bucket_mb: float = above(0, 8.0)
    """Below ZeRO-3: megabytes of float32 gradients in one piece: a piece is encoded while others
    travel."""

    def resolved(self) -> Self:
        """With error feedback written out."""
        if self.error_feedback is not None:
            return self
        return dataclasses.replace(self, error_feedback=not self.unbiased)

    def problems(self) -> Iterator[str]:
        """Error feedback that is needed and off, or on and would grow."""
        if not self.unbiased and self.error_feedback is False:
            yield (
                f"error_feedback=false: {self.name!r} is biased, and training with what it leaves "
                "out stalls or diverges. Remove it."
            )
        bound = self.variance_bound(2**20)
        if self.unbiased and self.error_feedback and bound >= 1:
            yield (
                f"error_feedback=true: what {self.name!r} loses may be longer than the gradient "
                f"(squared, up to {bound:g} times) and would grow from step to step. Remove it, or "
                "give more levels or smaller blocks."
            )

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
            valid: Entries of each block ``(n, b)`` that are not padding, float32, from
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
        block_size: Entries per block; 0 makes one block of the whole tensor.
    """

    block_size: int = at_least(0, 0)
    """Entries that share a scale; 0 makes one block of each rank's share of a bucket."""

    def block_of(self, numel: int) -> int:
        """Entries per block, of a tensor of ``numel``."""
        return max(1, min(self.block_size or numel, numel))

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
        scales, size = from_bytes(scales, torch.float32), self.block_of(out.shape[1])
        whole = out.shape[1] // size
        blocks = out[:, : whole * size].view(len(out), whole, size)
        blocks.mul_(scales[:, :whole].unsqueeze(2))
        out[:, whole * size :].mul_(scales[:, -1:])  # a shorter one
