"""Strong and weak scaling over ranks, ZeRO stages and codecs, over links that are measured too.

A *point* is one number of ranks, ZeRO stage, codec and link speed. Weak scaling keeps the
micro-batch of a rank, strong scaling the global batch. On one machine ranks are CPU processes,
whose links may be shaped; under a launcher they are the processes that it started.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from dat_ds.bench.records import write_record
from dat_ds.bench.scaling.hosts import run_ranks
from dat_ds.bench.scaling.links import slowest, time_collectives
from dat_ds.bench.scaling.plan import Plan, Point, config_of, points_of
from dat_ds.bench.scaling.report import KIND, describe, draw, read_scaling, write_csv
from dat_ds.bench.timing import (
    MAX_DRIFT,
    check_alone,
    check_drift,
    synchronize,
)
from dat_ds.config import RunConfig, load_config, precision_of
from dat_ds.files import write_json

_WARM_UP = 3  # two steps of a 1-bit optimizer before its freeze, and one after
_RETRIES = 2


def bench_scaling(
    run: RunConfig,
    plan: Plan,
    *,
    output: str | None = None,
    csv: str | None = None,
    plot: str | None = None,
) -> str:
    """Time steps of every point, and the links between the ranks; a collective under a launcher.

    Args:
        run: Gives model, attack, optimizer and batch; its data gives the image size, the images
            themselves are random. Its ZeRO stage and ``dat.compression`` play no part: codecs
            have the options that they have by default.
        plan: Points to measure.
        output: JSON file for the numbers.
        csv: CSV file for the table.
        plot: PNG file for speedups and efficiencies.

    Returns:
        Markdown: a table of points and one of links; empty on other ranks than 0.

    Raises:
        ConfigError: With all that cannot be measured, before anything is; for a machine that
            changed its speed, after the record is written.
    """
    launched = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    points = points_of(run, plan, launched)
    configs = [config_of(run, point) for point in points]
    if launched is not None:
        measured = _measure_here(points, configs, plan.repetitions, is_whole_run=True)
    else:
        measured = _measure_on_this_machine(points, configs, plan.repetitions)
    if not measured:
        return ""
    device, again = torch.device(measured.pop("device")), measured.pop("again")
    drift = drift_of(measured["points"], again)
    values = {
        "bench": KIND,
        **measured,
        "clock_drift": drift,
        "cores": os.cpu_count() or 1,
        "launched": launched is not None,
        "config": run.to_dict(),
    }
    write_record(output, values, device)
    check_drift(drift)
    return _report(values, csv, plot)


def drift_of(points: Sequence[Mapping[str, Any]], again: Sequence[float]) -> float:
    """Factor by which the machine changed its speed: the furthest from 1 that is seen.

    Seen are the first point's steps and ``again``, its steps at the end; and rank 0's forwards
    while the others wait, which are the same in all points of a micro-batch.
    """
    found = [statistics.median(again) / statistics.median(points[0]["seconds"]), *_slowness(points)]
    return float(max(found, key=lambda ratio: abs(math.log(ratio))))


def slow_points(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """Points that were measured while the machine was slower than it can be by more than 20 %."""
    return [i for i, slowness in enumerate(_slowness(points)) if slowness > MAX_DRIFT]


def _slowness(points: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rank 0's forward while the others wait, over the fastest one of its micro-batch, by point.

    The fastest of a point's forwards counts: it is the machine's speed, less interruptions.
    """
    fastest: dict[int, float] = {}
    for point in points:
        size, seconds = point["micro_batch"], min(point["seconds_alone"])
        fastest[size] = min(seconds, fastest.get(size, seconds))
    return [min(point["seconds_alone"]) / fastest[point["micro_batch"]] for point in points]


def merge_scaling(
    paths: Sequence[str],
    *,
    output: str | None = None,
    csv: str | None = None,
    plot: str | None = None,
) -> str:
    """One table of the points in several files of :func:`bench_scaling`.

    Args:
        paths: Files of runs that differ in ranks, stages, codecs or links only.
        output: JSON file for all points together.
        csv: CSV file for the table.
        plot: PNG file for speedup and efficiency.

    Raises:
        ConfigError: For files that are something else, or do not belong together.
    """
    values = read_scaling(paths)
    if output is not None:
        write_json(Path(output), values)
    return _report(values, csv, plot)


def _report(values: Mapping[str, Any], csv: str | None, plot: str | None) -> str:
    if csv is not None:
        write_csv(values, csv)
    if plot is not None:
        draw(values, plot)
    return describe(values)


