"""``dat-ds train | eval | bench | report | config``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import dat_ds
from dat_ds.config import RunConfig, load_config
from dat_ds.config.reference import reference
from dat_ds.errors import NumericsError, UserError
from dat_ds.processes import end_process

logger = logging.getLogger("dat_ds")


def run_script(words: Sequence[str] = (), *, defaults: Mapping[str, Any] | None = None) -> NoReturn:
    """Run ``words`` and the process's own arguments as one command, and end the process.

    The installed ``dat-ds`` script, and every recipe.

    Args:
        words: Words before the process's own, such as the command that a recipe stands for.
        defaults: As for :func:`main`.
    """
    end_process(main([*words, *sys.argv[1:]], defaults=defaults))


def main(
    arguments: Sequence[str] | None = None, *, defaults: Mapping[str, Any] | None = None
) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None takes the process's own.
        defaults: Config values for keys that the JSON leaves out (a recipe's choices).

    Returns:
        The exit code: 0 done or stopped cleanly, 1 training failed, 2 the user can mend it.
    """
    options = _parser().parse_args(arguments)
    _log_to_stdout()
    try:
        _check_folders(options)
        return int(options.run(options, dict(defaults or {})))
    except UserError as error:
        return _fail(str(error), 2)
    except NumericsError as error:
        return _fail(str(error), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dat-ds", description=dat_ds.__doc__)
    parser.add_argument("--version", action="version", version=dat_ds.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _add_command(commands, "train", _train, "train a run and write its record")
    _add_config(train)
    train.add_argument(
        "--resume",
        default="none",
        metavar="auto|PATH",
        help="continue from the run's newest checkpoint, or from this one",
    )
    evaluate = _add_command(commands, "eval", _evaluate, "evaluate the best model of a run")
    evaluate.add_argument("path", help="folder of a run")
    _add_set(evaluate)
    config = _add_command(commands, "config", _config, "check a config and show the resolved run")
    _add_config(config, required=False)
    config.add_argument("--print", action="store_true", help="print the resolved run as JSON")
    config.add_argument("--reference", action="store_true", help="print all keys as markdown")
    report = _add_command(commands, "report", _report, "compare records as a markdown table")
    report.add_argument("paths", nargs="+", help="folders of runs, or record files")
    bench = commands.add_parser("bench", help="measure what the project claims")
    tables = bench.add_subparsers(required=True, metavar="TABLE")
    for name, run, summary in (
        ("attack", _bench_attack, "time of a step against its parts"),
        ("compression", _bench_compression, "codecs, and the bytes that ranks send"),
    ):
        table = _add_command(tables, name, run, summary)
        _add_config(table)
        table.add_argument("--repetitions", type=int, default=20, help="timed steps (>= 5)")
        _add_output(table)
    _add_scaling(tables)
    _add_predict(tables)
    ratios = "LAMB's and LARS's trust ratios under every ZeRO stage"
    table = _add_command(tables, "trust-ratios", _bench_trust_ratios, ratios)
    _add_config(table)
    _add_output(table)
    return parser


def _add_scaling(tables: Any) -> None:
    summary = "strong and weak scaling over ranks, ZeRO stages and codecs"
    table = _add_command(tables, "scaling", _bench_scaling, summary)
    _add_config(table, required=False)
    table.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (default: 1 2)")
    table.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages")
    table.add_argument(
        "--codecs",
        nargs="+",
        default=["none", "int8", "one_bit_adam"],
        help="none, codecs of dat.compression, one_bit_adam, one_bit_lamb (under ZeRO-0)",
    )
    table.add_argument(
        "--mode", nargs="+", default=["weak"], help="weak (batch per rank fixed), strong (in all)"
    )
    table.add_argument(
        "--global_batch", type=int, help="images of a step in strong scaling (default: one rank's)"
    )
    table.add_argument(
        "--mbit",
        type=float,
        nargs="+",
        default=[],
        help="shape every rank's link to so many megabits a second (as root, with iproute2)",
    )
    table.add_argument("--repetitions", type=int, default=5, help="timed steps of each (>= 5)")
    table.add_argument(
        "--merge", nargs="+", metavar="FILE", help="measure nothing; one table of these files"
    )
    _add_output(table)
    table.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    table.add_argument("--plot", metavar="FILE", help="draw speedup and efficiency (PNG)")


def _add_predict(tables: Any) -> None:
    summary = "step times by a cost model, checked against 'bench scaling'"
    table = _add_command(tables, "predict", _bench_predict, summary)
    table.add_argument(
        "--scaling", nargs="+", required=True, metavar="FILE", help="records of 'bench scaling'"
    )
    table.add_argument("--attack", metavar="FILE", help="a record of 'bench attack'")
    table.add_argument("--compression", metavar="FILE", help="a record of 'bench compression'")
    table.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    table.add_argument("--gpus", type=int, default=1, help="ranks of a machine")
    table.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages")
    table.add_argument("--codecs", nargs="+", default=["none", "int8", "one_bit_adam"])
    for name, summary in (
        ("num_parameters", "of the model"),
        ("attack_steps", "K"),
        ("micro_batch", "images of a GPU"),
        ("forward_ms", "one forward of one image"),
        ("codec_ns", "encoding, and also decoding, an entry"),
        ("optimizer_ns", "updating an entry"),
        ("mbit", "bandwidth of a machine's link"),
        ("latency_us", "of a message between machines"),
        ("inside_mbit", "bandwidth of a GPU's link inside a machine"),
        ("inside_latency_us", "of a message inside a machine"),
    ):
        kind = int if name in ("num_parameters", "attack_steps", "micro_batch") else float
        table.add_argument(f"--{name}", type=kind, help=f"what is predicted: {summary}")
    _add_output(table)
    table.add_argument("--plot", metavar="FILE", help="draw the check and the predictions (PNG)")


def _add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def _add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--deepspeed_config", required=required, metavar="FILE", help="the run's JSON"
    )
    # The deepspeed launcher adds these two to every script.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    _add_set(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config, such as dat.attack.steps=10; repeatable",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default=None, metavar="FILE", help="write the numbers as JSON")


def _check_folders(options: argparse.Namespace) -> None:
    """Refuse files in folders that are not there, before anything is measured for them."""
    files = {flag: getattr(options, flag, None) for flag in ("output", "csv", "plot")}
    missing = [
        f"--{flag} {file}: there is no folder {str(Path(file).parent)!r}: make it."
        for flag, file in files.items()
        if file is not None and not Path(file).parent.is_dir()
    ]
    if missing:
        raise UserError("\n".join(missing))


def _load(options: argparse.Namespace, defaults: Mapping[str, Any]) -> RunConfig:
    return load_config(options.deepspeed_config, overrides=options.set, defaults=defaults)


def _train(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    run = _load(options, defaults)
    from dat_ds.training.run import train

    train(run, resume=options.resume)
    return 0


def _evaluate(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.training.evaluate import evaluate_run

    evaluate_run(Path(options.path), options.set)
    return 0


def _config(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    if options.reference:
        print(reference(), end="")
        return 0
    if options.deepspeed_config is None:
        raise UserError("Name a config: dat-ds config --deepspeed_config ds_configs/zero2.json")
    run = _load(options, defaults)
    if options.print:
        print(json.dumps(run.to_dict(), indent=2))
    else:
        print(f"{options.deepspeed_config}: valid. Add --print to see the resolved run.")
    return 0


def _report(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.evaluation.report import report_table

    print(report_table([Path(path) for path in options.paths]))
    return 0


def _bench_attack(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.step_time import bench_attack

    run = _load(options, defaults)
    print(bench_attack(run, repetitions=options.repetitions, output=options.output))
    return 0


def _bench_compression(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.compression import bench_compression

    run = _load(options, defaults)
    print(bench_compression(run, repetitions=options.repetitions, output=options.output))
    return 0


def _bench_scaling(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.scaling.measure import bench_scaling, merge_scaling
    from dat_ds.bench.scaling.plan import Plan

    files = {"output": options.output, "csv": options.csv, "plot": options.plot}
    if options.merge:
        print(merge_scaling(options.merge, **files))
        return 0
    if options.deepspeed_config is None:
        raise UserError(
            "Name a run: --deepspeed_config ds_configs/zero0.json; or files to --merge."
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
    if table := bench_scaling(_load(options, defaults), plan, **files):
        print(table)
    return 0


def _bench_predict(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.bench.prediction.predict import bench_predict
    from dat_ds.bench.prediction.target import Target

    names = [field.name for field in dataclasses.fields(Target)]
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    table = bench_predict(
        options.scaling,
        Target(**given),
        attack=options.attack,
        compression=options.compression,
        ranks=options.ranks,
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

    if table := bench_trust_ratios(_load(options, defaults), output=options.output):
        print(table)
    return 0


def _log_to_stdout() -> None:
    # Models and data log wherever they are built, which is on every rank.
    is_main = os.environ.get("RANK", "0") == "0"
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]


def _fail(message: str, code: int) -> int:
    print(f"dat-ds: error: {message}", file=sys.stderr, flush=True)
    return code
