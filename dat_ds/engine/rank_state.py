"""What a rank has of its own, beside DeepSpeed's shards, for a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dat_ds.engine import hooks
from dat_ds.engine.random_state import random_state, restore_random_state
from dat_ds.engine.resharding import layout_of

if TYPE_CHECKING:
    from dat_ds.engine.adversarial import AdversarialEngine

logger = logging.getLogger("dat_ds")


def rank_state(engine: AdversarialEngine) -> dict[str, Any]:
    """State of this rank, of tensors and plain types."""
    ema = engine.ema
    state: dict[str, Any] = {
        **random_state(engine.ranks.device),
        "buffers": {name: b.detach().cpu() for name, b in engine.module.named_buffers()},
        "ema": ema.state_dict() if ema is not None and _holds_ema(engine) else None,
        "strategy": engine.inner.strategy.state_dict(),
        "attack_precision": engine.attack_precision,
        "layout": layout_of(engine.deepspeed),
    }
    if engine.averaging_optimizer is not None:
        state["optimizer"] = engine.averaging_optimizer.rank_state_dict()
    if engine.compression is not None:
        state["compression"] = engine.compression.state_dict()
    scaler = hooks.grad_scaler(engine.deepspeed)
    if scaler is not None:  # of float16 autocast, which DeepSpeed does not save
        state["grad_scaler"] = scaler.state_dict()
    return state


def _holds_ema(engine: AdversarialEngine) -> bool:
    """Whether this rank writes the average: its own where weights differ, else one for all."""
    is_own = engine.run.zero_stage == 3 or engine.replicas_differ
    return is_own or engine.ranks.is_main


def leave_behind(
    own: dict[str, Any], state: Mapping[str, Any], engine: AdversarialEngine, *, resharded: bool
) -> None:
    """Take out of a rank's state what does not fit this run's ranks and shards, and say so.

    Args:
        own: What :func:`rank_state` returned on the rank that this one goes on from.
        state: The checkpoint's ``state.json``.
        engine: The engine that goes on.
        resharded: Whether the shards of its optimizer are others than the checkpoint's.
    """
    ranks = engine.ranks
    saved_ranks, accumulation = state["ranks"], state.get("accumulation", engine.accumulation)
    if ranks.rank >= saved_ranks:  # another rank's: two would draw the same dropout masks
        for name in [name for name in own if name.startswith("rng_")]:
            del own[name]
    moved = saved_ranks != ranks.count or accumulation != engine.accumulation
    dropped = []
    if moved and own["strategy"]:
        own["strategy"] = {}
        dropped.append("perturbations that the attack carries along")
    if (moved or resharded) and own.get("compression", {}).get("buckets"):
        own["compression"] = None
        dropped.append("errors of gradient compression")
    shards = cast("list[list[str]]", ranks.gather(dropped))
    everywhere = dict.fromkeys(words for shard in shards for words in shard)
    if not ranks.is_main or not (moved or resharded):
        return
    logger.info(
        "Resumed on other shards: %d rank(s) with %d micro-step(s), in the checkpoint %d with %d.",
        ranks.count,
        engine.accumulation,
        saved_ranks,
        accumulation,
    )
    if everywhere:
        logger.warning("Start from zero again: %s.", ", ".join(everywhere))
    if moved and any(isinstance(module, _BatchNorm) for module in engine.module.modules()):
        logger.warning(
            "BatchNorm takes its statistics from the images of one micro-batch on one rank, whose "
            "number may be another now: losses go on near the earlier ones, not at them. Keep "
            "train_micro_batch_size_per_gpu, or train with SyncBatchNorm."
        )


@torch.no_grad()
def restore_rank_state(state: Mapping[str, Any], engine: AdversarialEngine) -> None:
    """Go on from :func:`rank_state`; what :func:`leave_behind` took out starts anew."""
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(state["buffers"][name])
    if engine.ema is not None and state["ema"] is not None:
        engine.ema.load_state_dict(state["ema"])
    if engine.averaging_optimizer is not None:
        engine.averaging_optimizer.load_rank_state_dict(state["optimizer"])
        hooks.copy_master_weights(engine.deepspeed)
    if engine.compression is not None and state["compression"] is not None:
        engine.compression.load_state_dict(state["compression"])
    scaler = hooks.grad_scaler(engine.deepspeed)
    if scaler is not None and "grad_scaler" in state:
        scaler.load_state_dict(state["grad_scaler"])
    # Until 2026 "free" held what the strategy of that name carries along, and None for others.
    carried = state["strategy"] if "strategy" in state else state["free"]
    engine.inner.strategy.load_state_dict(carried or {})
    engine.inner.precision = state["attack_precision"]
    restore_random_state(state, engine.ranks.device)
