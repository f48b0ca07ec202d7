"""The optimizers by name, and building one from plain settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dat_ds.method import Table, build_method, table_of
from dat_ds.optim.adamw import AdamWMethod
from dat_ds.optim.lamb import LambMethod
from dat_ds.optim.lars import LarsMethod
from dat_ds.optim.method import OptimizerMethod
from dat_ds.optim.muon import MuonMethod
from dat_ds.optim.one_bit_adam import OneBitAdamMethod
from dat_ds.optim.one_bit_lamb import OneBitLambMethod
from dat_ds.optim.sgd import SgdMethod
from dat_ds.optim.zero_one_adam import ZeroOneAdamMethod

OPTIMIZERS: Table[OptimizerMethod] = table_of(
    "optimizer",
    OptimizerMethod,
    [
        AdamWMethod,
        SgdMethod,
        LambMethod,
        LarsMethod,
        MuonMethod,
        OneBitAdamMethod,
        OneBitLambMethod,
        ZeroOneAdamMethod,
    ],
)
"""The choices of ``dat.optimizer``: a new optimizer is a file and a place in this list."""


def build_optimizer(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build an optimizer from the keys of ``dat.optimizer``.

    Args:
        model: Its trainable parameters are optimised.
        config: ``name`` and that optimizer's options; one that is None has its default.

    Raises:
        ConfigError: A ``ValueError`` with all problems: an unknown name or option, a value out of
            range.
    """
    return build_method(OPTIMIZERS, config, "optimizer").build(model)
