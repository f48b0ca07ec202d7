"""``dat-ds report``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command
from dat_ds.errors import UserError


def add(commands: Any) -> None:
    """Add the command."""
    summary = "compare records as a markdown table, or show one as a page"
    parser = add_command(commands, "report", _report, summary)
    parser.add_argument("paths", nargs="+", help="folders of runs, or record files")
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help="write all that the folder holds as one page (default: FOLDER/report.html)",
    )


def _report(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    paths = [Path(path) for path in options.paths]
    if options.html is not None:
        return _page(paths, options.html)
    from dat_ds.evaluation.report import report_table

    print(report_table(paths))
    return 0


def _page(paths: list[Path], file: str) -> int:
    from dat_ds.judge.report import write_report

    if len(paths) > 1 or not paths[0].is_dir():
        raise UserError(
            f"--html shows one folder, and {' '.join(map(repr, map(str, paths)))} is none: "
            "dat-ds report FOLDER --html"
        )
    print(write_report(paths[0], Path(file) if file else None))
    return 0
