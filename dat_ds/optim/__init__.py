"""Optimizers, learning-rate schedules and weight averages."""

from dat_ds.optim.build import OPTIMIZERS, build_optimizer
from dat_ds.optim.compressed import CompressedOptimizer
from dat_ds.optim.ema import WeightEma
from dat_ds.optim.groups import ParameterOptions, split_groups
from dat_ds.optim.lamb import Lamb
from dat_ds.optim.lars import Lars
from dat_ds.optim.layerwise import PADDING, LayerwiseOptimizer, Layout, Segments
from dat_ds.optim.method import OptimizerMethod, parameter_groups
from dat_ds.optim.one_bit_adam import OneBitAdam
from dat_ds.optim.one_bit_lamb import OneBitLamb
from dat_ds.optim.schedule import (
    SCHEDULES,
    Constant,
    Cosine,
    Linear,
    Schedule,
    ScheduleMethod,
    Step,
    lr_scale,
    usual_scaling,
)
from dat_ds.optim.stability import VarianceStability
from dat_ds.optim.trust_ratio import TrustRatioOptimizer
from dat_ds.optim.zero_one_adam import ZeroOneAdam

__all__ = [
    "OPTIMIZERS",
    "PADDING",
    "SCHEDULES",
    "CompressedOptimizer",
    "Constant",
    "Cosine",
    "Lamb",
    "Lars",
    "LayerwiseOptimizer",
    "Layout",
    "Linear",
    "OneBitAdam",
    "OneBitLamb",
    "OptimizerMethod",
    "ParameterOptions",
    "Schedule",
    "ScheduleMethod",
    "Segments",
    "Step",
    "TrustRatioOptimizer",
    "VarianceStability",
    "WeightEma",
    "ZeroOneAdam",
    "build_optimizer",
    "lr_scale",
    "parameter_groups",
    "split_groups",
    "usual_scaling",
]
