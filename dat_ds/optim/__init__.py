"""Optimizers, learning-rate schedules and weight averages."""

from dat_ds.optim.build import OPTIMIZERS, build_optimizer, optimizer_options, parameter_groups
from dat_ds.optim.ema import WeightEma
from dat_ds.optim.schedule import Schedule

__all__ = [
    "OPTIMIZERS",
    "Schedule",
    "WeightEma",
    "build_optimizer",
    "optimizer_options",
    "parameter_groups",
]
