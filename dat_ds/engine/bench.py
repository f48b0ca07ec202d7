"""An engine set up for timing, with a twin of its model to time by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dat_ds.config import RunConfig, adapt_to_device, resolve_batch
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.build import initialize
from dat_ds.engine.distributed import setup_ranks
from dat_ds.engine.run import build_data_of, build_model_of


def prepared_engine(run: RunConfig) -> tuple[AdversarialEngine, nn.Module, Tensor, Tensor]:
    """The engine of a run, a copy of its model, and one random batch on the device.

    Returns:
        ``(engine, model, x, y)``; the model has the same weights as the engine's and is in no
        way connected to it.
    """
    ranks = setup_ranks()
    run = adapt_to_device(run, ranks.device.type)
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
