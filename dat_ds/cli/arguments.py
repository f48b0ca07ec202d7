"""Arguments that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dat_ds.errors import UserError
from dat_ds.files import check_files

if TYPE_CHECKING:
    from dat_ds.config import RunConfig

Command = Callable[[argparse.Namespace, Mapping[str, Any]], int]
"""``(options, defaults) -> exit code``."""


def add_command(
    commands: Any, name: str, run: Command, summary: str, *, description: str | None = None
) -> argparse.ArgumentParser:
    """A command and what it calls.

    Args:
        commands: Where it is added.
        name: What is typed.
        run: What it calls.
        summary: In the list of commands.
        description: In its own help; by default the summary.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description or summary
    )
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The run's JSON, and what goes over it.

    Args:
        parser: The command.
        required: Whether it cannot do without.
    """
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--preset",
        metavar="NAME",
        help="a published recipe or a starting point in its place; see dat-ds presets",
    )
    source.add_argument("--deepspeed_config", metavar="FILE", help="the run's JSON")
    parser.add_argument(
        "--data",
        metavar="NAME[:PATH]",
        help="the images, such as cifar10:DIR or imagefolder:DIR; default those of the config",
    )
    # The deepspeed launcher adds these two to every script.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Keys over the config, and modules whose methods it may name."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config, such as dat.attack.steps=10; repeatable",
    )
    add_imports(parser)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Modules whose methods a config may name."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import a module of yours, so that the config may name its methods as "
        "MODULE:CLASS; repeatable",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """A file for the numbers."""
    parser.add_argument("--output", default=None, metavar="FILE", help="write the numbers as JSON")


def add_case(parser: argparse.ArgumentParser) -> None:
    """The target, and what it is judged by."""
    parser.add_argument("target", metavar="TARGET", help="the model")
    parser.add_argument(
        "--data",
        metavar="NAME[:PATH]",
        help="images, such as npz:FILE, imagefolder:DIR or digits; default those of the run",
    )
    parser.add_argument(
        "--threat",
        metavar="NORM:EPS",
        help="the ball, such as linf:8/255; default: that of the run",
    )
    parser.add_argument(
        "--num_examples", type=int, metavar="N", help="first images of the data; default all"
    )
    add_set(parser)


def add_output_folder(parser: argparse.ArgumentParser) -> None:
    """A folder for the results."""
    parser.add_argument("--output", metavar="DIR", help="folder of the results; created if missing")
    parser.set_defaults(makes_output=True)


def check_output(options: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before anything is measured for them."""
    flags = ["csv", "plot", "html", *([] if hasattr(options, "makes_output") else ["output"])]
    check_files(**{flag: getattr(options, flag, None) for flag in flags})


def load_run(options: argparse.Namespace, defaults: Mapping[str, Any]) -> RunConfig:
    """The run that the arguments of :func:`add_config` name.

    Args:
        options: What was typed.
        defaults: Values for keys that a file or starting point leaves out; a published recipe is
            complete, and takes none.

    Raises:
        UserError: With all problems found.
    """
    from dat_ds.config import load_config
    from dat_ds.config.load import read_values
    from dat_ds.presets import PRESETS, read_preset, with_data

    preset, data = getattr(options, "preset", None), getattr(options, "data", None)
    source = options.deepspeed_config if preset is None else read_preset(preset)
    if data is not None:
        source = with_data(read_values(source), data)
    elif preset in PRESETS and not any(text.startswith("dat.data") for text in options.set):
        name = source["dat"]["data"]["name"]
        raise UserError(f"--preset {preset} needs its images: add --data {name}:PATH.")
    return load_config(
        source,
        overrides=options.set,
        defaults=None if preset in PRESETS else defaults,
        imports=options.imports,
    )
