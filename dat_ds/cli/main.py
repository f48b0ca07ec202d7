"""The command ``dat-ds`` and all it can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import dat_ds
from dat_ds.cli import (
    bench,
    checkpoint,
    config,
    doctor,
    evaluate,
    export,
    init,
    label,
    predict,
    presets,
    replay,
    report,
    train,
)
from dat_ds.cli.arguments import check_output
from dat_ds.commands import carry_out
from dat_ds.processes import adopt_slurm_step, end_process


def run_script(
    words: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> NoReturn:
    """Run ``words`` and the process's own arguments as one command, and end the process.

    The installed ``dat-ds`` script, and every recipe.

    Args:
        words: Words before the process's own, such as the command that a recipe stands for.
        defaults: Config values for keys that the JSON leaves out, as for :func:`main`.
        description: What ``--help`` says first, in the place of the command's own text.
    """
    if description is not None and {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{description.strip()}\n\n")
        sys.stdout.flush()
    adopt_slurm_step()
    end_process(main([*words, *sys.argv[1:]], defaults=defaults))


def main(
    arguments: Sequence[str] | None = None, *, defaults: Mapping[str, Any] | None = None
) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None takes the process's own.
        defaults: Config values for keys that the JSON leaves out (a recipe's choices).

    Returns:
        The exit code: 0 done or stopped cleanly (``dat.fault.stop_code`` where a signal stopped
        training), 1 training failed, ``doctor`` raises an alarm or ``replay`` repeats a fault, 2
        the user can mend it, 75 a rank hung or died, 130 interrupted.
    """
    options = _parser().parse_args(arguments)

    def command() -> int:
        check_output(options)
        return int(options.run(options, dict(defaults or {})))

    return carry_out(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dat-ds", description=dat_ds.__doc__)
    # deepspeed --no_python puts it before the command.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=dat_ds.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        init,
        train,
        evaluate,
        doctor,
        export,
        label,
        predict,
        report,
        checkpoint,
        replay,
        config,
        presets,
        bench,
    ):
        command.add(commands)
    return parser
