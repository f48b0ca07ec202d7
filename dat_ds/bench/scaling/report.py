"""Files of scaling measurements: reading them, and what they come to as a table and a picture."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_ds.bench.prediction.cost_model import fit_link, link_error
from dat_ds.bench.records import read_record
from dat_ds.bench.timing import check_drift
from dat_ds.errors import ConfigError

KIND = "scaling"
MEASURE = "dat-ds bench scaling --deepspeed_config FILE --output scaling.json"
_KEYS = ("points", "links", "num_parameters", "clock_drift", "cores", "config")
_POINT_KEYS = (
    *("mode", "ranks", "zero_stage", "codec", "micro_batch", "mbit", "seconds"),
    *("seconds_forward", "seconds_attack", "seconds_update", "bytes_sent", "collectives"),
    "attack_steps",
)
KINDS_OF_TRAFFIC = ("gradients", "momentum", "parameters", "norms")


def read_scaling(paths: Sequence[str]) -> dict[str, Any]:
    """The points of one or several files of ``dat-ds bench scaling``, as one record.

    Raises:
        ConfigError: For a file of something else, files of different models or attacks, a point
            that two files hold, or a machine that changed its speed.
    """
    records = [_read(path) for path in paths]
    first = records[0]
    merged: dict[str, Any] = {**first, "points": [], "links": []}
    seen: dict[tuple[Any, ...], str] = {}
    for path, record in zip(paths, records, strict=True):
        for what in ("model", "attack"):
            one, other = (r["config"]["dat"][what] for r in (first, record))
            if one != other:
                raise ConfigError(
                    f"{paths[0]} and {path} differ in dat.{what}: {one} and {other}. Points of "
                    "different runs make no table; give files of one run."
                )
        for point in record["points"]:
            key = tuple(point[name] for name in _POINT_KEYS[1:6])
            if key in seen:
                named = dict(zip(_POINT_KEYS[1:6], key, strict=True))
                raise ConfigError(f"{seen[key]} and {path} both hold {named}: leave one file out.")
            seen[key] = path
        for name in ("points", "links"):
            merged[name] = [*merged[name], *record[name]]
    if len(paths) > 1:
        origin = ("hardware", "versions", "commit", "clock_drift")
        merged["sources"] = [
            {"file": path, **{key: record.get(key) for key in origin}}
            for path, record in zip(paths, records, strict=True)
        ]
    merged["cores"] = min(record["cores"] for record in records)
    return merged


def _read(path: str) -> dict[str, Any]:
    values = read_record(path, MEASURE)
    if values.get("bench") != KIND:
        raise ConfigError(f"{path} is not a record of 'bench scaling'. Make one with: {MEASURE}")
    missing = [key for key in _KEYS if key not in values]
    for point in values.get("points", []):
        missing += [f"points.{key}" for key in _POINT_KEYS if key not in point]
    if missing or not values["points"]:
        keys = ", ".join(dict.fromkeys(missing)) or "points"
        raise ConfigError(f"{path} lacks {keys}: measure it again: {MEASURE}")
    check_drift(values["clock_drift"])
    return values


def rows_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the table for every point of a record.

    Speedup is of images a second, over the fewest ranks that were measured under the same stage
    and mode, without a codec where that was measured; efficiency is that over the ratio of ranks.
    What a step takes beyond one rank's is communication, and codecs: one rank's is scaled by
    forwards, which were timed beside the steps, on all ranks at once.
    """
    rows = []
    for point in values["points"]:
        base = _base_of(point, values["points"])
        seconds = statistics.median(point["seconds"])
        speedup = _images_per_second(point) / _images_per_second(base)
        communication = None
        if base["ranks"] == 1:
            here, there = (statistics.median(p["seconds_forward"]) for p in (point, base))
            alone = statistics.median(base["seconds"]) * here / there
            communication = 1000 * max(0.0, seconds - alone) if point["ranks"] > 1 else 0.0
        rows.append(
            {
                **{key: point[key] for key in _POINT_KEYS[:6]},
                "ms_per_step": 1000 * seconds,
                "images_per_second": _images_per_second(point),
                "speedup": speedup,
                "efficiency": speedup * base["ranks"] / point["ranks"],
                "ms_attack": 1000 * point["seconds_attack"],
                "ms_update": 1000 * point["seconds_update"],
                "ms_communication": communication,
                **{f"mb_{k}": point["bytes_sent"].get(k, 0) / 1e6 for k in KINDS_OF_TRAFFIC},
            }
        )
    return rows


def _images_per_second(point: Mapping[str, Any]) -> float:
    images = point["ranks"] * point["micro_batch"] * point.get("gradient_accumulation_steps", 1)
    return float(images / statistics.median(point["seconds"]))


