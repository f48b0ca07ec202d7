"""``dat-ds train``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dat_ds.cli.arguments import add_command, add_config, load_run


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "train", _train, "train a run and write its record")
    add_config(parser)
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|PATH",
        help="continue from the run's newest checkpoint, or from this one",
    )
    parser.add_argument(
        "--changed",
        action="append",
        default=[],
        metavar="KEY",
        help="with --resume: a key or section of the config, such as dat.schedule, that differs "
        "from the checkpoint's on purpose; may be repeated",
    )


def _train(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    run = load_run(options, defaults)
    from dat_ds.training.run import train

    record = train(run, resume=options.resume, changed=options.changed)
    return run.dat.fault.stop_code if record is None else 0
