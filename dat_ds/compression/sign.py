"""Signs and a scale a block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.compression.base import BlockCodec
from dat_ds.compression.packing import as_bytes, l2_norm, pack, unpack
from dat_ds.method import at_least


@dataclass(frozen=True, kw_only=True)
class Sign(BlockCodec):
    """The signs of a block and one scale: 1 bit an entry and 32 a block.

    Biased, to be used with error feedback. With the mean of magnitudes as scale it is a
    contraction, ``w = 1 - 1 / B`` (Karimireddy et al., ICML 2019, Lemma 8, arXiv 1901.09847); with
    the root mean square, as in 1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888) and in
    DeepSpeed, ``w = 2 - 2 / sqrt(B)``. An entry of 0 counts as positive.

    Args:
        scale: ``"mean"`` or ``"rms"``, over entries that are not padding.
    """

    paper: ClassVar[str] = "Karimireddy et al., ICML 2019, arXiv 1901.09847"
    name = "sign"
    unbiased = False
    scale: Literal["mean", "rms"] = "mean"
    """Mean of a block's magnitudes, or their root mean square."""
    block_size: int = at_least(0, 1024)
    """Entries that share a scale; 0 makes one block of each rank's share of a bucket."""

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
        return as_bytes(scale), pack(positive, 1)

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
        return l2_norm(blocks, peak, valid.sqrt())


@dataclass(frozen=True, kw_only=True)
class WholeSign(Sign):
    """As ``sign``, with one scale for all rows that are encoded together: a whole tensor's.

    What DeepSpeed's 1-bit optimizers compute; for comparison with them.
    """

    block_size: int = 0

    def _scale(self, blocks: Tensor, valid: Tensor) -> Tensor:
        if self.scale == "mean":
            scale = blocks.abs().sum() / valid.sum()
        else:
            scale = torch.linalg.vector_norm(blocks) / valid.sum().sqrt()
        return scale.repeat(blocks.shape[:2])