def _base_of(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Point that a point's speedup is relative to."""

    def is_like(other: Mapping[str, Any], codec: str) -> bool:
        if other["codec"] != codec or other["zero_stage"] != point["zero_stage"]:
            return False
        same_mode = other["mode"] in (point["mode"], "both")
        return bool(other["ranks"] == 1 or (same_mode and other["mbit"] == point["mbit"]))

    for codec in ("none", point["codec"]):
        if like := [other for other in points if is_like(other, codec)]:
            return min(like, key=lambda other: (other["ranks"], other["mode"] != point["mode"]))
    return point


def write_csv(values: Mapping[str, Any], path: str) -> None:
    """The rows of a record as CSV, in full precision."""
    rows = rows_of(values)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def describe(values: Mapping[str, Any]) -> str:
    """Markdown tables of points and of links."""
    dat = values["config"]["dat"]
    shares = not values["launched"] and any(
        point["ranks"] > values["cores"] for point in values["points"]
    )
    lines = [
        f"{dat['model']['name']}, {values['num_parameters'] / 1e6:.2f}M parameters, "
        f"{dat['attack']['name']} of {values['points'][0]['attack_steps']} steps, medians of "
        f"{len(values['points'][0]['seconds'])} steps; MB are sent per rank and step. With one "
        "rank nothing travels and codecs have nothing to do."
        + (
            f" More ranks than {values['cores']} cores share them: they compute more slowly than "
            "as many machines would."
            if shares
            else ""
        ),
        "",
        "| mode | ranks | batch a rank | ZeRO | codec | Mbit/s | ms a step | images/s | speedup "
        "| efficiency % | attack ms | update ms | communication ms | MB gradients | MB momentum "
        "| MB parameters | MB norms |",
        "|" + " --- |" * 17,
    ]
    for row in rows_of(values):
        extra = row["ms_communication"]
        lines.append(
            f"| {row['mode']} | {row['ranks']} | {row['micro_batch']} | {row['zero_stage']} "
            f"| {row['codec']} | {_speed(row['mbit'])} | {row['ms_per_step']:.1f} "
            f"| {row['images_per_second']:.2f} | {row['speedup']:.2f} "
            f"| {100 * row['efficiency']:.0f} | {row['ms_attack']:.1f} | {row['ms_update']:.1f} "
            f"| {'-' if extra is None else f'{extra:.1f}'} | "
            + " | ".join(f"{row[f'mb_{kind}']:.3f}" for kind in KINDS_OF_TRAFFIC)
            + " |"
        )
    return "\n".join([*lines, *_link_table(values)])


def _speed(mbit: float | None) -> str:
    return "-" if mbit is None else f"{mbit:g}"


def _link_table(values: Mapping[str, Any]) -> list[str]:
    by_link: dict[tuple[int, float | None], dict[str, list[tuple[int, float]]]] = {}
    for timed in values["links"]:
        samples = by_link.setdefault((timed["ranks"], timed["mbit"]), {})
        seconds = statistics.median(timed["seconds"])
        samples.setdefault(timed["collective"], []).append((timed["bytes"], seconds))
    if not by_link:
        return []
    lines = [
        "",
        "Links, fitted to timed all-reduces of several sizes (alpha is the latency of a message; "
        "error is the median over the sizes):",
        "",
        "| ranks | set to, Mbit/s | measured, Mbit/s | alpha, us | error % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (ranks, mbit), samples in by_link.items():
        timed = samples["all_reduce"]
        link = fit_link("all_reduce", ranks, timed)
        measured = f"{link.mbit:.0f}" if link.beta > 0 else "-"
        error = 100 * link_error("all_reduce", ranks, timed, link)
        lines.append(
            f"| {ranks} | {_speed(mbit)} | {measured} | {1e6 * link.alpha:.0f} | {error:.0f} |"
        )
    return lines


def draw(values: Mapping[str, Any], path: str) -> None:
    """Speedup and efficiency over ranks, a row of pictures for every mode and link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = rows_of(values)
    several = [row for row in rows if row["ranks"] > 1] or rows
    modes = [m for m in ("weak", "strong") if any(row["mode"] in (m, "both") for row in several)]
    links = list(dict.fromkeys(row["mbit"] for row in several))
    panels = [(mode, mbit) for mode in modes for mbit in links]
    figure, axes = pyplot.subplots(len(panels), 2, figsize=(11, 4 * len(panels)), squeeze=False)
    for (speedup, efficiency), (mode, mbit) in zip(axes, panels, strict=True):
        shown = [
            row
            for row in rows
            if row["ranks"] == 1 or (row["mode"] in (mode, "both") and row["mbit"] == mbit)
        ]
        counts = sorted({row["ranks"] for row in shown})
        speedup.plot(counts, [n / counts[0] for n in counts], color="black", ls="--", lw=1)
        efficiency.axhline(100, color="black", ls="--", lw=1)
        for stage, codec in dict.fromkeys((row["zero_stage"], row["codec"]) for row in shown):
            line = [r for r in shown if (r["zero_stage"], r["codec"]) == (stage, codec)]
            if all(row["ranks"] != counts[0] for row in line):  # a codec: starts where none does
                start = [r for r in shown if (r["zero_stage"], r["codec"]) == (stage, "none")]
                line = [*(r for r in start if r["ranks"] == counts[0]), *line]
            line.sort(key=lambda row: int(row["ranks"]))
            x, label = [row["ranks"] for row in line], f"ZeRO-{stage}, {codec}"
            speedup.plot(x, [row["speedup"] for row in line], marker="o", lw=1, label=label)
            efficiency.plot(x, [100 * row["efficiency"] for row in line], marker="o", lw=1)
        title = f"{mode} scaling" + ("" if mbit is None else f", links of {mbit:g} Mbit/s")
        for axis, what in ((speedup, "speedup"), (efficiency, "efficiency, %")):
            axis.set_title(title)
            axis.set_xlabel("ranks")
            axis.set_ylabel(what)
            axis.set_xticks(counts)
        speedup.legend(title="dashed: ideal", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
