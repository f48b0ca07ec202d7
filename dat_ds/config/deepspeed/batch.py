"""Batch sizes, by DeepSpeed's rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.errors import ConfigError
from dat_ds.method import shown

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


_MOST_MICRO_STEPS = 2**20
"""Of one optimizer step: far above any that ends, and a list of them is still small."""


def count_problems(config: Mapping[str, Any]) -> list[str]:
    """Batch sizes and steps that are not counts, or fit no number of ranks, as messages."""
    problems = [
        f"{key}={shown(value)} is not valid: write an integer of at least 1."
        for key in BATCH_KEYS
        if (value := config.get(key)) is not None and not (type(value) is int and value >= 1)
    ]
    found = problems or _too_many(config.get("gradient_accumulation_steps"))
    return found or _indivisible(config)


def _too_many(accumulation: int | None) -> list[str]:
    if accumulation is None or accumulation <= _MOST_MICRO_STEPS:
        return []
    return [
        f"gradient_accumulation_steps={accumulation}, or what the batch sizes make of it, is not "
        f"valid: an optimizer step has at most {_MOST_MICRO_STEPS} micro-steps."
    ]


def batch_problems(config: Mapping[str, Any]) -> list[str]:
    """The same, and that no size is given; what depends on the number of ranks is left out."""
    if config.get("train_batch_size") is None and (
        config.get("train_micro_batch_size_per_gpu") is None
    ):
        return ["No batch size: write train_micro_batch_size_per_gpu, such as 64."]
    return count_problems(config)


def _indivisible(config: Mapping[str, Any]) -> list[str]:
    """That the total is not a multiple of what one rank takes, whatever the number of ranks is."""
    total, of_rank = config.get("train_batch_size"), 1
    words = []
    for key in BATCH_KEYS[1:]:
        if (value := config.get(key)) is not None:
            of_rank *= value
            words.append(f"{key}={value}")
    if total is None or total % of_rank == 0:
        return []
    below = total // of_rank * of_rank
    valid = " or ".join(str(size) for size in (below, below + of_rank) if size)
    return [
        f"train_batch_size={total} is not a multiple of {' x '.join(words)}: write {valid}, or "
        "leave train_batch_size out."
    ]


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
    if problems := batch_problems(config):
        raise ConfigError("\n".join(problems))
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    if accumulation is None:
        accumulation = 1 if total is None or micro is None else max(1, total // (micro * ranks))
    if problems := _too_many(accumulation):
        raise ConfigError("\n".join(problems))
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
