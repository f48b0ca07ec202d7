"""Timing side by side, and what makes a time worth reporting."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from dat_ds.errors import ConfigError

MIN_REPETITIONS = 5
MAX_DRIFT = 1.2
"""Largest factor by which a machine may change its speed during a run."""

_WARM_UP = 3


def check_repetitions(repetitions: int) -> None:
    """Refuse too few.

    Raises:
        ConfigError: Fewer than 5.
    """
    if repetitions < MIN_REPETITIONS:
        raise ConfigError(f"--repetitions {repetitions}: give at least {MIN_REPETITIONS}.")


def time_in_turn(
    parts: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each part in each round, after warming up; every round runs every part once.

    A machine that changes its speed so slows all parts alike, and a ratio taken round by round has
    seen the same machine on both sides.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(-_WARM_UP, repetitions):
        for name, run_part in parts.items():
            synchronize(device)
            start = time.perf_counter()
            run_part()
            synchronize(device)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest amount of memory that a call holds above what was held before it.

    On a CPU, of torch's own allocations.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports itself on standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_drift(seconds: Sequence[float]) -> float:
    """Median of the second half of the rounds of one part over that of the first half."""
    half = len(seconds) // 2
    return statistics.median(seconds[half:]) / statistics.median(seconds[:half])


def check_drift(drift: float) -> None:
    """Refuse a run on a machine that changed its speed; after its numbers are written.

    Raises:
        ConfigError: By more than 20 %.
    """
    if not 1 / MAX_DRIFT <= drift <= MAX_DRIFT:
        raise ConfigError(
            f"The machine's speed changed by a factor {drift:.2f} during the run, more than "
            f"{MAX_DRIFT}: no ratio is reported. Repeat it on a quieter machine."
        )


def check_alone(device: torch.device) -> None:
    """Refuse a GPU on which other processes compute.

    Raises:
        ConfigError: With their process ids. Also where ``nvidia-smi`` cannot tell.
    """
    if device.type != "cuda":
        return
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"Cannot tell whether the GPU is shared: {error}") from None
    others = sorted({int(pid) for pid in done.stdout.split() if pid.isdigit()} - {os.getpid()})
    if others:
        raise ConfigError(
            f"GPU {uuid} is shared with the processes {', '.join(map(str, others))}: no time is "
            "reported. Stop them, or choose another GPU with CUDA_VISIBLE_DEVICES."
        )
