"""``dat-ds init``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command
from dat_ds.errors import UserError

_DESCRIPTION = (
    "Writes a first config for your images, and says what each key means. What no flag gives is "
    "asked for on a terminal."
)
_ASKED = {
    "data": ("Your images (a folder with train/ and val/, an npz file, or NAME:PATH)", None),
    "model": ("Model (a timm name, or hf:PATH; empty for a usual one)", ""),
    "norm": ("Norm of the perturbations (linf, l2, l1)", "linf"),
    "eps": ("Their radius in pixel units (empty for the usual one)", ""),
    "gpus": ("GPUs (0 for the CPU)", "0"),
}


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "init", _init, "write a first config", description=_DESCRIPTION)
    parser.add_argument("--data", metavar="PATH", help="a folder, an npz file, or NAME:PATH")
    parser.add_argument("--model", metavar="NAME", help="a timm model, or hf:PATH")
    parser.add_argument("--pretrained", metavar="FILE", help="weights to start from")
    parser.add_argument("--norm", help="linf, l2 or l1; default linf")
    parser.add_argument(
        "--eps", help="radius in pixel units, such as 4/255; default: a common one for the norm"
    )
    parser.add_argument("--gpus", metavar="N", help="number of GPUs; default 0 (CPU)")
    parser.add_argument("--output", default="run.json", metavar="FILE", help="default run.json")


def _init(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.presets.first import Answers, write_first

    found = {key: getattr(options, key) for key in _ASKED}
    if sys.stdin.isatty():
        for key, (question, usual) in _ASKED.items():
            if found[key] is None:
                shown = f" [{usual}]" if usual else ""
                found[key] = input(f"{question}{shown}: ").strip() or usual
    given = {key: value for key, value in found.items() if value}
    if "data" not in given:
        raise UserError("--data is missing: name your images, such as --data photos/.")
    try:
        given["gpus"] = int(given.get("gpus", 0))
    except ValueError:
        raise UserError(f"--gpus {given['gpus']}: write a number, 0 for the CPU.") from None
    answers = Answers(**given, pretrained=options.pretrained)
    print(write_first(answers, Path(options.output)))
    return 0
