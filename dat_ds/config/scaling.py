"""The learning rate for a global batch."""

from __future__ import annotations

import copy
import dataclasses

from dat_ds.config.schema import RunConfig
from dat_ds.optim import lr_scale


def scale_learning_rate(run: RunConfig, global_batch: int) -> tuple[RunConfig, str]:
    """Scale the learning rate to the global batch, as ``dat.schedule.scaling`` says.

    Args:
        run: A resolved run; the learning rate is our optimizer's or DeepSpeed's.
        global_batch: Images per optimizer step.

    Returns:
        The run to build the optimizer from, and what was done, in words; none where nothing was.
    """
    schedule = run.dat.schedule
    if schedule.scaling == "none":
        return run, ""
    assert schedule.base_batch is not None
    factor = lr_scale(schedule.scaling, global_batch, schedule.base_batch)
    config, ours = copy.deepcopy(run.deepspeed), run.dat.optimizer
    if ours is not None:
        assert ours.lr is not None
        lr = ours.lr
        ours = dataclasses.replace(ours, lr=lr * factor)
    else:
        params = config["optimizer"]["params"]
        lr = params["lr"]
        for key in ("lr", "muon_lr", "adam_lr"):
            if key in params:
                params[key] *= factor
    words = (
        f"Learning rate {lr * factor:.6g} = {lr:g} x {factor:.4g}, scaled "
        f"({schedule.scaling}) from a global batch of {schedule.base_batch} to {global_batch}."
    )
    dat = dataclasses.replace(run.dat, optimizer=ours)
    return dataclasses.replace(run, deepspeed=config, dat=dat), words
