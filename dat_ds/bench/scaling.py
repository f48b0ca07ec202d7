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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from dat_ds.bench.cost_model import COLLECTIVES, ONE_BIT, Collective
from dat_ds.bench.hosts import run_ranks
from dat_ds.bench.network import ShapedNetwork
from dat_ds.bench.records import write_record
from dat_ds.bench.scaling_report import KIND, describe, draw, read_scaling, write_csv
from dat_ds.bench.timing import (
    MAX_DRIFT,
    MIN_REPETITIONS,
    check_alone,
    check_drift,
    check_repetitions,
    synchronize,
)
from dat_ds.compression import CODECS
from dat_ds.config import RunConfig, load_config, one_bit_name, precision_of, resolve_batch
from dat_ds.config.deepspeed_keys import ONE_BIT_OPTIMIZERS
from dat_ds.config.parse import did_you_mean
from dat_ds.errors import ConfigError
from dat_ds.files import write_json

MODES = ("weak", "strong")
# torch renamed them in 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_WARM_UP = 3  # two steps of a 1-bit optimizer before its freeze, and one after
_FREEZE_STEP = 2
_RETRIES = 2
_PROBE_BYTES = tuple(4**exponent for exponent in range(6, 14))  # 4 KiB to 64 MiB
_LONGEST_PROBE = 0.2  # seconds: where one takes longer, larger ones are left out


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        ranks: Numbers of ranks; None means 1 and 2, or under a launcher those that there are.
        stages: ZeRO stages.
        codecs: ``none``, codecs of ``dat.compression``, and 1-bit optimizers, by our names or
            DeepSpeed's. Those are measured under stage 0, which has to be among the stages.
        modes: ``weak``, ``strong``, or both.
        mbit: Speeds of every rank's link; none leaves them on this machine's loopback.
        repetitions: Timed steps of every point.
        global_batch: Images of a step in strong scaling; None means those of a step of one rank.
    """

    ranks: tuple[int, ...] | None = None
    stages: tuple[int, ...] = (0, 2, 3)
    codecs: tuple[str, ...] = ("none", "int8", "one_bit_adam")
    modes: tuple[str, ...] = ("weak",)
    mbit: tuple[float, ...] = ()
    repetitions: int = MIN_REPETITIONS
    global_batch: int | None = None


@dataclass(frozen=True)
class Point:
    """One row of the table; ``mode`` is ``both`` where weak and strong are the same."""

    mode: str
    ranks: int
    zero_stage: int
    codec: str
    micro_batch: int
    mbit: float | None


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
        plan: What to measure.
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
        csv: As for :func:`bench_scaling`.
        plot: As for :func:`bench_scaling`.

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


def points_of(run: RunConfig, plan: Plan, launched: int | None = None) -> list[Point]:
    """All points of a plan, by number of ranks and link.

    With one rank nothing travels: it is measured once for all links, and without codecs.

    Args:
        run: Gives the batch.
        plan: What to measure.
        launched: Number of ranks that a launcher started; None without one.

    Raises:
        ConfigError: With every problem of the plan.
    """
    problems: list[str] = []
    try:
        check_repetitions(plan.repetitions)
    except ConfigError as error:
        problems.append(str(error))
    default = (1, 2) if launched is None else (launched,)
    counts = tuple(dict.fromkeys(default if plan.ranks is None else plan.ranks))
    codecs = tuple(dict.fromkeys(_codec_of(word, problems) for word in plan.codecs))
    stages, modes = tuple(dict.fromkeys(plan.stages)), tuple(dict.fromkeys(plan.modes))
    problems += [f"--ranks {n}: give at least 1." for n in counts if n < 1]
    problems += [f"--stages {s}: ZeRO has 0, 1, 2, 3." for s in stages if s not in range(4)]
    problems += [f"--mode {m}: write weak, strong, or both." for m in modes if m not in MODES]
    problems += _link_problems(plan, counts, launched)
    one_bit = [name for name in codecs if name in ONE_BIT]
    if one_bit and 0 not in stages:
        problems.append(
            f"--codecs {' '.join(one_bit)} with --stages {' '.join(map(str, stages))}: 1-bit "
            "optimizers need whole gradients on every rank: add stage 0, or leave them out."
        )
    of_run = one_bit_name(run.deepspeed, run.dat)
    if of_run is not None and len(one_bit) < len(codecs):
        problems.append(
            f"The run's optimizer is {of_run!r}, which sends no gradients: name AdamW, and measure "
            f"it by --codecs {of_run}."
        )
    batches = _micro_batches(run, plan, [n for n in counts if n >= 1], modes, problems)
    points = []
    for count in counts:
        for mbit in (plan.mbit or (None,)) if count > 1 else (None,):
            for mode, micro_batch in batches.get(count, {}).items():
                points += [
                    Point(mode, count, stage, codec, micro_batch, mbit)
                    for stage in stages
                    for codec in _measured(codecs, stage, count)
                ]
    if not problems:
        problems += _config_problems(run, points)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return points


def _codec_of(word: str, problems: list[str]) -> str:
    """Our name of a codec or of a 1-bit optimizer."""
    name = ONE_BIT_OPTIMIZERS.get(word.replace("_", "").lower(), (word,))[0]
    if name == "zero_one_adam":
        problems.append(
            f"--codecs {word}: its steps send anything from nothing to a whole gradient, so none "
            f"stands for the others. Choose from {', '.join(ONE_BIT)}."
        )
    elif name not in ("none", *CODECS, *ONE_BIT):
        names = ("none", *CODECS, *ONE_BIT)
        problems.append(
            f"--codecs {word}: no codec of that name{did_you_mean(word, names)}. "
            f"Choose from {', '.join(names)}."
        )
    return name


def _measured(codecs: Sequence[str], stage: int, ranks: int) -> list[str]:
    """Codecs that a stage is measured with: a single rank's always without."""
    found = [name for name in codecs if name not in ONE_BIT or stage == 0]
    if ranks == 1:
        return list(dict.fromkeys(["none", *(name for name in found if name in ONE_BIT)]))
    return found


