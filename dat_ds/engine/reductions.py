"""Compressed gradients in DeepSpeed's engine: what runs in place of its reductions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from dat_ds.compression import (
    Codec,
    CompressedAllReduce,
    CompressedReduceScatter,
    NearestInt8,
    finish_together,
    gather_shares,
)
from dat_ds.config import RunConfig
from dat_ds.engine import hooks
from dat_ds.errors import ConfigError, UserError
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_PARAMETER_CODEC = NearestInt8()


class GradientCompression:
    """Averages the gradients of a run through its codec; made by :func:`attach_compression`.

    DeepSpeed hands over one bucket of gradients after another, in every backward that ends an
    optimizer step at ZeRO stages 0 and 1, and in every backward at stages 2 and 3. A bucket is
    known again by the parameters in it; one with others starts without error feedback, and a
    warning says so. Double-sided under ZeRO-3, parameters are gathered as ``int8`` as well.

    Args:
        engine: DeepSpeed's engine.
        config: The resolved section.
        seed: Of the run.
    """

    def __init__(self, engine: DeepSpeedEngine, config: Codec, seed: int) -> None:
        self._engine, self._config, self._seed = engine, config, seed
        self.codec = config
        self._exchanges: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._seen: Counter[str] = Counter()
        self._step, self._scale, self._saved_scale = 0, 1.0, 1.0
        self._knows_buckets = False
        self._in_pass = False
        hooks.replace_gradient_averaging(engine, self._average, self._scatter)
        if engine.zero_optimization_stage() == 3 and config.sides == "double":
            hooks.replace_parameter_gathers(engine, self._gather)

    def start(self, micro_step: int) -> None:
        """Prepare for the backward of a micro-step, counted from the start of the run."""
        self._knows_buckets = bool(self._exchanges or self._saved)
        if self._exchanges:
            self._saved.clear()  # of buckets that the first backward did not bring back
        self._step = micro_step
        self._seen.clear()
        if self._config.error_feedback:
            scale = hooks.gradient_scale(self._engine)
            for exchange in self._exchanges.values():
                exchange.rescale_errors(scale / self._scale)
            self._scale = scale

    def check_done(self) -> None:
        """Make sure that the backward which ended an optimizer step reduced through the codec.

        Raises:
            UserError: If DeepSpeed averaged gradients in another way.
        """
        if not self._seen and self._engine.enable_backward_allreduce:
            raise UserError(
                f"dat.compression.name={self._config.name!r}: this DeepSpeed averaged gradients "
                'without it. Write "compression": {"name": "none"}, or install '
                "deepspeed>=0.19.8,<0.20."
            )

    @contextlib.contextmanager
    def training_pass(self) -> Iterator[None]:
        """Compress gathers of ZeRO-3 parameters inside, if asked to; outside they are exact."""
        before, self._in_pass = self._in_pass, True
        try:
            yield
        finally:
            self._in_pass = before

    def state_dict(self) -> dict[str, Any]:
        """Error feedback of this rank, and the scale of the gradients that it belongs to."""
        buckets = {key: exchange.state_dict() for key, exchange in self._exchanges.items()}
        return {"scale": self._scale, "buckets": self._saved | buckets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of the same rank."""
        self._scale = self._saved_scale = float(state["scale"])
        self._saved = dict(state["buckets"])
        self._exchanges.clear()

    def _average(self, name: str, flat: Tensor) -> Tensor:
        """The mean of a bucket, encoded piece by piece to bound the memory that it takes."""
        sides = self._config.sides or "double"
        exchanges = []
        for i, piece in enumerate(torch.split(flat, max(1, int(self._config.bucket_mb * 2**18)))):
            build = functools.partial(CompressedAllReduce, piece.numel(), sides=sides)
            exchange: CompressedAllReduce = self._exchange(f"{name}/{i}", piece, build)
            exchanges.append(exchange.parts(piece, self._step))
        means = finish_together(exchanges)
        return means[0] if len(means) == 1 else torch.cat(means)

    def _scatter(self, name: str, gradients: Sequence[Tensor]) -> list[Tensor]:
        """This rank's share of the mean of each gradient."""
        build = functools.partial(CompressedReduceScatter, [g.numel() for g in gradients])
        exchange: CompressedReduceScatter = self._exchange(name, gradients[0], build)
        return exchange(gradients, self._step)

    def _gather(self, shards: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor] | None:
        """Whole parameters from every rank's shards of them, during training passes."""
        return gather_shares(shards, sizes, _PARAMETER_CODEC) if self._in_pass else None

    def _exchange(self, name: str, like: Tensor, build: Callable[..., Any]) -> Any:
        """The exchange of a bucket, and its error feedback, the same one in every step."""
        self._seen[name] += 1  # several buckets of a pass may have one name
        key = hashlib.blake2b(f"{name}/{self._seen[name]}".encode(), digest_size=7).hexdigest()
        if key in self._exchanges:
            return self._exchanges[key]
        feedback = self._config.error_feedback
        exchange = build(
            codec=self.codec,
            error_feedback=feedback,
            seed=self._seed,
            bucket=int(key, 16),
            device=like.device,
        )
        saved = self._saved.pop(key, None)
        if saved is not None:
            exchange.load_state_dict(saved, like.device)
            exchange.rescale_errors(self._scale / self._saved_scale)
        elif feedback and self._knows_buckets:
            logger.warning(
                "dat.compression: DeepSpeed made a bucket of other parameters than before; its "
                "error feedback starts from zero."
            )
        self._exchanges[key] = exchange
        return exchange


def attach_compression(
    engine: DeepSpeedEngine, run: RunConfig, ranks: Ranks
) -> GradientCompression | None:
    """Compress the gradients of a run; a collective.

    Returns:
        What does it; None where nothing is to be compressed, or with one rank, to no other.

    Raises:
        ConfigError: On every rank, if they disagree on ``dat.compression``.
    """
    config = run.dat.compression
    said = ranks.gather(str(config))
    if len(set(map(str, said))) > 1:
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(said))
        raise ConfigError(f"Ranks disagree on dat.compression; start all with one config:\n{lines}")
    if not isinstance(config, Codec):
        return None
    if ranks.count == 1:
        logger.info(
            "dat.compression.name=%r: with one rank no gradient travels, so none is compressed.",
            config.name,
        )
        return None
    if run.zero_stage >= 2 and engine.gradient_accumulation_steps() > 1 and ranks.is_main:
        logger.info(
            "dat.compression under ZeRO-%d encodes in each of the %d micro-steps of a step, as "
            "DeepSpeed reduces in each; stages 0 and 1 do so once.",
            run.zero_stage,
            engine.gradient_accumulation_steps(),
        )
    return GradientCompression(engine, config, run.dat.seed)
