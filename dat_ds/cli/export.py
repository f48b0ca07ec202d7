"""``dat-ds export``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command

_DESCRIPTION = (
    "Exports a trained model: writes it, loads it again, compares its outputs with the training "
    "model's, and adds a model card. Formats: timm, hf (transformers), safetensors, onnx, program "
    "(torch.export), robustbench, folder (our own). What is in them: docs/export.md."
)


def add(commands: Any) -> None:
    """Add the command."""
    summary = "export a trained model in the formats of others"
    parser = add_command(commands, "export", _export, summary, description=_DESCRIPTION)
    parser.add_argument("path", metavar="RUN", help="a run, a checkpoint, or a saved model")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="target format")
    parser.add_argument(
        "--output", metavar="DIR", help="folder to make (default: RUN/exports/FORMAT)"
    )
    parser.set_defaults(makes_output=True)
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="averaged (EMA) or un-averaged weights (default: averaged if the run has dat.ema)",
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="evaluation.json whose accuracies go into the model card (default: the run's own)",
    )
    parser.add_argument(
        "--license", default="unknown", metavar="NAME", help="the hub's name of the licence"
    )
    parser.add_argument("--push", metavar="REPO", help="upload to this repository of the hub")
    parser.add_argument("--yes", action="store_true", help="upload without asking")


def _export(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.export import Order, export
    from dat_ds.export.push import describe_upload, upload

    folder = export(
        Order(
            target=Path(options.path),
            to=options.to,
            output=None if options.output is None else Path(options.output),
            weights=options.weights,
            record=None if options.record is None else Path(options.record),
            license=options.license,
            repository=options.push,
        )
    )
    if options.push is None:
        return 0
    print(describe_upload(folder, options.push))
    if options.yes or _agrees():
        print(upload(folder, options.push))
    else:
        print(f"Not uploaded. The export is in {folder}.")
    return 0


def _agrees() -> bool:
    try:
        return input("Upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # nobody there to ask
        return False
