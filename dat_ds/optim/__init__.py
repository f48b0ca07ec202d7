"""Optimizers, learning-rate schedules and weight averages."""

from dat_ds.optim.build import build_optimizer, parameter_groups
from dat_ds.optim.ema import WeightEma
from dat_ds.optim.schedule import Schedule

__all__ = ["Schedule", "WeightEma", "build_optimizer", "parameter_groups"]
