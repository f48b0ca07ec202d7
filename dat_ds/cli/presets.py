"""``dat-ds presets``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dat_ds.cli.arguments import add_command
from dat_ds.errors import ConfigError

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
    parser.add_argument(
        "--cost",
        action="store_true",
        help="memory of each GPU and GPU-hours instead, of NAME or of all: computed, not measured",
    )
    parser.add_argument(
        "--gpu", metavar="GPU", help="with --cost: a100 or h100, whose peak is taken (a100)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help="with --cost: share of the peak that training reaches (0.2)",
    )


def _presets(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.presets import table, text_of

    given = {key: getattr(options, key) for key in ("gpu", "utilisation")}
    given = {key: value for key, value in given.items() if value is not None}
    if options.cost:
        from dat_ds.bench.preset_cost import cost_table

        print(cost_table(None if options.name is None else [options.name], **given))
        return 0
    if given:
        raise ConfigError(f"--{next(iter(given))} belongs to the costs of presets: write --cost.")
    print(table() if options.name is None else text_of(options.name).rstrip())
    return 0
