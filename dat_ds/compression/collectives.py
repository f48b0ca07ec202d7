"""Collectives that average over ranks and send what a codec makes of the numbers.

Shapes: ``n`` ranks; a tensor of ``d`` entries is laid out as ``n`` rows of ``m`` entries, row ``k``
being what rank ``k`` averages, filled up with zeros. There is no central server::

    rank r:  rows + worker error -> encode -> all_to_all -> decode n payloads -> mean of row r
    double:  mean + server error -> encode -> all_gather -> decode n payloads -> d entries
    single:  mean                -> all_gather in float32 ->                     d entries

Every rank decodes the same bytes in the second half, so results are bit-identical on all of them.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dat_ds.compression.base import BlockCodec, Codec
from dat_ds.traffic import kind_of_traffic

logger = logging.getLogger("dat_ds")

Sides = Literal["single", "double"]
_TOGETHER = 4  # exchanges; enough to hide the codec, and a bound on memory
# torch renamed it in 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def check_agreement(what: str, group: dist.ProcessGroup | None = None) -> None:
    """Compare a description over the ranks of a group; a collective.

    Args:
        what: Description that has to be the same on all ranks.
        group: Default: all ranks.

    Raises:
        ValueError: On every rank, with what each of them says.
    """
    said: list[Any] = [None] * dist.get_world_size(group)
    with kind_of_traffic("setup"):
        dist.all_gather_object(said, what, group=group)
    if len(set(said)) > 1:
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(said))
        raise ValueError(f"Ranks disagree on compressed communication:\n{lines}")


def finish_together(exchanges: Sequence[Generator[None, None, Tensor]]) -> list[Tensor]:
    """Carry out several exchanges, a few at a time: while one travels, the next one encodes.

    Args:
        exchanges: As :meth:`CompressedAllReduce.parts` starts them, in the same order on all ranks.

    Returns:
        The result of each.
    """
    results: dict[int, Tensor] = {}
    waiting = deque(enumerate(exchanges))
    started: list[tuple[int, Generator[None, None, Tensor]]] = []
    while waiting or started:
        while waiting and len(started) < _TOGETHER:
            started.append(waiting.popleft())
        for i, exchange in started:
            try:
                next(exchange)
            except StopIteration as done:
                results[i] = done.value
        started = [(i, exchange) for i, exchange in started if i not in results]
    return [results[i] for i in range(len(exchanges))]


def gather_shares(
    pieces: Sequence[Tensor],
    shares: Sequence[int],
    codec: BlockCodec,
    *,
    group: dist.ProcessGroup | None = None,
    kind: str = "parameters",
) -> list[Tensor]:
    """Every rank's shares of several tensors, in compressed form; a collective.

    Blocks do not cross from one tensor to the next: what a tensor becomes does not depend on those
    it travels with.

    Args:
        pieces: This rank's share of each tensor, flat, floating point; may be shorter than the
            share is at most.
        shares: Entries of the largest share of each tensor, the same on every rank.
        codec: Encodes them, with blocks of a given size and without random numbers.
        group: Ranks; default all.
        kind: Kind of traffic that the bytes are counted as.

    Returns:
        ``(ranks * share,)`` float32 of each tensor, zero where a piece was too short.
    """
    assert codec.block_size is not None
    sizes = [-(-share // codec.block_size) * codec.block_size for share in shares]
    row = torch.cat(
        [
            F.pad(piece.detach().to(torch.float32), (0, size - piece.numel()))
            for piece, size in zip(pieces, sizes, strict=True)
        ]
    )
    sent = codec.encode_rows(row.unsqueeze(0))
    received = sent.new_empty(dist.get_world_size(group), sent.shape[1])
    with kind_of_traffic(kind):
        _all_gather(received, sent, group=group)
    rows = torch.split(codec.decode_rows(received, row.numel()), sizes, dim=1)
    return [row[:, :share].reshape(-1) for row, share in zip(rows, shares, strict=True)]


class Feedback:
    """Error feedback: adds the encoding error to the next input (Karimireddy et al., ICML 2019).

    A non-finite loss is forgotten: it would come back for ever.

    Args:
        padding: ``(n, m)`` bool, true at padding; None without padding.
    """

    def __init__(self, padding: Tensor | None) -> None:
        self.error: Tensor | None = None
        self._padding = padding

    def compensate(self, rows: Tensor) -> Tensor:
        """``rows`` plus the error, a new tensor."""
        if self.error is None:
            self.error = torch.zeros_like(rows)
        return rows + self.error

    def keep(self, compensated: Tensor, decoded: Tensor) -> None:
        """Remember what ``decoded`` lost."""
        error = torch.sub(compensated, decoded, out=self.error).nan_to_num_(0.0, 0.0, 0.0)
        if self._padding is not None:
            error.masked_fill_(self._padding, 0.0)


class _Exchange:
    """Both halves and their state; subclasses lay tensors out as rows.

    Args:
        layout: Describes the rows to the other ranks.
        codec: Encodes the rows.
        padding: ``(n, m)`` bool, true at padding; None without padding.
        group: Ranks; default all.
        error_feedback: Default: for biased codecs.
        seed: Of the random rounding.
        bucket: Tells apart exchanges of one step.
        kind: Kind of traffic that the bytes are counted as.

    Raises:
        ValueError: For a biased codec without error feedback; on every rank, if they disagree.
    """

    def __init__(
        self,
        layout: str,
        codec: Codec,
        padding: Tensor | None,
        *,
        group: dist.ProcessGroup | None,
        error_feedback: bool | None,
        seed: int,
        bucket: int,
        kind: str,
    ) -> None:
        if error_feedback is False and not codec.unbiased:
            raise ValueError(f"codec {codec.name!r} is biased: it needs error feedback.")
        self.codec, self.kind = codec, kind
        self.group, self.ranks = group, dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        feedback = not codec.unbiased if error_feedback is None else error_feedback
        own = None if padding is None else padding[self.rank : self.rank + 1]
        self._padding = own
        self._valid = None if padding is None else codec.valid_counts(~padding)
        self._own_valid = None if own is None else codec.valid_counts(~own)
        self._worker = Feedback(padding) if feedback else None
        self._server = Feedback(own) if feedback else None
        self._seed, self._bucket = seed, bucket
        if self.ranks > 1:
            agreed = f"{layout}, {codec}, error_feedback={feedback}, seed={seed}, bucket={bucket}"
            check_agreement(agreed, group)

    def rescale_errors(self, factor: float) -> None:
        """Multiply what is remembered, when the unit of the tensors (a loss scale) changes."""
        for feedback in (self._worker, self._server):
            if feedback is not None and feedback.error is not None:
                feedback.error.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Errors of this rank, on the CPU; None where there is none (yet)."""
        state: dict[str, Any] = {"ranks": self.ranks}
        for name, feedback in self._feedbacks():
            error = None if feedback is None else feedback.error
            state[name] = None if error is None else error.to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from :meth:`state_dict` of the same rank.

        Errors belong to one rank and one layout. With another number of ranks they start from
        zero, which loses what one step's encoding does, and a warning says so.

        Args:
            state: The saved state.
            device: Where the tensors to exchange are.
        """
        if state["ranks"] != self.ranks:
            logger.warning(
                "Error feedback was saved by %d ranks, there are %d: it starts from zero.",
                state["ranks"],
                self.ranks,
            )
        for name, feedback in self._feedbacks():
            if feedback is not None:
                error = state[name] if state["ranks"] == self.ranks else None
                feedback.error = None if error is None else error.to(device, copy=True)

    def _feedbacks(self) -> tuple[tuple[str, Feedback | None], ...]:
        return ("worker", self._worker), ("server", self._server)

    def _scatter_mean(self, rows: Tensor, step: int) -> Generator[None, None, Tensor]:
        """Mean over ranks of this rank's row, ``(1, m)``, from every rank's ``(n, m)``.

        Yields while bytes travel.
        """
        if self._worker is not None:
            rows = self._worker.compensate(rows)
        sent = self.codec.encode_rows(rows, self._generator(rows, step, 0), self._valid)
        if self._worker is not None:
            self._worker.keep(rows, self.codec.decode_rows(sent, rows.shape[1]))
        numel = rows.shape[1]
        del rows  # not needed while the bytes travel
        received = torch.empty_like(sent)
        with kind_of_traffic(self.kind):
            work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        yield
        if work is not None:
            work.wait()
        return self.codec.decode_rows(received, numel).mean(dim=0, keepdim=True)

    def _gather(self, mean: Tensor, step: int) -> Generator[None, None, Tensor]:
        """Every rank's ``(1, m)``, through the codec, as ``(n, m)``. Yields while bytes travel."""
        if self._padding is not None:
            mean = mean.masked_fill(self._padding, 0.0)  # a codec may have filled it
        if self._server is not None:
            mean = self._server.compensate(mean)
        sent = self.codec.encode_rows(mean, self._generator(mean, step, 1), self._own_valid)
        received = yield from self._gather_exactly(sent)
        rows = self.codec.decode_rows(received, mean.shape[1])
        if self._server is not None:
            self._server.keep(mean, rows[self.rank : self.rank + 1])
        return rows

    def _gather_exactly(self, row: Tensor) -> Generator[None, None, Tensor]:
        """Every rank's ``(1, k)``, as ``(n, k)``. Yields while bytes travel."""
        rows = row.new_empty(self.ranks, row.shape[1])
        with kind_of_traffic(self.kind):
            work = _all_gather(rows, row, group=self.group, async_op=True)
        yield
        if work is not None:
            work.wait()
        return rows

    def _generator(self, like: Tensor, step: int, half: int) -> torch.Generator:
        """Random numbers of one half, on the device of ``like``; other ranks have others."""
        key = struct.pack("5q", self._seed, self._bucket, step, self.rank, half)
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        return torch.Generator(like.device).manual_seed(seed)