def _link_problems(plan: Plan, counts: Sequence[int], launched: int | None) -> list[str]:
    problems = [
        f"--mbit {m}: give megabits a second, more than 0."
        for m in plan.mbit
        if not (math.isfinite(m) and m > 0)
    ]
    if launched is not None:
        if tuple(counts) != (launched,):
            problems.append(
                f"--ranks {' '.join(map(str, counts))}: the launcher started {launched}. Leave "
                "--ranks out, start once for every number of ranks, and put the files into one "
                "table with --merge."
            )
        if plan.mbit:
            problems.append("--mbit under a launcher: the links are what they are. Leave it out.")
    elif plan.mbit and not problems and max(counts) > 1:
        try:
            ShapedNetwork(max(counts), plan.mbit[0])
        except ConfigError as error:
            problems.append(f"--mbit: {error}")
    return problems


def _micro_batches(
    run: RunConfig,
    plan: Plan,
    counts: Sequence[int],
    modes: Sequence[str],
    problems: list[str],
) -> dict[int, dict[str, int]]:
    """Micro-batch of every mode, by number of ranks; modes with the same one are ``both``."""
    micro_batch, accumulation = resolve_batch(run.deepspeed, 1)
    total = micro_batch * accumulation if plan.global_batch is None else plan.global_batch
    found: dict[int, dict[str, int]] = {}
    for count in counts:
        of_mode = {}
        if "weak" in modes:
            of_mode["weak"] = micro_batch
        if "strong" in modes:
            if total < 1 or total % (count * accumulation):
                problems.append(
                    f"--mode strong --ranks {count}: a global batch of {total} images cannot be "
                    f"divided into {count * accumulation} micro-batches. Write --global_batch, or "
                    "another train_micro_batch_size_per_gpu."
                )
                continue
            of_mode["strong"] = total // (count * accumulation)
        if len(of_mode) == 2 and of_mode["weak"] == of_mode["strong"]:
            of_mode = {"both": micro_batch}
        found[count] = of_mode
    return found


