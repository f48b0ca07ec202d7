"""Coefficients of the cost model, from records of measurements."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dat_ds.bench.prediction.cost_model import (
    COLLECTIVES,
    Cluster,
    Hardware,
    Link,
    Links,
    Workload,
    encoder_of,
    fit_link,
    non_negative_fit,
    same_link,
    step_time,
)
from dat_ds.bench.prediction.target import default_sides
from dat_ds.bench.records import read_record
from dat_ds.bench.scaling.report import MEASURE
from dat_ds.compression import CODECS
from dat_ds.errors import ConfigError

_MIN_POINTS = 6
_NOWHERE: Links = same_link(Link(0.0, 0.0))
_TERMS = ("overhead", "optimizer", "codec", "one_bit", "sharded")
_COSTS = ("encode_ns", "decode_ns")
_COMPRESSION = "dat-ds bench compression --deepspeed_config FILE --output compression.json"


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
            sides=default_sides(zero_stage),
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


def codec_costs(path: str) -> dict[str, dict[str, float]]:
    """Nanoseconds of encoding and decoding an entry, as ``bench compression`` wrote them.

    Returns:
        ``encode_ns`` and ``decode_ns`` of the codecs that the record holds, in the code's order. A
        codec that is newer than the record is not among them; see :func:`check_costs`.

    Raises:
        ConfigError: For another file, or a codec without its two costs.
    """
    measured = _read(path, "codecs", _COMPRESSION)["codecs"]
    found = {}
    for name in CODECS:
        if name not in measured:
            continue
        missing = [key for key in _COSTS if key not in measured[name]]
        if missing:
            keys = ", ".join(f"codecs.{name}.{key}" for key in missing)
            raise ConfigError(f"{path} lacks {keys}. Measure it again: {_COMPRESSION}")
        found[name] = {key: float(measured[name][key]) for key in _COSTS}
    return found


def check_costs(
    path: str,
    costs: Mapping[str, Mapping[str, float]],
    asked: Sequence[str],
    points: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse codecs whose costs are needed and that the record of them does not hold.

    Args:
        path: The record.
        costs: What :func:`codec_costs` found in it.
        asked: The codecs of ``--codecs``.
        points: Of the scaling record, whose steps are calibrated by the costs.

    Raises:
        ConfigError: With every such codec, and who asks for it.
    """
    of_points = list(dict.fromkeys(point["codec"] for point in points))
    problems = [
        f"{path} holds no codec {encoder!r}, which {where} {name} needs."
        for where, names in (("--codecs", asked), ("the scaling record's", of_points))
        for name in names
        if (encoder := encoder_of(name)) is not None and encoder not in costs
    ]
    if problems:
        problems.append(f"Measure it again, or leave --compression out: {_COMPRESSION}")
        raise ConfigError("\n".join(problems))


def over_floor(path: str) -> float:
    """Step time over its parts, from a record of ``bench attack``."""
    command = "dat-ds bench attack --deepspeed_config FILE --output attack.json"
    found = _read(path, "over_floor", command)["over_floor"]
    if not isinstance(found, (int, float)) or not found > 0:
        raise ConfigError(
            f"{path}: over_floor={found!r} is not a ratio. Measure it again: {command}"
        )
    return float(found)


def _read(path: str, key: str, command: str) -> dict[str, Any]:
    values = read_record(path, command)
    if key not in values:
        raise ConfigError(f"{path} has no {key!r}. A file that has it is written by: {command}")
    return values
