"""``dat-ds label``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_command, add_config, load_run

_DESCRIPTION = (
    "Labels the images that a run's config leaves without a label (dat.data.labelled_fraction, "
    "unlabelled_path) by a trained model, and keeps the confidence. An interrupted command is "
    "repeated to go on, on any number of ranks. The folder is for dat.data.pseudo_labels."
)


def add(commands: Any) -> None:
    """Add the command."""
    summary = "give a run's unlabelled images pseudo-labels"
    parser = add_command(commands, "label", _label, summary, description=_DESCRIPTION)
    parser.add_argument("target", metavar="TARGET", help="the model, as for dat-ds eval")
    add_config(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the labels")
    parser.add_argument("--batch_size", type=int, metavar="N", help="images per forward")
    parser.set_defaults(makes_output=True)


def _label(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.judge.label import label_run

    # Which a config for images with labels lacks as long as they have none.
    options.set.append(f"dat.data.pseudo_labels={options.output}")
    label_run(
        options.target,
        load_run(options, defaults),
        Path(options.output),
        imports=options.imports,
        batch_size=options.batch_size,
    )
    return 0