def _config_problems(run: RunConfig, points: Sequence[Point]) -> list[str]:
    problems = []
    for stage, codec in dict.fromkeys((point.zero_stage, point.codec) for point in points):
        try:
            load_config(config_of(run, Point("weak", 1, stage, codec, 1, None)))
        except ConfigError as error:
            problems.append(f"--stages {stage} with --codecs {codec}: {error}")
    return problems


def config_of(run: RunConfig, point: Point) -> dict[str, Any]:
    """The run's config for one point.

    Under ZeRO-3 even small parameters are sharded, unless the run names a threshold: else a model
    small enough to be measured anywhere would hardly send any.
    """
    config = json.loads(json.dumps(run.to_dict()))
    _, accumulation = resolve_batch(run.deepspeed, 1)
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = point.micro_batch
    config["gradient_accumulation_steps"] = accumulation
    zero = config["zero_optimization"]
    zero.pop("reduce_scatter", None)
    zero["stage"] = point.zero_stage
    if point.zero_stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)
    if point.codec in ONE_BIT:
        params = {"lr": 1e-4, "freeze_step": _FREEZE_STEP}
        config["optimizer"] = {"type": ONE_BIT[point.codec], "params": params}
        config["dat"].pop("optimizer", None)
    name = "none" if point.codec in ONE_BIT else point.codec
    config["dat"]["compression"] = {"name": name}
    return dict(config)


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
        points: What to measure.
        configs: Of each.
        repetitions: Timed steps of each.
        is_whole_run: Measure slow points anew, and the first one again, at the end; else whoever
            started this process does.

    Returns:
        On rank 0; an empty dict elsewhere.
    """
    from dat_ds.engine.distributed import setup_ranks

    ranks = setup_ranks()
    with ranks.together():
        check_alone(ranks.device)
    measured: dict[str, Any] = {"points": [], "links": []}
    if ranks.count > 1:
        measured["links"] = _time_collectives(ranks, points[0].mbit, repetitions)
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
    from dat_ds.engine.bench import optimizer_step, prepared_engine

    run = load_config(config)
    engine, model, x, y = prepared_engine(run)
    model.eval()
    ranks, device = engine.ranks, engine.ranks.device
    precision, steps = precision_of(run.deepspeed), run.dat.attack.steps or 0
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
        "seconds": _slowest(ranks, rounds),
        "seconds_attack": statistics.median(_slowest(ranks, attack)),
        "seconds_update": statistics.median(_slowest(ranks, update)),
        "bytes_sent": engine.metrics["bytes_sent"],
        "collectives": engine.collectives,
        "seconds_forward": _slowest(ranks, forward),
        "seconds_alone": alone,
        "num_parameters": sum(
            getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()
        ),
    }
    engine.close()
    return found


def _slowest(ranks: Any, seconds: Sequence[float]) -> list[float]:
    """Each round's seconds on the rank that took longest in it."""
    return [max(of_round) for of_round in zip(*ranks.gather(list(seconds)), strict=True)]


def _time_collectives(ranks: Any, mbit: float | None, repetitions: int) -> list[dict[str, Any]]:
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
            found.append({**origin, "seconds": _slowest(ranks, seconds)})
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


def _measure_planned(plan: Path, result: Path) -> None:
    """A rank's part of :func:`bench_scaling` on this machine."""
    planned = json.loads(plan.read_text(encoding="utf-8"))
    points = [Point(**values) for values in planned["points"]]
    measured = _measure_here(points, planned["configs"], planned["repetitions"])
    if measured:
        result.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    from dat_ds.cli.main import end_process

    _measure_planned(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