class CompressedAllReduce(_Exchange):
    """Mean over ranks of tensors of one size, in compressed form.

    With one rank, nothing is sent and nothing is lost. Sends per rank, of ``d`` entries,
    ``2 (n - 1)`` payloads of ``d / n`` entries double-sided; building it is a collective.

    Args:
        numel: ``d``, any number.
        codec: Encodes what travels.
        sides: ``"double"`` encodes the mean too, ``"single"`` sends it in float32.
        group: Ranks; default all.
        error_feedback: Remember what encoding lost, on both sides, and add it to the next tensor.
            Default, and needed: for biased codecs.
        seed: Results are a function of (seed, bucket, step) and the tensors.
        bucket: Tells apart tensors that are averaged in one step.
        kind: Kind of traffic that the bytes are counted as: ``gradients``, ``momentum``.
        device: Where the tensors are.

    Raises:
        ValueError: For a biased codec without error feedback; on every rank, if they disagree on
            any of this.
    """

    def __init__(
        self,
        numel: int,
        codec: Codec,
        *,
        sides: Sides = "double",
        group: dist.ProcessGroup | None = None,
        error_feedback: bool | None = None,
        seed: int = 0,
        bucket: int = 0,
        kind: str = "gradients",
        device: torch.device | str = "cpu",
    ) -> None:
        ranks = dist.get_world_size(group)
        self.numel, self.sides = numel, sides
        self._row = -(-numel // ranks)
        padding = None
        if self._row * ranks > numel:
            padding = (torch.arange(self._row * ranks, device=device) >= numel).view(ranks, -1)
        super().__init__(
            f"{sides}-sided all-reduce of {numel} entries",
            codec,
            padding,
            group=group,
            error_feedback=error_feedback,
            seed=seed,
            bucket=bucket,
            kind=kind,
        )

    def __call__(self, tensor: Tensor, step: int) -> Tensor:
        """Mean of ``tensor`` over the ranks; a collective.

        Args:
            tensor: ``(d,)``, floating point.
            step: Number of this exchange, the same on every rank.

        Returns:
            ``(d,)`` float32, bit-identical on all ranks; ``tensor`` is left as it was.
        """
        return finish_together([self.parts(tensor, step)])[0]

    def parts(self, tensor: Tensor, step: int) -> Generator[None, None, Tensor]:
        """A call in parts, for :func:`finish_together`; yields while bytes travel."""
        flat = tensor.detach().to(torch.float32)
        if self.ranks == 1 or not self.numel:
            return flat.clone()
        missing = self.ranks * self._row - self.numel
        rows = (F.pad(flat, (0, missing)) if missing else flat).view(self.ranks, -1)
        mean = yield from self._scatter_mean(rows, step)
        second = self._gather(mean, step) if self.sides == "double" else self._gather_exactly(mean)
        rows = yield from second
        return rows.reshape(-1)[: self.numel]


class CompressedReduceScatter(_Exchange):
    """Mean over ranks of several tensors, each rank keeping its share of each: the first half.

    The share of rank ``r`` of a tensor of ``d`` entries is the ``r``-th piece of ``ceil(d / n)``.

    Args:
        sizes: Entries of each tensor.
        codec: Encodes what travels.
        group: Ranks; default all.
        error_feedback: Whether the encoding error is added to the next tensor, on the sending side.
        seed: Results are a function of (seed, bucket, step) and the tensors.
        bucket: Tells apart tensors that are averaged in one step.
        kind: Kind of traffic that the bytes are counted as.
        device: Where the tensors are.

    Raises:
        ValueError: As for :class:`CompressedAllReduce`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        codec: Codec,
        *,
        group: dist.ProcessGroup | None = None,
        error_feedback: bool | None = None,
        seed: int = 0,
        bucket: int = 0,
        kind: str = "gradients",
        device: torch.device | str = "cpu",
    ) -> None:
        ranks = dist.get_world_size(group)
        self.sizes = tuple(sizes)
        self._shares = [-(-size // ranks) for size in sizes]
        padding = None
        if any(share * ranks > size for share, size in zip(self._shares, sizes, strict=True)):
            flags = [torch.zeros(size, dtype=torch.bool, device=device) for size in sizes]
            padding = self._rows(flags, ranks, fill=True)
        super().__init__(
            f"reduce-scatter of {self.sizes} entries",
            codec,
            padding,
            group=group,
            error_feedback=error_feedback,
            seed=seed,
            bucket=bucket,
            kind=kind,
        )

    def __call__(self, tensors: Sequence[Tensor], step: int) -> list[Tensor]:
        """This rank's share of the mean of each tensor; a collective.

        Args:
            tensors: Floating point, of the sizes given, any shape; padding holds zeros.
            step: Number of this exchange, the same on every rank.

        Returns:
            ``(ceil(d / n),)`` float32 each; what lies past the end of a tensor has no meaning.
        """
        rows = self._rows([t.detach().to(torch.float32) for t in tensors], self.ranks)
        if self.ranks == 1 or not rows.numel():
            return list(torch.split(rows[0], self._shares))
        (mean,) = finish_together([self._scatter_mean(rows, step)])
        return list(torch.split(mean[0], self._shares))

    def _rows(self, tensors: Sequence[Tensor], ranks: int, fill: float = 0) -> Tensor:
        """Row ``r`` holds the shares of rank ``r``, one after another: ``(n, m)``."""
        pieces = [
            F.pad(tensor.reshape(-1), (0, share * ranks - tensor.numel()), value=fill)
            for tensor, share in zip(tensors, self._shares, strict=True)
        ]
        rows = [piece.view(ranks, len(piece) // ranks) for piece in pieces]
        return torch.cat(rows, dim=1)
