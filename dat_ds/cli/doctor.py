"""``dat-ds doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_ds.cli.arguments import add_case, add_command, add_output_folder

_DESCRIPTION = """\
Check a model for what makes evaluations of its robustness untrustworthy: masked or missing
gradients, randomness, dependence on the batch, probabilities in place of logits, wrong
normalisation or order of classes, and attacks that miss what exists. It takes the same TARGET,
--data and --threat as dat-ds eval, looks at --num_examples images (default 128) spread evenly over
the data, and exits with 1 where a check raises an alarm. What each check means: docs/checks.md."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        "check a model for faults that make evaluations untrustworthy",
        description=_DESCRIPTION,
    )
    add_case(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the checks' attacks; default 0"
    )
    add_output_folder(parser)


def _doctor(options: argparse.Namespace, defaults: Mapping[str, Any]) -> int:
    from dat_ds.judge.doctor import NUM_EXAMPLES, diagnose

    count = NUM_EXAMPLES if options.num_examples is None else options.num_examples
    diagnosis = diagnose(
        options.target,
        data=options.data,
        threat=options.threat,
        overrides=options.set,
        imports=options.imports,
        num_examples=count,
        seed=options.seed,
        output=None if options.output is None else Path(options.output),
    )
    print(diagnosis.table())
    return 1 if diagnosis.alarms else 0
