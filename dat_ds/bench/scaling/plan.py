"""Plan of a scaling run: its points, and the config of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dat_ds.bench.prediction.cost_model import ONE_BIT
from dat_ds.bench.scaling.network import ShapedNetwork
from dat_ds.bench.timing import MIN_REPETITIONS, check_repetitions
from dat_ds.compression import CODECS
from dat_ds.config import RunConfig, load_config, one_bit_name, resolve_batch
from dat_ds.config.deepspeed.keys import ONE_BIT_OPTIMIZERS
from dat_ds.errors import ConfigError
from dat_ds.method import did_you_mean

MODES = ("weak", "strong")


_FREEZE_STEP = 2


@dataclass(frozen=True)
class Plan:
    """Plan of a scaling run.

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


def points_of(run: RunConfig, plan: Plan, launched: int | None = None) -> list[Point]:
    """All points of a plan, by number of ranks and link.

    With one rank nothing travels: it is measured once for all links, and without codecs.

    Args:
        run: Gives the batch.
        plan: Points to measure.
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
    if not counts:
        problems.append("--ranks: give at least one number.")
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
    elif plan.mbit and not problems and max(counts, default=1) > 1:
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
