"""``dat-ds bench``: step time, compression, data, scaling, cost model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from dat_ds.cli.arguments import add_case, add_command, add_config, add_output, load_run
from dat_ds.errors import UserError

_SCALING = (
    "Measures the step times of every number of ranks, ZeRO stage, codec and link speed, and the "
    "links between the ranks. Ranks are CPU processes of this machine, or those of the launcher. "
    "Nothing is predicted. How to read the tables: docs/scaling.md."
)
_PREDICT = (
    "Measures nothing. Fits a cost model to records of 'bench scaling', checks it on the points "
    "of a number of ranks that the fit left out, and predicts step times on clusters that nobody "
    "measured, for hardware whose speed the flags give. What the model adds up: docs/prediction.md."
)

_MEMORY = (
    "Predicts the peak memory of each rank before anything is trained: the model runs on tensors "
    "without elements. With --measure two optimizer steps are trained and measured beside it. What "
    "the prediction adds up: docs/memory.md."
)


def add(commands: Any) -> None:
    """Add the command and its tables."""
    summary = "benchmarks: step time, compression, data, scaling, cost model"
    parser = commands.add_parser("bench", help=summary, description=summary)
    tables = parser.add_subparsers(required=True, metavar="TABLE")
    for name, run, summary in (
        ("attack", _bench_attack, "time of an adversarial training step, and of its parts"),
        (
            "compression",
            _bench_compression,
            "error and cost of codecs, and the bytes sent",
        ),
        ("data", _bench_data, "images decoded a second, and the time that steps wait for data"),
    ):
        table = add_command(tables, name, run, summary)
        add_config(table)
        table.add_argument("--repetitions", type=int, default=20, help="timed steps (>= 5)")
        add_output(table)
    _add_autoattack(tables)
    _add_scaling(tables)
    _add_predict(tables)
    summary = "peak memory of a rank by phase of a step, predicted and measured"
    table = add_command(tables, "memory", _bench_memory, summary, description=_MEMORY)
    add_config(table)
    table.add_argument(
        "--ranks", type=int, nargs="+", help="numbers of ranks (default: the launcher's, or 1)"
    )
    _add_memory(table)
    add_output(table)
    ratios = "LAMB's and LARS's trust ratios under every ZeRO stage"
    table = add_command(tables, "trust-ratios", _bench_trust_ratios, ratios)
    add_config(table)
    add_output(table)


def _add_memory(table: argparse.ArgumentParser) -> None:
    table.add_argument(
        "--gpu_gib",
        type=float,
        metavar="GIB",
        help="memory of one GPU in GiB: says whether the run fits",
    )
    table.add_argument(
        "--measure", action="store_true", help="also train two steps and measure the peaks"
    )


def _add_autoattack(tables: Any) -> None:
    summary = "our ensembles beside the official AutoAttack, sample by sample"
    table = add_command(tables, "autoattack", _bench_autoattack, summary)
    add_case(table)
    table.add_argument(
        "--parts",
        nargs="+",
        default=["official", "standard", "strong"],
        metavar="NAME",
        help="official (needs pyautoattack) and ensembles, in order",
    )
    table.add_argument("--seed", type=int, default=0, help="seed of the attacks")
    add_output(table)


def _add_scaling(tables: Any) -> None:
    summary = "strong and weak scaling over ranks, ZeRO stages and codecs"
    table = add_command(tables, "scaling", _bench_scaling, summary, description=_SCALING)
    add_config(table, required=False)
    table.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (default: 1 2)")
    table.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages")
    table.add_argument(
        "--codecs",
        nargs="+",
        default=["none", "int8", "one_bit_adam"],
        help="none, codecs of dat.compression, one_bit_adam, one_bit_lamb (under ZeRO-0)",
    )
    table.add_argument(
        "--mode",
        nargs="+",
        default=["weak"],
        help="weak (fixed batch per rank), strong (fixed global batch)",
    )
    table.add_argument(
        "--global_batch", type=int, help="images per step in strong scaling (default: one rank's)"
    )
    table.add_argument(
        "--mbit",
        type=float,
        nargs="+",
        default=[],
        help="limit every rank's link to this bandwidth in Mbit/s (needs root and iproute2)",
    )
    table.add_argument("--repetitions", type=int, default=5, help="timed steps per point (>= 5)")
    table.add_argument(
        "--merge",
        nargs="+",
        metavar="FILE",
        help="merge these records into one table; nothing is measured",
    )
    add_output(table)
    table.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    table.add_argument("--plot", metavar="FILE", help="draw speedup and efficiency (PNG)")


def _add_predict(tables: Any) -> None:
    summary = "step times by a cost model, checked against 'bench scaling'"
    table = add_command(tables, "predict", _bench_predict, summary, description=_PREDICT)
    table.add_argument(
        "--scaling", nargs="+", metavar="FILE", help="records of 'bench scaling'; needed for times"
    )
    table.add_argument(
        "--memory", action="store_true", help="predict memory instead, as 'bench memory' does"
    )
    add_config(table, required=False)
    _add_memory(table)
    table.add_argument("--attack", metavar="FILE", help="a record of 'bench attack'")
    table.add_argument("--compression", metavar="FILE", help="a record of 'bench compression'")
    table.add_argument(
        "--ranks", type=int, nargs="+", help="numbers of ranks (default: 8 64 512 4096)"
    )
    table.add_argument("--gpus", type=int, default=1, help="ranks (GPUs) per machine")
    table.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages")
    table.add_argument("--codecs", nargs="+", default=["none", "int8", "one_bit_adam"])
    for name, summary in (
        ("num_parameters", "parameters of the model"),
        ("attack_steps", "attack steps K; 0 is natural training"),
        ("micro_batch", "images per GPU and micro-step"),
        ("forward_ms", "forward of one image (ms)"),
        ("codec_ns", "encoding an entry, and also decoding it (ns)"),
        ("optimizer_ns", "optimizer's update of an entry (ns)"),
        ("mbit", "bandwidth of a machine's link (Mbit/s)"),
        ("latency_us", "latency of a message between machines (us)"),
        ("inside_mbit", "bandwidth of a GPU's link inside a machine (Mbit/s)"),
        ("inside_latency_us", "latency of a message inside a machine (us)"),
    ):
        kind = int if name in ("num_parameters", "attack_steps", "micro_batch") else float
        table.add_argument(f"--{name}", type=kind, help=f"{summary}, used for the prediction")
    add_output(table)
    table.add_argument("--plot", metavar="FILE", help="draw the check and the predictions (PNG)")


def _bench_attack(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.step_time import bench_attack

    run = load_run(options, defaults)
    print(bench_attack(run, repetitions=options.repetitions, output=options.output))
    return 0


def _bench_compression(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.compression import bench_compression

    run = load_run(options, defaults)
    print(bench_compression(run, repetitions=options.repetitions, output=options.output))
    return 0


def _bench_data(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.data import bench_data

    if table := bench_data(
        load_run(options, defaults), repetitions=options.repetitions, output=options.output
    ):
        print(table)
    return 0


def _bench_scaling(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.scaling.measure import bench_scaling, merge_scaling
    from dat_ds.bench.scaling.plan import Plan

    files = {"output": options.output, "csv": options.csv, "plot": options.plot}
    if options.merge:
        print(merge_scaling(options.merge, **files))
        return 0
    if options.deepspeed_config is None and options.preset is None:
        raise UserError(
            "Name a run: --deepspeed_config FILE, or --preset zero0; or files to --merge."
        )
    plan = Plan(
        ranks=None if options.ranks is None else tuple(options.ranks),
        stages=tuple(options.stages),
        codecs=tuple(options.codecs),
        modes=tuple(options.mode),
        mbit=tuple(options.mbit),
        repetitions=options.repetitions,
        global_batch=options.global_batch,
    )
    if table := bench_scaling(load_run(options, defaults), plan, **files):
        print(table)
    return 0


def _bench_autoattack(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.autoattack import bench_autoattack
    from dat_ds.judge.target import open_case

    case = open_case(
        options.target,
        data=options.data,
        threat=options.threat,
        overrides=options.set,
        imports=options.imports,
    )
    count = len(case.images) if options.num_examples is None else options.num_examples
    table = bench_autoattack(
        case, num_examples=count, parts=options.parts, seed=options.seed, output=options.output
    )
    print(table)
    return 0


def _bench_memory(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.memory.predict import bench_memory

    table = bench_memory(
        load_run(options, defaults),
        ranks=options.ranks,
        gpu_gib=options.gpu_gib,
        measure=options.measure,
        output=options.output,
    )
    if table:
        print(table)
    return 0


def _bench_predict(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    if options.memory:
        if options.deepspeed_config is None and options.preset is None:
            raise UserError("--memory needs a run: --deepspeed_config FILE, or --preset zero3.")
        return _bench_memory(options, defaults)
    if not options.scaling:
        raise UserError(
            "Name records of 'dat-ds bench scaling' by --scaling, or write --memory "
            "--deepspeed_config FILE for memory."
        )
    from dat_ds.bench.prediction.predict import bench_predict
    from dat_ds.bench.prediction.target import Target

    names = [field.name for field in dataclasses.fields(Target)]
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    table = bench_predict(
        options.scaling,
        Target(**given),
        attack=options.attack,
        compression=options.compression,
        ranks=options.ranks or (8, 64, 512, 4096),
        gpus=options.gpus,
        stages=options.stages,
        codecs=options.codecs,
        output=options.output,
        plot=options.plot,
    )
    print(table)
    return 0


def _bench_trust_ratios(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.trust_ratios import bench_trust_ratios

    if table := bench_trust_ratios(load_run(options, defaults), output=options.output):
        print(table)
    return 0
