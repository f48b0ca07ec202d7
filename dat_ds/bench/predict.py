"""Predicted step times: the cost model, calibrated and checked by what the benchmarks measured.

Of a scaling record, each number of ranks is left out in turn: the coefficients of computation are
fitted to the steps of the others, and predict its own. What its links and its forwards take, which
the record holds beside every step, is an input. Predictions for GPUs take their speed from
the command line: nothing here measures one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dat_ds.bench.cost_model import (
    COLLECTIVES,
    ONE_BIT,
    Cluster,
    Hardware,
    Link,
    Links,
    Workload,
    crossing_mbit,
    fit_link,
    non_negative_fit,
    same_link,
    step_time,
)
from dat_ds.bench.records import read_record, write_record
from dat_ds.bench.scaling_report import MEASURE, read_scaling
from dat_ds.compression import CODECS
from dat_ds.errors import ConfigError

_MIN_POINTS = 6
_SHAPES = ((1, 6), (6, 1), (6, 6))
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_NOWHERE: Links = same_link(Link(0.0, 0.0))
_TERMS = ("overhead", "optimizer", "codec", "one_bit", "sharded")


@dataclass(frozen=True)
class Target:
    """A machine room and a model whose steps are predicted.

    Defaults are ImageNet, ResNet-50 and PGD-4 with 512 images per six GPUs, as Zhang et al., UAI
    2022, train it; 1 Gbit/s between machines; and a V100: 367 images a second of float32 training,
    which is three forwards (NVIDIA DeepLearningExamples, ResNet-50 v1.5 for PyTorch, DGX-1 16 GB).

    Args:
        num_parameters: Of the model.
        attack_steps: ``K``.
        micro_batch: Images of a GPU.
        forward_ms: One forward of one image on a GPU.
        codec_ns: Encoding, and also decoding, an entry on a GPU. Default: 90 bytes moved at 900
            GB/s, a V100's memory bandwidth.
        optimizer_ns: Updating an entry: AdamW moves 28 bytes.
        mbit: Bandwidth of a machine's link.
        latency_us: Latency of a message between machines; default that of TCP over Ethernet.
        inside_mbit: Bandwidth of a GPU's link inside a machine. Default: 10 GB/s, PCI Express 3.
        inside_latency_us: Latency inside a machine.
    """

    num_parameters: int = 25_557_032
    attack_steps: int = 4
    micro_batch: int = 85
    forward_ms: float = 1000 / (3 * 367)
    codec_ns: float = 0.1
    optimizer_ns: float = 28 / 900
    mbit: float = 1000.0
    latency_us: float = 50.0
    inside_mbit: float = 80_000.0
    inside_latency_us: float = 10.0

    def hardware(self, overhead: float) -> Hardware:
        """A GPU."""
        codec = dict.fromkeys(CODECS, 1e-9 * self.codec_ns)
        return Hardware(
            forward=self.forward_ms / 1000,
            overhead=overhead,
            optimizer=1e-9 * self.optimizer_ns,
            encode=codec,
            decode=codec,
        )

    def cluster(self, machines: int, gpus: int) -> Cluster:
        """So many machines."""
        between = Link.of(mbit=self.mbit, microseconds=self.latency_us)
        inside = Link.of(mbit=self.inside_mbit, microseconds=self.inside_latency_us)
        return Cluster(machines, gpus, same_link(between), same_link(inside))

    def work(self, codec: str, stage: int = 0) -> Workload:
        """A step with a codec under a ZeRO stage."""
        return Workload(
            self.num_parameters,
            self.attack_steps,
            self.micro_batch,
            zero_stage=stage,
            codec=codec,
            sides=_default_sides(stage),
        )


def _default_sides(stage: int) -> Literal["single", "double"]:
    """Of dat.compression."""
    return "single" if stage == 3 else "double"


def bench_predict(
    scaling: Sequence[str],
    target: Target,
    *,
    attack: str | None = None,
    compression: str | None = None,
    ranks: Sequence[int] = (8, 64, 512, 4096),
    gpus: int = 1,
    stages: Sequence[int] = (0, 2, 3),
    codecs: Sequence[str] = ("none", "int8", "one_bit_adam"),
    output: str | None = None,
    plot: str | None = None,
) -> str:
    """Check the model against a scaling record, and predict what was not measured.

    Args:
        scaling: Files of ``dat-ds bench scaling``.
        target: What is predicted.
        attack: File of ``dat-ds bench attack``, whose overhead over ``(2 K + 3) F`` then takes the
            place of the one fitted to the scaling record.
        compression: File of ``dat-ds bench compression``: the cost of codecs by name; without it,
            one cost fits all.
        ranks: Numbers of ranks to predict.
        gpus: Ranks of a machine.
        stages: ZeRO stages to predict.
        codecs: Codecs and 1-bit optimizers to predict.
        output: JSON file for the numbers.
        plot: PNG file.

    Returns:
        Markdown: errors of held-out points, step times at 1x6, 6x1 and 6x6 machines x GPUs, step
        times by ranks, and bandwidths from which compression no longer matters.

    Raises:
        ConfigError: For files of another kind, with keys missing, or too few points.
    """
    _check(target, ranks, gpus, stages, codecs)
    values = read_scaling(scaling)
    costs = None if compression is None else _codec_costs(compression)
    over_floor = None if attack is None else _over_floor(attack)
    checked = held_out(values, costs)
    fitted = calibrate(values["points"], values, costs)
    overhead = fitted["overhead"] if over_floor is None else over_floor
    hardware = target.hardware(overhead)
    errors = [abs(row["error"]) for row in checked]
    numbers = {
        "bench": "predict",
        "scaling": list(scaling),
        "attack": attack,
        "compression": compression,
        "target": dataclasses.asdict(target),
        "held_out": checked,
        "median_error": statistics.median(errors),
        "fitted": fitted,
        "overhead": overhead,
        "shapes": _predict_shapes(target, hardware),
        "steps": _predict_steps(target, hardware, ranks, gpus, stages, codecs),
        "crossings": _predict_crossings(target, hardware, gpus),
    }
    write_record(output, numbers, torch.device("cpu"))
    if plot is not None:
        _draw(numbers, target, hardware, gpus, plot)
    return _describe(numbers, target, gpus)


def _check(
    target: Target, ranks: Sequence[int], gpus: int, stages: Sequence[int], codecs: Sequence[str]
) -> None:
    problems = [
        f"--{field.name} {getattr(target, field.name)}: give more than 0."
        for field in dataclasses.fields(target)
        if not (math.isfinite(getattr(target, field.name)) and getattr(target, field.name) > 0)
        and field.name != "attack_steps"
    ]
    if target.attack_steps < 0:
        problems.append(f"--attack_steps {target.attack_steps}: give 0 or more.")
    if gpus < 1:
        problems.append(f"--gpus {gpus}: give at least 1.")
    problems += [
        f"--ranks {n}: give a multiple of --gpus {gpus}, or fewer for part of one machine."
        for n in ranks
        if n < 1 or (gpus >= 1 and n > gpus and n % gpus)
    ]
    problems += [f"--stages {s}: ZeRO has 0, 1, 2, 3." for s in stages if s not in range(4)]
    known = ("none", *CODECS, *ONE_BIT)
    problems += [
        f"--codecs {name}: choose from {', '.join(known)}." for name in codecs if name not in known
    ]
    if problems:
        raise ConfigError("\n".join(problems))


# ---- calibration


def links_of(values: Mapping[str, Any], ranks: int, mbit: float | None) -> Links:
    """Links between ranks, as each collective found them, of a scaling record."""
    if ranks == 1:
        return _NOWHERE
    found = {}
    for collective in COLLECTIVES:
        samples = [
            (timed["bytes"], statistics.median(timed["seconds"]))
            for timed in values["links"]
            if (timed["ranks"], timed["mbit"], timed["collective"]) == (ranks, mbit, collective)
        ]
        if len(samples) < 2:
            raise ConfigError(
                f"The scaling record holds no timed {collective} of {ranks} ranks at "
                f"{'no set speed' if mbit is None else f'{mbit:g} Mbit/s'}: measure it again: "
                f"{MEASURE}"
            )
        found[collective] = fit_link(collective, ranks, samples)
    return found


def slowdown_of(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> float:
    """How much longer a point's forward takes than one rank's alone.

    Where no single rank had its micro-batch, that of points of as many ranks is taken; without any
    of one rank, 1.
    """
    alone: dict[int, list[float]] = {}
    for other in points:
        if other["ranks"] == 1:
            alone.setdefault(other["micro_batch"], []).append(_forward(other))

    def ratios(same: Sequence[Mapping[str, Any]]) -> list[float]:
        known = [other for other in same if other["micro_batch"] in alone]
        return [_forward(o) / statistics.median(alone[o["micro_batch"]]) for o in known]

    found = ratios([point]) or ratios([o for o in points if o["ranks"] == point["ranks"]])
    return statistics.median(found) if found else 1.0


def _forward(point: Mapping[str, Any]) -> float:
    return float(statistics.median(point["seconds_forward"]))


@dataclass(frozen=True)
class _Measured:
    """A point of a scaling record, as the model sees it."""

    work: Workload
    cluster: Cluster
    forward: float
    slowdown: float
    seconds: float

    @classmethod
    def of(cls, point: Mapping[str, Any], values: Mapping[str, Any]) -> _Measured:
        ranks, mbit, micro_batch = point["ranks"], point["mbit"], point["micro_batch"]
        slowdown = slowdown_of(point, values["points"])
        zero_stage, codec = point["zero_stage"], point["codec"]
        work = Workload(
            values["num_parameters"],
            point["attack_steps"],
            micro_batch,
            accumulation=point.get("gradient_accumulation_steps", 1),
            zero_stage=zero_stage,
            codec=codec,
            sides=_default_sides(zero_stage),
        )
        links = links_of(values, ranks, mbit)
        forward = _forward(point) / (slowdown * micro_batch)
        cluster = Cluster(ranks, 1, links, _NOWHERE)
        return cls(work, cluster, forward, slowdown, statistics.median(point["seconds"]))

    def hardware(self, terms: Mapping[str, float], costs: Mapping[str, Any]) -> Hardware:
        """Of a rank of this point, with fitted terms."""
        return Hardware(
            forward=self.forward,
            overhead=terms["overhead"],
            optimizer=terms["optimizer"],
            encode={name: terms["codec"] * c["encode_ns"] for name, c in costs.items()},
            decode={name: terms["codec"] * c["decode_ns"] for name, c in costs.items()},
            one_bit=terms["one_bit"],
            sharded=terms["sharded"],
            slowdown=self.slowdown,
        )


def calibrate(
    points: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, float]] | None,
) -> dict[str, float]:
    """Coefficients of computation that fit the steps of some points best.

    Args:
        points: Of the record.
        values: The record, for links and forwards.
        costs: ``encode_ns`` and ``decode_ns`` by codec; None makes them alike.

    Returns:
        ``overhead`` over ``2 K + 3`` forwards; seconds an entry of ``optimizer`` and ``one_bit``;
        seconds a nanosecond of ``costs``, or an entry without, of ``codec``; seconds a step of
        ``sharded``.
    """
    costs = _alike() if costs is None else costs
    none = dict.fromkeys(_TERMS, 0.0)
    rows, targets, scales = [], [], []
    for point in points:
        measured = _Measured.of(point, values)
        still = Cluster(measured.cluster.machines, 1, _NOWHERE, _NOWHERE)
        # A step is linear in the terms: each one's share is the step with that term alone.
        rows.append(
            [
                step_time(measured.work, measured.hardware({**none, term: 1.0}, costs), still).total
                for term in _TERMS
            ]
        )
        travels = step_time(measured.work, measured.hardware(none, costs), measured.cluster).total
        targets.append(measured.seconds - travels)
        scales.append(measured.seconds)
    return dict(zip(_TERMS, non_negative_fit(rows, targets, scales), strict=True))


def held_out(
    values: Mapping[str, Any], costs: Mapping[str, Mapping[str, float]] | None
) -> list[dict[str, Any]]:
    """Every point of a record, predicted by a fit to the steps of all other numbers of ranks.

    Raises:
        ConfigError: For points of one number of ranks, or too few.
    """
    points = values["points"]
    counts = sorted({point["ranks"] for point in points})
    left = min(sum(point["ranks"] != count for point in points) for count in counts)
    if len(counts) < 2 or left < _MIN_POINTS:
        raise ConfigError(
            f"Too few points: {len(points)}, on {' and '.join(map(str, counts))} rank(s). Leaving "
            f"out one number of ranks has to leave {_MIN_POINTS}. Measure more: {MEASURE} --ranks "
            "1 2 4 --stages 0 2 3 --codecs none int8 one_bit_adam"
        )
    rows = []
    for count in counts:
        others = [point for point in points if point["ranks"] != count]
        terms = calibrate(others, values, costs)
        for point in points:
            if point["ranks"] != count:
                continue
            measured = _Measured.of(point, values)
            hardware = measured.hardware(terms, _alike() if costs is None else costs)
            parts = step_time(measured.work, hardware, measured.cluster)
            keys = ("mode", "ranks", "zero_stage", "codec", "micro_batch", "mbit")
            rows.append(
                {
                    **{key: point[key] for key in keys},
                    "measured": measured.seconds,
                    "predicted": parts.total,
                    "error": parts.total / measured.seconds - 1,
                    "parts": dataclasses.asdict(parts),
                }
            )
    return rows


def _alike() -> dict[str, dict[str, float]]:
    return {name: {"encode_ns": 1.0, "decode_ns": 1.0} for name in CODECS}


def _codec_costs(path: str) -> dict[str, dict[str, float]]:
    command = "dat-ds bench compression --deepspeed_config FILE --output compression.json"
    values = _read(path, "codecs", command)
    found = {}
    for name in CODECS:
        properties = values["codecs"].get(name, {})
        missing = [key for key in ("encode_ns", "decode_ns") if key not in properties]
        if missing:
            keys = ", ".join(f"codecs.{name}.{key}" for key in missing)
            raise ConfigError(f"{path} lacks {keys}. Measure it again: {command}")
        found[name] = {key: float(properties[key]) for key in ("encode_ns", "decode_ns")}
    return found


def _over_floor(path: str) -> float:
    command = "dat-ds bench attack --deepspeed_config FILE --output attack.json"
    found = _read(path, "over_floor", command)["over_floor"]
    if not isinstance(found, (int, float)) or not found > 0:
        raise ConfigError(f"{path}: over_floor={found!r} is no ratio. Measure it again: {command}")
    return float(found)


def _read(path: str, key: str, command: str) -> dict[str, Any]:
    values = read_record(path, command)
    if key not in values:
        raise ConfigError(f"{path} has no {key!r}. A file that has it is written by: {command}")
    return values


# ---- predictions


def _predict_shapes(target: Target, hardware: Hardware) -> list[dict[str, Any]]:
    """Step times at the paper's shapes, and speedups over the first one in float32."""
    first, rows = None, []
    for codec in ("none", *CODECS, "one_bit_adam"):
        for machines, gpus in _SHAPES:
            parts = step_time(target.work(codec), hardware, target.cluster(machines, gpus))
            rate = machines * gpus * target.micro_batch / parts.total
            first = rate if first is None else first
            rows.append(
                {
                    "codec": codec,
                    "machines": machines,
                    "gpus": gpus,
                    "seconds": parts.total,
                    "communication": parts.gradients + parts.parameters,
                    "speedup": rate / first,
                }
            )
    return rows


