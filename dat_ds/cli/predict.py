"""``dat-ds predict``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command, add_output


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "predict", _predict, "classify image files with a trained model")
    parser.add_argument("target", metavar="RUN", help="a run, a checkpoint, or a saved model")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, or folders of them"
    )
    parser.add_argument(
        "--top", type=int, default=3, help="number of classes listed for each image (default: 3)"
    )
    add_output(parser)


def _predict(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.export.predict import predict
    from dat_ds.files import write_json

    found = predict(Path(options.target), options.images, top=options.top)
    print("\n".join(map(str, found)))
    if options.output is not None:
        write_json(Path(options.output), {"predictions": [one.to_dict() for one in found]})
    return 0