def _measure_on_this_machine(
    points: Sequence[Point], configs: Sequence[Mapping[str, Any]], repetitions: int
) -> dict[str, Any]:
    """All points, group by group of ranks and link, slow ones anew, and the first one again."""
    measured: list[dict[str, Any]] = [{} for _ in points]
    links: dict[tuple[int, float | None], list[dict[str, Any]]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan, result = Path(folder) / "plan.json", Path(folder) / "result.json"

        def measure(numbers: Sequence[int]) -> dict[str, Any]:
            chosen = [dataclasses.asdict(points[i]) for i in numbers]
            planned = {"points": chosen, "configs": [configs[i] for i in numbers]}
            text = json.dumps({**planned, "repetitions": repetitions})
            plan.write_text(text, encoding="utf-8")
            point = points[numbers[0]]
            run_ranks(__name__, [str(plan), str(result)], ranks=point.ranks, mbit=point.mbit)
            return dict(json.loads(result.read_text(encoding="utf-8")))

        left = list(range(len(points)))
        for _ in range(1 + _RETRIES):
            groups: dict[tuple[int, float | None], list[int]] = {}
            for i in left:
                groups.setdefault((points[i].ranks, points[i].mbit), []).append(i)
            for group, numbers in groups.items():
                found = measure(numbers)
                links.setdefault(group, found["links"])
                for i, point in zip(numbers, found["points"], strict=True):
                    measured[i] = point
            left = slow_points(measured)
        again = measure([0])["points"][0]["seconds"]
    return {
        "points": measured,
        "links": [link for group in links.values() for link in group],
        "device": "cpu",
        "num_parameters": found["num_parameters"],
        "again": again,
    }


def _measure_here(
    points: Sequence[Point],
    configs: Sequence[Mapping[str, Any]],
    repetitions: int,
    *,
    is_whole_run: bool = False,
) -> dict[str, Any]:
    """All points, in this process as one of several ranks.

    Args:
        points: Points to measure.
        configs: Of each.
        repetitions: Timed steps of each.
        is_whole_run: Measure slow points anew, and the first one again, at the end; else whoever
            started this process does.

    Returns:
        On rank 0; an empty dict elsewhere.
    """
    from dat_ds.engine.launch import setup_ranks

    ranks = setup_ranks()
    with ranks.together():
        check_alone(ranks.device)
    measured: dict[str, Any] = {"points": [], "links": []}
    if ranks.count > 1:
        measured["links"] = time_collectives(ranks, points[0].mbit, repetitions)
    measured["points"] = [{} for _ in points]
    left = list(range(len(points)))
    for _ in range(1 + (_RETRIES if is_whole_run else 0)):
        for i in left:
            found = _time_point(configs[i], repetitions)
            measured["num_parameters"] = found.pop("num_parameters")
            measured["points"][i] = {**dataclasses.asdict(points[i]), **found}
        # As the rank saw it that was alone.
        left = cast("list[int]", ranks.gather(slow_points(measured["points"]))[0])
    if is_whole_run:
        measured["again"] = _time_point(configs[0], repetitions)["seconds"]
    measured["device"] = str(ranks.device)
    return measured if ranks.is_main else {}


def _time_point(config: Mapping[str, Any], repetitions: int) -> dict[str, Any]:
    """Steps of one point, each beside the forwards of a floor; a collective.

    Seconds are those of the slowest rank. Forwards run on all ranks at once: where ranks share
    cores, they share them as in a step. Rank 0 repeats them alone: those show the machine's speed.
    """
    from dat_ds.bench.engines import optimizer_step, prepared_engine

    run = load_config(config)
    engine, model, x, y = prepared_engine(run)
    model.eval()
    ranks, device = engine.ranks, engine.ranks.device
    precision, steps = precision_of(run.deepspeed), getattr(run.dat.attack, "steps", 1)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    rounds, phases, forward, alone = [], [], [], []

    def time_forwards() -> float:
        start = time.perf_counter()
        low = torch.autocast(device.type, dtype, enabled=precision != "float32")
        with torch.no_grad(), low:
            for _ in range(2 * steps + 3):
                model(x)
        synchronize(device)
        return (time.perf_counter() - start) / (2 * steps + 3)

    for repetition in range(-_WARM_UP, repetitions):
        ranks.barrier()
        synchronize(device)
        start = time.perf_counter()
        optimizer_step(engine, x, y)
        synchronize(device)
        seconds = time.perf_counter() - start
        ranks.barrier()
        together = time_forwards()
        ranks.barrier()
        by_itself = time_forwards() if ranks.is_main else together
        if repetition >= 0:
            forward.append(together)
            alone.append(by_itself)
            rounds.append(seconds)
            phases.append([engine.metrics[f"seconds_{phase}"] for phase in ("attack", "update")])
    attack, update = zip(*phases, strict=True)
    found = {
        "gradient_accumulation_steps": engine.accumulation,
        "attack_steps": steps,
        "seconds": slowest(ranks, rounds),
        "seconds_attack": statistics.median(slowest(ranks, attack)),
        "seconds_update": statistics.median(slowest(ranks, update)),
        "bytes_sent": engine.metrics["bytes_sent"],
        "collectives": engine.collectives,
        "seconds_forward": slowest(ranks, forward),
        "seconds_alone": alone,
        "num_parameters": sum(
            getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()
        ),
    }
    engine.close()
    return found


def _measure_planned(plan: Path, result: Path) -> None:
    """A rank's part of :func:`bench_scaling` on this machine."""
    planned = json.loads(plan.read_text(encoding="utf-8"))
    points = [Point(**values) for values in planned["points"]]
    measured = _measure_here(points, planned["configs"], planned["repetitions"])
    if measured:
        result.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    from dat_ds.processes import end_process

    _measure_planned(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
