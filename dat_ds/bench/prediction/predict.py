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
from collections.abc import Sequence

import torch

from dat_ds.bench.prediction.calibrate import (
    calibrate,
    check_costs,
    codec_costs,
    held_out,
    over_floor,
)
from dat_ds.bench.prediction.cost_model import ONE_BIT
from dat_ds.bench.prediction.tables import (
    describe_prediction,
    draw_prediction,
    predict_crossings,
    predict_shapes,
    predict_steps,
)
from dat_ds.bench.prediction.target import Target
from dat_ds.bench.records import write_record
from dat_ds.bench.scaling.report import read_scaling
from dat_ds.compression import CODECS
from dat_ds.errors import ConfigError


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
        target: Target of the prediction.
        attack: File of ``dat-ds bench attack``, whose overhead over ``(2 K + 3) F`` then takes the
            place of the one fitted to the scaling record.
        compression: File of ``dat-ds bench compression``: the cost of the codecs that were there
            when it was written; without it, one cost fits all.
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
        ConfigError: For files of another kind, with keys missing, or too few points; for a codec
            in ``codecs`` that ``compression`` does not hold.
    """
    _check(target, ranks, gpus, stages, codecs)
    values = read_scaling(scaling)
    costs = None
    if compression is not None:
        costs = codec_costs(compression)
        check_costs(compression, costs, codecs, values["points"])
    checked = held_out(values, costs)
    fitted = calibrate(values["points"], values, costs)
    overhead = fitted["overhead"] if attack is None else over_floor(attack)
    hardware = target.hardware(overhead, CODECS if costs is None else costs)
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
        "shapes": predict_shapes(target, hardware),
        "steps": predict_steps(target, hardware, ranks, gpus, stages, codecs),
        "crossings": predict_crossings(target, hardware, gpus),
    }
    write_record(output, numbers, torch.device("cpu"))
    if plot is not None:
        draw_prediction(numbers, target, hardware, gpus, plot)
    return describe_prediction(numbers, target, gpus)


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