def _predict_steps(
    target: Target,
    hardware: Hardware,
    ranks: Sequence[int],
    gpus: int,
    stages: Sequence[int],
    codecs: Sequence[str],
) -> list[dict[str, Any]]:
    rows = []
    for count in ranks:
        for stage in stages:
            for codec in codecs:
                work = target.work(codec, stage)
                if work.is_one_bit and stage:
                    continue
                cluster = target.cluster(*_shape(count, gpus))
                parts = step_time(work, hardware, cluster)
                rate = count * target.micro_batch / parts.total
                alone = step_time(target.work("none", stage), hardware, target.cluster(1, 1)).total
                rows.append(
                    {
                        "ranks": count,
                        "zero_stage": stage,
                        "codec": codec,
                        "seconds": parts.total,
                        "images_per_second": rate,
                        "efficiency": alone / parts.total,
                        "parts": dataclasses.asdict(parts),
                    }
                )
    return rows


def _shape(ranks: int, gpus: int) -> tuple[int, int]:
    """Machines and GPUs of each: part of one machine, or several whole ones."""
    return (1, ranks) if ranks <= gpus else (ranks // gpus, gpus)


def _predict_crossings(target: Target, hardware: Hardware, gpus: int) -> list[dict[str, Any]]:
    """Bandwidth from which float32 is within 10 % of a codec, by number of ranks."""
    rows = []
    for count in _RANKS:
        if count <= gpus or count % gpus:
            continue
        machines, inside = _shape(count, gpus)
        cluster = target.cluster(machines, inside)
        row: dict[str, Any] = {"ranks": count}
        for codec in ("int8", "one_bit_adam"):
            row[codec] = crossing_mbit(
                target.work("none"),
                target.work(codec),
                hardware,
                machines=machines,
                gpus=inside,
                inside=cluster.inside,
                alpha=1e-6 * target.latency_us,
            )
        rows.append(row)
    return rows


def _describe(numbers: Mapping[str, Any], target: Target, gpus: int) -> str:
    lines = [
        "Held-out points: the steps of each number of ranks are predicted by a fit to those of the "
        "others; its links and forwards are measured.",
        "",
        "| ranks | mode | batch a rank | ZeRO | codec | Mbit/s | measured ms | predicted ms "
        "| error % |",
        "|" + " --- |" * 9,
    ]
    for row in numbers["held_out"]:
        speed = "-" if row["mbit"] is None else f"{row['mbit']:g}"
        lines.append(
            f"| {row['ranks']} | {row['mode']} | {row['micro_batch']} | {row['zero_stage']} "
            f"| {row['codec']} | {speed} | {1000 * row['measured']:.1f} "
            f"| {1000 * row['predicted']:.1f} | {100 * row['error']:+.1f} |"
        )
    fitted = numbers["fitted"]
    lines += [
        "",
        f"Median error: {100 * numbers['median_error']:.1f} % of {len(numbers['held_out'])} "
        f"points. Fitted to all: a step takes {fitted['overhead']:.2f} times (2K+3) forwards, "
        f"{1e9 * fitted['optimizer']:.2f} ns an entry that is updated, "
        f"{1e9 * fitted['one_bit']:.2f} ns an entry of a 1-bit optimizer, "
        f"{1000 * fitted['sharded']:.1f} ms under ZeRO-3.",
        "",
        f"Predicted, not measured: {target.num_parameters / 1e6:.2f}M parameters, PGD-"
        f"{target.attack_steps}, {target.micro_batch} images a GPU, {target.forward_ms:.3f} ms a "
        f"forward of one, {target.mbit:g} Mbit/s and {target.latency_us:g} us between machines, "
        f"{target.inside_mbit:g} Mbit/s inside, codecs {target.codec_ns:g} ns an entry, a step of "
        f"{numbers['overhead']:.2f} (2K+3) forwards. Machines x GPUs; speedup is of images a "
        "second, over 1x6 in float32:",
        "",
        "| codec | " + " | ".join(f"{m}x{g} ms | speedup" for m, g in _SHAPES) + " |",
        "|" + " --- |" * (1 + 2 * len(_SHAPES)),
    ]
    for codec in dict.fromkeys(row["codec"] for row in numbers["shapes"]):
        of_codec = [row for row in numbers["shapes"] if row["codec"] == codec]
        cells = [f"{1000 * row['seconds']:.0f} | {row['speedup']:.2f}" for row in of_codec]
        lines.append(f"| {codec} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Predicted, not measured, {gpus} GPU(s) a machine; efficiency is over one GPU in float32:",
        "",
        "| ranks | ZeRO | codec | ms a step | images/s | efficiency % | gradients ms "
        "| parameters ms | codec ms |",
        "|" + " --- |" * 9,
    ]
    for row in numbers["steps"]:
        parts = row["parts"]
        lines.append(
            f"| {row['ranks']} | {row['zero_stage']} | {row['codec']} | {1000 * row['seconds']:.0f}"
            f" | {row['images_per_second']:.0f} | {100 * row['efficiency']:.0f} "
            f"| {1000 * parts['gradients']:.0f} | {1000 * parts['parameters']:.0f} "
            f"| {1000 * parts['codec']:.1f} |"
        )
    lines += [
        "",
        f"Predicted, not measured, {gpus} GPU(s) a machine: Mbit/s from which a step in float32 "
        "takes at most 1.1 times one with a codec (ZeRO-0).",
        "",
        "| ranks | int8 | one_bit_adam |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {row['ranks']} | {_bandwidth(row['int8'])} | {_bandwidth(row['one_bit_adam'])} |"
        for row in numbers["crossings"]
    ]
    return "\n".join(lines)


def _bandwidth(mbit: float | None) -> str:
    if mbit is None:
        return "none"
    return "any" if mbit == 0 else f"{mbit:.0f}"


def _draw(
    numbers: Mapping[str, Any], target: Target, hardware: Hardware, gpus: int, path: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (check, scaling, crossing) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for count in sorted({row["ranks"] for row in numbers["held_out"]}):
        rows = [row for row in numbers["held_out"] if row["ranks"] == count]
        x, y = [r["measured"] for r in rows], [r["predicted"] for r in rows]
        check.plot(x, y, marker="o", ls="", label=f"{count} rank{'s' if count > 1 else ''}")
    ends = 0, check.get_xlim()[1]
    check.plot(ends, ends, color="black", ls="--", lw=1)
    check.set(xlabel="measured, s a step", ylabel="predicted, s a step", title="held-out points")
    check.legend(fontsize=8)
    alone = step_time(target.work("none"), hardware, target.cluster(1, 1)).total
    for codec in ("none", "int8", "one_bit_adam"):
        counts = [n for n in _RANKS if n <= gpus or n % gpus == 0]
        seconds = [
            step_time(target.work(codec), hardware, target.cluster(*_shape(n, gpus))).total
            for n in counts
        ]
        efficiency = [100 * alone / s for s in seconds]
        scaling.semilogx(counts, efficiency, base=2, marker="o", lw=1, label=codec)
    title = f"predicted, {target.mbit:g} Mbit/s, {gpus} GPU(s) a machine"
    scaling.set(xlabel="ranks", ylabel="efficiency, %", title=title)
    scaling.legend(title="codec", fontsize=8)
    for codec in ("int8", "one_bit_adam"):
        rows = [row for row in numbers["crossings"] if row[codec]]
        x, y = [row["ranks"] for row in rows], [row[codec] for row in rows]
        crossing.plot(x, y, marker="o", lw=1, label=codec)
    crossing.set_xscale("log", base=2)
    crossing.set_yscale("log")
    crossing.set(xlabel="ranks", ylabel="Mbit/s", title="predicted: float32 within 10 %")
    crossing.legend(title="of", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
