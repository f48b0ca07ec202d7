"""Engines set up for benchmarks, with a twin of their model to do the same by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dat_ds.assembly import build_data_of, build_loader, build_model_of
from dat_ds.config import RunConfig, adapt_to_device, resolve_batch, without_monitors
from dat_ds.data import Loader
from dat_ds.engine import hooks
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.build import initialize
from dat_ds.engine.launch import setup_ranks
from dat_ds.optim import TrustRatioOptimizer
from dat_ds.ranks import Ranks


def prepared_engine(run: RunConfig) -> tuple[AdversarialEngine, nn.Module, Tensor, Tensor]:
    """The engine of a run, a copy of its model, and one random batch on the device.

    Returns:
        ``(engine, model, x, y)``; the model has the same weights as the engine's and is in no
        way connected to it.
    """
    ranks = setup_ranks()
    run = for_timing(run, ranks)
    with ranks.together():
        splits = build_data_of(run)
        twin = build_model_of(run, splits).to(ranks.device)
        model = build_model_of(run, splits)
    engine, *_ = initialize(model=model, config=run, ranks=ranks)
    micro_batch, _ = resolve_batch(run.deepspeed, ranks.count)
    generator = torch.Generator().manual_seed(run.dat.seed)
    x = torch.rand(micro_batch, *splits.image_shape, generator=generator)
    y = torch.randint(splits.num_classes, (micro_batch,), generator=generator)
    return engine, twin, x.to(ranks.device), y.to(ranks.device)


def for_timing(run: RunConfig, ranks: Ranks) -> RunConfig:
    """The run on this device, without monitors, which would be a part of what is measured."""
    logs = dataclasses.replace(run.dat.logging, trackers=[])
    dat = dataclasses.replace(run.dat, logging=logs)
    run = dataclasses.replace(run, dat=dat, deepspeed=without_monitors(run.deepspeed))
    return adapt_to_device(run, ranks.device.type)


def optimizer_step(engine: AdversarialEngine, x: Tensor, y: Tensor) -> None:
    """One optimizer step on the same batch in every micro-step."""
    engine.train_step([(x, y)] * engine.accumulation)


def training_loader(run: RunConfig, ranks: Ranks) -> Loader:
    """The loader of a run's training data, as a training run has it."""
    with ranks.together():
        train = build_data_of(run).train
    micro_batch, accumulation = resolve_batch(run.deepspeed, ranks.count)
    return build_loader(train, run.dat, ranks, micro_batch, accumulation)


@dataclass(frozen=True)
class LayerwiseSteps:
    """Result of a few steps of an engine with a layer-wise optimizer.

    Attributes:
        ratios: Trust ratio of every layer, by step.
        state: The model after the last step; on rank 0.
        norms: Bytes that this rank sent for norms in the last step.
    """

    ratios: list[dict[str, float]]
    state: dict[str, Tensor]
    norms: int


def model_and_batches(run: RunConfig, steps: int) -> tuple[Ranks, nn.Module, list[list[Tensor]]]:
    """The ranks, the run's model, and random images and labels of ``steps`` steps.

    Returns:
        Batches ``[x, y]`` of a micro-batch each, in the order step, micro-step, rank; on the CPU.
    """
    ranks = setup_ranks()
    with ranks.together():
        splits = build_data_of(run)
        model = build_model_of(run, splits)
    micro_batch, accumulation = resolve_batch(run.deepspeed, ranks.count)
    count = steps * accumulation * ranks.count * micro_batch
    generator = torch.Generator().manual_seed(run.dat.seed)
    x = torch.rand(count, *splits.image_shape, generator=generator)
    y = torch.randint(splits.num_classes, (count,), generator=generator)
    parts = torch.split(x, micro_batch), torch.split(y, micro_batch)
    return ranks, model, [list(pair) for pair in zip(*parts, strict=True)]


def layerwise_steps(
    run: RunConfig, ranks: Ranks, model: nn.Module, batches: Sequence[Sequence[Tensor]]
) -> LayerwiseSteps:
    """Train ``model`` on ``batches``, each rank on its own; a collective."""
    engine, *_ = initialize(model=model, config=for_timing(run, ranks), ranks=ranks)
    optimizer = hooks.basic_optimizer(engine.deepspeed)
    assert isinstance(optimizer, TrustRatioOptimizer)
    ratios = []
    for first in range(0, len(batches), ranks.count):
        x, y = batches[first + ranks.rank]
        engine.backward(engine(x, y))
        completes = engine.micro_step == engine.accumulation - 1
        engine.step()
        if completes:
            ratios.append(_merged(ranks.gather(optimizer.trust_ratios)))
    norms = engine.metrics["bytes_sent"].get("norms", 0)
    state = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return LayerwiseSteps(ratios, state, norms)


def _merged(by_rank: Sequence[object]) -> dict[str, float]:
    """Ratio of each layer: ranks that hold no piece of it read 1."""
    merged: dict[str, float] = {}
    for ratios in by_rank:
        assert isinstance(ratios, dict)
        merged |= {name: ratio for name, ratio in ratios.items() if merged.get(name, 1.0) == 1.0}
    return merged
