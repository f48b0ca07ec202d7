"""``dat-ds presets``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dat_ds.cli.arguments import add_command

_DESCRIPTION = """\
List what --preset takes, or print one's JSON: published recipes (what each should reach, and all
that it deviates in from its source: docs/presets.md), and small runs on the embedded digits to
start from."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "presets",
        _presets,
        "list published recipes and starting points",
        description=_DESCRIPTION,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one's JSON")


def _presets(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.presets import table, text_of

    print(table() if options.name is None else text_of(options.name).rstrip())
    return 0
