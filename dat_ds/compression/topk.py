"""The largest entries of each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.compression.base import BlockCodec
from dat_ds.compression.packing import as_bytes, from_bytes
from dat_ds.method import at_least, positive_share

_MAX_INT16 = 2**15


_MAGNITUDE = 0x7FFFFFFF


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

    paper: ClassVar[str] = "Stich et al., NeurIPS 2018, arXiv 1809.07599"
    name = "topk"
    unbiased = False
    ratio: float = positive_share(0.01)
    """Share of entries sent."""
    block_size: int = at_least(0, 1024)
    """Entries per block; 0 makes one block of each rank's share of a bucket."""

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
        return as_bytes(values), as_bytes(place.reshape(len(rows), -1).to(self._place_dtype(numel)))

    def _decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """The values at their places, zero elsewhere."""
        numel, size = out.shape[1], self.block_of(out.shape[1])
        shape = (len(out), self.blocks_of(numel), self.kept_of(numel))
        values = from_bytes(parts[0], torch.float32).view(shape)
        place = from_bytes(parts[1], self._place_dtype(numel)).view(shape).long()
        whole = numel // size
        blocks = out.zero_()[:, : whole * size].view(len(out), whole, size)
        blocks.scatter_(2, place[:, :whole], values[:, :whole])
        if whole * size < numel:  # places in the last block's padding lead out of ``out``
            last = out.new_zeros(len(out), size).scatter_(1, place[:, -1], values[:, -1])
            out[:, whole * size :] = last[:, : numel - whole * size]


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
