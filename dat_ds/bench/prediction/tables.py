"""Tables and plots of what the cost model predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dat_ds.bench.prediction.cost_model import Hardware, crossing_mbit, step_time
from dat_ds.bench.prediction.target import Target

_SHAPES = ((1, 6), (6, 1), (6, 6))
_COMPARED = ("int8", "one_bit_adam")
"""Compared with float32: the usual codec, and an optimizer that sends a bit an entry."""
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def predict_shapes(target: Target, hardware: Hardware) -> list[dict[str, Any]]:
    """Step times at the paper's shapes, and speedups over the first one in float32.

    Of float32, the codecs that ``hardware`` knows, and 1-bit Adam.
    """
    first, rows = None, []
    one_bit = ["one_bit_adam"] if hardware.encodes("one_bit_adam") else []
    for codec in ("none", *hardware.encode, *one_bit):
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


def predict_steps(
    target: Target,
    hardware: Hardware,
    ranks: Sequence[int],
    gpus: int,
    stages: Sequence[int],
    codecs: Sequence[str],
) -> list[dict[str, Any]]:
    """Step times by ranks, ZeRO stage and codec."""
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


def predict_crossings(target: Target, hardware: Hardware, gpus: int) -> list[dict[str, Any]]:
    """Bandwidth from which float32 is within 10 % of a codec, by number of ranks."""
    rows = []
    for count in _RANKS:
        if count <= gpus or count % gpus:
            continue
        machines, inside = _shape(count, gpus)
        cluster = target.cluster(machines, inside)
        row: dict[str, Any] = {"ranks": count}
        for codec in filter(hardware.encodes, _COMPARED):
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


def describe_prediction(numbers: Mapping[str, Any], target: Target, gpus: int) -> str:
    """The check and the predictions as text tables."""
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
    compared = [codec for codec in _COMPARED if all(codec in r for r in numbers["crossings"])]
    lines += [
        "",
        f"Predicted, not measured, {gpus} GPU(s) a machine: Mbit/s from which a step in float32 "
        "takes at most 1.1 times one with a codec (ZeRO-0).",
        "",
        f"| {' | '.join(['ranks', *compared])} |",
        "| --- " * (1 + len(compared)) + "|",
    ]
    for row in numbers["crossings"]:
        bandwidths = [_bandwidth(row[codec]) for codec in compared]
        lines.append(f"| {' | '.join([str(row['ranks']), *bandwidths])} |")
    return "\n".join(lines)


def _bandwidth(mbit: float | None) -> str:
    if mbit is None:
        return "none"
    return "any" if mbit == 0 else f"{mbit:.0f}"


def draw_prediction(
    numbers: Mapping[str, Any], target: Target, hardware: Hardware, gpus: int, path: str
) -> None:
    """Draw measured against predicted times, and predictions (PNG)."""
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
    compared = [codec for codec in _COMPARED if hardware.encodes(codec)]
    for codec in ("none", *compared):
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
    for codec in compared:
        rows = [row for row in numbers["crossings"] if row[codec]]
        x, y = [row["ranks"] for row in rows], [row[codec] for row in rows]
        crossing.plot(x, y, marker="o", lw=1, label=codec)
    crossing.set_xscale("log", base=2)
    crossing.set_yscale("log")
    crossing.set(xlabel="ranks", ylabel="Mbit/s", title="predicted: float32 within 10 %")
    crossing.legend(title="of", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
