"""Time of collectives over a link."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from dat_ds.bench.prediction.cost_model import COLLECTIVES, Collective
from dat_ds.bench.timing import synchronize

# torch renamed them in 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_PROBE_BYTES = tuple(4**exponent for exponent in range(6, 14))  # 4 KiB to 64 MiB


_LONGEST_PROBE = 0.2  # seconds: where one takes longer, larger ones are left out


def slowest(ranks: Any, seconds: Sequence[float]) -> list[float]:
    """Each round's seconds on the rank that took longest in it."""
    return [max(of_round) for of_round in zip(*ranks.gather(list(seconds)), strict=True)]


def time_collectives(ranks: Any, mbit: float | None, repetitions: int) -> list[dict[str, Any]]:
    """Seconds of every collective on the slowest rank, at several sizes of the whole tensor."""
    found = []
    for collective in COLLECTIVES:
        for size in _PROBE_BYTES:
            run = _prepared_collective(collective, size, ranks.count, ranks.device)
            seconds = []
            for repetition in range(-1, repetitions):
                ranks.barrier()
                synchronize(ranks.device)
                start = time.perf_counter()
                run()
                synchronize(ranks.device)
                if repetition >= 0:
                    seconds.append(time.perf_counter() - start)
            origin = {"ranks": ranks.count, "mbit": mbit, "collective": collective, "bytes": size}
            found.append({**origin, "seconds": slowest(ranks, seconds)})
            if statistics.median(found[-1]["seconds"]) > _LONGEST_PROBE:
                break
    return found


def _prepared_collective(
    collective: Collective, size: int, ranks: int, device: torch.device
) -> Any:
    share = torch.zeros(-(-size // (4 * ranks)), device=device)
    whole = share.new_zeros(len(share) * ranks)
    if collective == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if collective == "reduce_scatter":
        return lambda: _reduce_scatter(share, whole)
    if collective == "all_gather":
        return lambda: _all_gather(whole, share)
    received = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(received, whole)
