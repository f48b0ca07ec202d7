"""``dat-ds report``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "report", _report, "compare records as a markdown table")
    parser.add_argument("paths", nargs="+", help="folders of runs, or record files")


def _report(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.evaluation.report import report_table

    print(report_table([Path(path) for path in options.paths]))
    return 0
