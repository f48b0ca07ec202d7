"""Optimizers, learning-rate schedules and weight averages."""

from dat_ds.optim.build import (
    OPTIMIZERS,
    PRESETS,
    build_optimizer,
    optimizer_options,
    parameter_groups,
)
from dat_ds.optim.ema import WeightEma
from dat_ds.optim.lamb import Lamb
from dat_ds.optim.lars import Lars
from dat_ds.optim.schedule import Schedule, lr_scale, usual_scaling
from dat_ds.optim.trust_ratio import PADDING, LayerwiseOptimizer, Layout, Segments

__all__ = [
    "OPTIMIZERS",
    "PADDING",
    "PRESETS",
    "Lamb",
    "Lars",
    "LayerwiseOptimizer",
    "Layout",
    "Schedule",
    "Segments",
    "WeightEma",
    "build_optimizer",
    "lr_scale",
    "optimizer_options",
    "parameter_groups",
    "usual_scaling",
]
