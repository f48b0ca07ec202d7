"""Batch sizes, by DeepSpeed's rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.errors import ConfigError


def resolve_batch(config: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Micro-batch per rank and accumulation steps, by DeepSpeed's rule.

    ``train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks``.

    Args:
        config: DeepSpeed's part of a resolved run config.
        ranks: Number of data-parallel ranks.

    Returns:
        ``(micro_batch, accumulation)``.

    Raises:
        ConfigError: Where the three do not agree.
    """
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    named = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    for key, value in named.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not is_count:
            raise ConfigError(f"{key}={value!r} is not valid: write an integer of at least 1.")
    if micro is None and total is None:
        raise ConfigError("No batch size: write train_micro_batch_size_per_gpu, such as 64.")
    if accumulation is None:
        accumulation = 1 if total is None or micro is None else max(1, total // (micro * ranks))
    if micro is None:
        assert total is not None
        micro = max(1, total // (accumulation * ranks))
    if total is not None and total != micro * accumulation * ranks:
        raise ConfigError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accumulation} x {ranks} ranks = "
            f"{micro * accumulation * ranks}: change one of them, or leave one out."
        )
    return micro, accumulation
