"""``dat-ds config``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from dat_ds.cli.arguments import add_command, add_config, load_run
from dat_ds.errors import UserError


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "config", _config, "check a config and show the resolved run")
    add_config(parser, required=False)
    parser.add_argument("--print", action="store_true", help="print the resolved run as JSON")
    parser.add_argument(
        "--reference", action="store_true", help="print all keys as markdown (docs/config.md)"
    )
    parser.add_argument(
        "--methods", action="store_true", help="print a card of every method (docs/methods.md)"
    )


def _config(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    if options.reference or options.methods:
        from dat_ds.config.reference import methods, reference

        print(reference() if options.reference else methods(), end="")
        return 0
    named = options.preset or options.deepspeed_config
    if named is None:
        raise UserError(
            "Name a config: dat-ds config --deepspeed_config FILE, or --preset zero2. dat-ds "
            "presets lists what there is."
        )
    run = load_run(options, defaults)
    from dat_ds.engine.deepspeed_part import check_deepspeed

    check_deepspeed(run.deepspeed)
    if options.print:
        print(json.dumps(run.to_dict(), indent=2))
    else:
        print(f"{named}: valid. Add --print to see the resolved run.")
    return 0
