"""``dat-ds eval``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command, add_set


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "eval", _evaluate, "evaluate the best model of a run")
    parser.add_argument("path", help="folder of a run")
    add_set(parser)


def _evaluate(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.training.evaluate import evaluate_run

    evaluate_run(Path(options.path), options.set, imports=options.imports)
    return 0
