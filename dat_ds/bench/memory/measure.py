"""Peak memory of each rank while it trains, by moment of the step.

On a CPU it is the growth of the resident set over what the process held before the model was built;
on a GPU the most that torch's allocator has given out.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dat_ds.bench.memory.moments import ATTACK, START, STEP, UPDATE
from dat_ds.bench.scaling.hosts import run_ranks
from dat_ds.config import RunConfig, load_config

STEPS = 2
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""glibc's settings under which what torch lets go of goes back to the system at once. By itself
glibc raises the size from which it does so to that of the largest block it has freed, up to 32 MB,
and keeps what is smaller."""


def measure_memory(run: RunConfig, ranks: int) -> list[dict[str, Any]]:
    """Train two optimizer steps on random images, and what each rank took at its peak.

    Under a launcher its processes are the ranks; else so many CPU processes of this machine are
    started, with :data:`ALLOCATOR`.

    Args:
        run: The run.
        ranks: Number of CPU processes, without a launcher.

    Returns:
        By rank: ``device`` and ``host``, peak bytes by moment (``host`` is empty on a CPU, where
        the device is the host); ``loss`` of each step, and ``moved``, the largest change of a
        weight that rank 0 holds. Empty on other ranks than 0 of a launcher.
    """
    if "RANK" in os.environ:
        return _measure_here(run)
    with tempfile.TemporaryDirectory() as folder:
        config, result = Path(folder) / "run.json", Path(folder) / "result.json"
        config.write_text(json.dumps(run.to_dict()), encoding="utf-8")
        run_ranks(__name__, [str(config), str(result)], ranks=ranks, variables=ALLOCATOR)
        return list(json.loads(result.read_text(encoding="utf-8")))


def _measure_here(run: RunConfig) -> list[dict[str, Any]]:
    """This process's part, as one of several ranks."""
    from dat_ds.assembly import build_data_of, build_model_of
    from dat_ds.bench.engines import for_timing
    from dat_ds.config import resolve_batch
    from dat_ds.engine import hooks
    from dat_ds.engine.build import initialize
    from dat_ds.engine.launch import setup_ranks

    ranks = setup_ranks()
    run = for_timing(run, ranks)
    with ranks.together():
        splits = build_data_of(run)
    micro_batch, accumulation = resolve_batch(run.deepspeed, ranks.count)
    generator = torch.Generator().manual_seed(run.dat.seed + ranks.rank)
    x = torch.rand(micro_batch, *splits.image_shape, generator=generator).to(ranks.device)
    y = torch.randint(splits.num_classes, (micro_batch,), generator=generator).to(ranks.device)
    _warm_up(run, splits, ranks)
    meter = _Meter(ranks.device)
    with meter.moment(START):
        with ranks.together():
            model = build_model_of(run, splits)
        engine, *_ = initialize(model=model, config=run, ranks=ranks)
        del model
    before = [
        w.detach().reshape(-1)[:1].float().cpu().clone()
        for w in hooks.held_weights(engine.deepspeed)
    ]
    losses = []
    group = run.dat.engine.attack_micro_batches
    for _ in range(STEPS):
        if group > 1:
            with meter.moment(ATTACK):
                engine.attack(torch.cat([x] * group), torch.cat([y] * group))
            with meter.moment(UPDATE):
                losses.append(float(engine.train_step([(x, y)] * accumulation)))
            continue
        for micro_step in range(accumulation):
            with meter.moment(ATTACK):
                engine.attack(x, y)
            with meter.moment(UPDATE):
                loss = engine(x, y)
                engine.backward(loss)
            losses.append(float(loss.detach()))
            del loss
            with meter.moment(STEP if micro_step == accumulation - 1 else UPDATE):
                engine.step()
    after = [
        w.detach().reshape(-1)[:1].float().cpu().clone()
        for w in hooks.held_weights(engine.deepspeed)
    ]
    moved = [(a - b).abs().max() for a, b in zip(after, before, strict=True) if a.numel()]
    found = {
        **meter.peaks(),
        "loss": losses,
        "is_finite": all(map(math.isfinite, losses)),
        "moved": float(max(moved, default=torch.tensor(0.0))),
        "accounted": hooks.accounted_bytes(engine.deepspeed),
    }
    gathered = [dict(each) for each in ranks.gather(found)]  # type: ignore[call-overload]
    engine.close()
    return gathered if ranks.is_main else []


def _warm_up(run: RunConfig, splits: Any, ranks: Any) -> None:
    """A step of a tiny model, so that what libraries load does not count as the run's."""
    from dat_ds.assembly import build_model_of
    from dat_ds.engine.build import initialize

    build_model_of(run, splits, on_meta=True)
    dat = {key: run.to_dict()["dat"][key] for key in ("data", "optimizer", "schedule")}
    plain = load_config({**run.deepspeed, "dat": dat})
    tiny = nn.Sequential(
        nn.Conv2d(splits.image_shape[0], 8, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.Linear(8, max(2, splits.num_classes)),
    )
    engine, *_ = initialize(model=tiny, config=plain, ranks=ranks)
    x, y = torch.rand(1, *splits.image_shape), torch.zeros(1, dtype=torch.int64)
    engine.train_step([(x, y)] * engine.accumulation)
    engine.close()
    del engine, tiny
    gc.collect()


class _Meter:
    """Peaks by moment, over what there was when it was made."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._device: dict[str, int] = {}
        self._host: dict[str, int] = {}
        self._resets = _reset_peak()
        self._base = _resident("VmRSS")

    @contextlib.contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """The peak inside counts for a moment of the step."""
        _reset_peak()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        yield
        host = _resident("VmHWM") - self._base
        self._host[name] = max(host, self._host.get(name, 0))
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            peak = torch.cuda.max_memory_allocated(self._cuda)
            self._device[name] = max(peak, self._device.get(name, 0))

    def peaks(self) -> dict[str, Any]:
        """What was found; without a peak of its own (no /proc), a moment has that up to its end."""
        if self._cuda is None:
            return {"device": self._host, "host": {}, "by_moment": self._resets}
        return {"device": self._device, "host": self._host, "by_moment": self._resets}


def _reset_peak() -> bool:
    """Let the kernel's peak of this process begin anew; False where it does not allow that."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    """``VmRSS`` or its peak ``VmHWM`` of this process, in bytes."""
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(key + ":"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measure_planned(config: Path, result: Path) -> None:
    """A rank's part of :func:`measure_memory` on this machine."""
    found = _measure_here(load_config(json.loads(config.read_text(encoding="utf-8"))))
    if found:
        result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    from dat_ds.processes import end_process

    _measure_planned(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
