"""``dat-ds replay``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command, add_imports

_DESCRIPTION = """\
Repeats a step in which a loss, gradient or weight was not finite, on this process alone: the same
batch, seeds and attack, without an update. It says with which weights, and where the first number
is not finite. Exit code 1 where one is, 0 where all are finite.

FILE is RUN/faults/step-.../rank-....pt, or the folder of one. It is read without running code."""


def add(commands: Any) -> None:
    """Add the command."""
    summary = "repeat a step whose numbers were not finite"
    parser = add_command(commands, "replay", _replay, summary, description=_DESCRIPTION)
    parser.add_argument("file", type=Path, metavar="FILE")
    add_imports(parser)


def _replay(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.training.replay import replay

    found = replay(options.file, options.imports)
    print(found.in_words())
    return 0 if found.first is None else 1
