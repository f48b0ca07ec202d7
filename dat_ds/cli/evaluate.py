"""``dat-ds eval``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_case, add_command, add_output_folder

_DESCRIPTION = """\
Evaluate a model under attack. TARGET is the folder of a run, a checkpoint or an export, a timm
name, a Hugging Face folder, a state dict (.safetensors, .pt), an exported program (.pt2), or
MODULE:CALLABLE with --import MODULE. A run alone is evaluated under the attacks of its own config,
each by itself; with any of the other arguments under an ensemble, in which every attack sees the
images that none before it has broken."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "eval", _evaluate, "evaluate a model under attack", description=_DESCRIPTION
    )
    add_case(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the attacks; default 0")
    add_output_folder(parser)
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="NAME",
        help="ensembles (standard, strong), attacks such as apgd-ce-100, or MODULE:CLASS of your "
        "own, in order; default standard",
    )
    parser.add_argument(
        "--indices", metavar="RANGES", help="images of the data, such as 0-99,200; default all"
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="images per forward; default 128"
    )
    parser.add_argument(
        "--prefilter",
        choices=["bf16", "fp16"],
        help="a first pass of the first attack in 16 bits; float32 confirms what it breaks",
    )
    parser.add_argument(
        "--no_checks",
        dest="checks",
        action="store_false",
        default=None,
        help="leave out the checks of the model (dat-ds doctor)",
    )
    parser.add_argument(
        "--report", action="store_true", default=None, help="measure curves, and write report.html"
    )


_QUESTION = (
    "data",
    "threat",
    "attacks",
    "num_examples",
    "indices",
    "batch_size",
    "seed",
    "prefilter",
    "output",
    "checks",
    "report",
)


def _evaluate(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.judge.evaluate import Question, evaluate_target
    from dat_ds.judge.run import evaluate_run

    asked = {key: getattr(options, key) for key in _QUESTION if getattr(options, key) is not None}
    if not asked and (Path(options.target) / "config.json").exists():
        evaluate_run(Path(options.target), options.set, imports=options.imports)
        return 0
    if "output" in asked:
        asked["output"] = Path(asked["output"])
    evaluate_target(
        Question(target=options.target, overrides=options.set, imports=options.imports, **asked)
    )
    return 0
