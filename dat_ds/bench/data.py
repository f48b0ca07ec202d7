"""Speed of decoding images beside torchvision's decoder, and the time that a step waits for data.

Pictures are made up: smooth, with noise, as photographs are to a decoder; of 224 x 224 pixels and
of the usual size of ImageNet's files.
"""

from __future__ import annotations

import io
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dat_ds.bench.records import write_record
from dat_ds.bench.timing import (
    check_alone,
    check_drift,
    check_repetitions,
    clock_drift,
    synchronize,
    time_in_turn,
)
from dat_ds.config import RunConfig
from dat_ds.data.decoding import decode_image

OURS, TORCHVISION, PILLOW = "dat_ds", "torchvision.io.decode_jpeg", "Pillow"
SIZES = ((224, 224), (375, 500))
"""Heights and widths."""
_PICTURES = 32
_WARM_UP = 3


def bench_data(run: RunConfig, *, repetitions: int, output: str | None = None) -> str:
    """Time decoders in turn, and training steps on the run's own data; a collective.

    Args:
        run: Run whose steps are timed, with its data, workers and attack.
        repetitions: Timed rounds, and timed steps.
        output: JSON file for the numbers, written by rank 0.

    Returns:
        Markdown: images per second by decoder, and the share of a step that waits for data. Empty
        on other ranks than 0.

    Raises:
        ConfigError: Fewer than 5 repetitions, or a machine that was not steady.
    """
    check_repetitions(repetitions)
    from dat_ds.bench.engines import optimizer_step, prepared_engine, training_loader

    engine, _, x, y = prepared_engine(run)
    ranks = engine.ranks
    with ranks.together():
        check_alone(ranks.device)
    loader = training_loader(run, ranks)
    steps = (step for _ in itertools.count() for step in loader.steps())
    waits, updates = [], []
    for repetition in range(-_WARM_UP, repetitions):
        synchronize(ranks.device)
        start = time.perf_counter()
        next(steps)
        fetched = time.perf_counter()
        optimizer_step(engine, x, y)
        synchronize(ranks.device)
        if repetition >= 0:
            waits.append(fetched - start)
            updates.append(time.perf_counter() - fetched)
    steps.close()
    rounds = {size: time_decoders(size, repetitions) for size in SIZES}
    drift = max(
        (clock_drift(seconds[TORCHVISION]) for seconds in rounds.values()),
        key=lambda factor: max(factor, 1 / factor),
    )
    numbers: dict[str, Any] = {
        "images_per_second": {
            f"{h}x{w}": {
                name: _PICTURES / statistics.median(values) for name, values in seconds.items()
            }
            for (h, w), seconds in rounds.items()
        },
        "over_torchvision": {
            f"{h}x{w}": statistics.median(
                other / own for own, other in zip(s[OURS], s[TORCHVISION], strict=True)
            )
            for (h, w), s in rounds.items()
        },
        "seconds": {"wait": waits, "step": updates},
        "waiting_share": sum(waits) / (sum(waits) + sum(updates)),
        "num_workers": run.dat.data.num_workers,
        "data": run.dat.data.name,
        "drift": drift,
        "threads": torch.get_num_threads(),
        "ranks": ranks.count,
    }
    with ranks.together():
        if ranks.is_main:
            write_record(output, numbers, ranks.device)
        check_drift(drift)
    return _table(numbers) if ranks.is_main else ""


def time_decoders(size: tuple[int, int], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each decoder for 32 JPEG pictures, in each round."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    files = [_jpeg(size, seed) for seed in range(_PICTURES)]
    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    parts: dict[str, Callable[[], object]] = {
        OURS: lambda: [decode_image(file, "picture", "bench").shape for file in files],
        TORCHVISION: lambda: [decode_jpeg(file, mode=ImageReadMode.RGB).shape for file in encoded],
        PILLOW: lambda: [np.array(Image.open(io.BytesIO(file))).shape for file in files],
    }
    return time_in_turn(parts, repetitions, torch.device("cpu"))


def _jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A picture as a JPEG file of quality 90."""
    from PIL import Image

    random = np.random.default_rng(seed)
    rough = random.integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(rough).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth, dtype=np.float64) + random.normal(0, 6, (*size, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _table(numbers: dict[str, Any]) -> str:
    by_size = numbers["images_per_second"]
    lines = [f"| images/s decoded | {' | '.join(by_size)} |", f"|---|{'---|' * len(by_size)}"]
    for name in (OURS, TORCHVISION, PILLOW):
        lines.append(f"| {name} | {' | '.join(f'{s[name]:.0f}' for s in by_size.values())} |")
    ratios = " and ".join(f"{ratio:.2f}" for ratio in numbers["over_torchvision"].values())
    wait, step = (1000 * statistics.median(v) for v in numbers["seconds"].values())
    return "\n".join(
        [
            *lines,
            "",
            f"{OURS} decodes {ratios} times as fast as {TORCHVISION}.",
            f"A step of {numbers['data']} waits {wait:.1f} ms for its data and then takes "
            f"{step:.1f} ms: {numbers['waiting_share']:.1%} of the time is waiting, with "
            f"{numbers['num_workers']} worker(s).",
        ]
    )
