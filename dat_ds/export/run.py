"""Exporting a model: read, write, load again, compare, and only then put in place."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from dat_ds.checkpoints import CHECKPOINTS, run_of
from dat_ds.errors import ExportError, UserError
from dat_ds.export.base import Format
from dat_ds.export.card import Card
from dat_ds.export.push import check_repository
from dat_ds.export.source import Source, Weights, read_source
from dat_ds.export.table import FORMATS
from dat_ds.method import did_you_mean

logger = logging.getLogger("dat_ds")

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to the largest output where that is above 1."""
_ROOM = 3  # times the weights: a program and its copy on the way to the disk
_BATCH = 3  # another one than programs are traced with


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to export, and how.

    Attributes:
        target: A run, one of its checkpoints, or a saved model.
        to: Name of the format.
        output: Folder to make; None for one in the run, or beside the model.
        weights: ``"ema"`` or ``"raw"``; None for those that were saved.
        record: Record whose accuracies the card tells; None for the model's own.
        license: The hub's name of the weights' licence.
        repository: Id of the repository that it will be uploaded to, for the card.
    """

    target: Path
    to: str
    output: Path | None = None
    weights: Weights | None = None
    record: Path | None = None
    license: str = "unknown"
    repository: str | None = None


def export(order: Order) -> Path:
    """Export a model.

    The folder appears when everything in it is written and was compared with the model; nothing is
    overwritten.

    Args:
        order: What to export.

    Returns:
        The folder.

    Raises:
        UserError: With all problems found; or the format's loaded model does not give the outputs
            of the training model; or there is no room.
    """
    form, source = _prepare(order)
    output = order.output or default_output(order)
    whole = output.absolute()
    staging = whole.with_name(f".{whole.name}.{os.getpid()}.partial")
    try:
        with _writing(output):
            staging.mkdir(parents=True)
            _check_room(staging, source)
            with _named_errors(form):
                form.write(source, staging)
        difference = compare(form, source, staging)
        card = Card(
            form=form,
            place=order.repository or whole.name,
            license=order.license,
            difference=difference,
        )
        with _writing(output):
            (staging / "README.md").write_text(card.text(source), encoding="utf-8")
            if output.exists():
                output.rmdir()  # empty
            os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info(
        "Exported to %s. Weights: %s. Loaded again, the outputs differ from the training model's "
        "by at most %.1e.",
        output,
        source.weights,
        difference,
    )
    return output


def default_output(order: Order) -> Path:
    """Where an export goes that names no folder: ``RUN/exports``, or beside the model."""
    target = order.target.parent if order.target.is_file() else order.target
    target = target if target.name else target.absolute()  # "."
    suffix = "" if order.weights is None else f"-{order.weights}"
    run = run_of(target)
    if run is not None:
        return run / "exports" / f"{order.to}-{target.name}{suffix}"
    if (target / CHECKPOINTS).is_dir():
        return target / "exports" / f"{order.to}{suffix}"
    return target.with_name(f"{target.name}-{order.to}{suffix}")


def compare(form: Format, source: Source, folder: Path) -> float:
    """Load what was exported and compare it with the training model on random pixels.

    Returns:
        The largest difference of outputs.

    Raises:
        ExportError: It is above :data:`TOLERANCE`.
    """
    x = source.example(_BATCH)
    with torch.no_grad():
        expected = source.model(x)
        with _named_errors(form):
            found = form.load(source, folder)(x)
    if found.shape != expected.shape:
        raise ExportError(
            f"--to {form.name}: loaded again, the model gives outputs of shape "
            f"{tuple(found.shape)}, not {tuple(expected.shape)}. Nothing was kept."
        )
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ExportError(
            f"--to {form.name}: loaded again, the model's outputs differ from the training "
            f"model's by {difference:.2g} on random pixels (allowed: {TOLERANCE}). Nothing was "
            "kept. Write --to folder, which is loaded as it was trained."
        )
    return difference


def _prepare(order: Order) -> tuple[Format, Source]:
    """The format and the model, after all problems were looked for."""
    problems = []
    form = FORMATS.get(order.to)
    if form is None:
        hint = did_you_mean(order.to, FORMATS)
        formats = ", ".join(FORMATS)
        problems.append(f"--to {order.to!r} is not a format{hint}. Write one of {formats}.")
    else:
        missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
        if missing:
            problems.append(
                f"--to {order.to} needs {' and '.join(missing)}: pip install 'dat-ds[export]'."
            )
    problems += _output_problems(order.output or default_output(order))
    if order.repository is not None:
        problems += check_repository(order.repository)
    source = None
    try:
        source = read_source(order.target, order.weights, order.record)
        if form is not None:
            problems += form.problems(source)
    except UserError as error:
        problems.append(str(error))
    if problems or form is None or source is None:
        raise ExportError("\n".join(problems))
    return form, source


def _output_problems(output: Path) -> Iterator[str]:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        kind = "is not empty" if output.is_dir() else "is a file"
        yield f"--output {output} {kind}, and nothing is overwritten: name another folder."


def _check_room(folder: Path, source: Source) -> None:
    state = source.model.state_dict().values()
    needed = _ROOM * sum(tensor.numel() * tensor.element_size() for tensor in state)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"No room in {folder.parent}: the export takes up to {needed / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free. Make room, or name another place by --output."
        )


@contextlib.contextmanager
def _named_errors(form: Format) -> Iterator[None]:
    """Say which format it was that a library cannot write or load the model in."""
    try:
        yield
    except (OSError, SafetensorError, UserError):
        raise
    except Exception as error:  # libraries raise whatever their exporters do
        if _is_write_error(error):
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ExportError(
            f"--to {form.name} does not work for this model: {reason} Nothing was kept. Write "
            "--to folder or safetensors, which hold any model."
        ) from error


def _is_write_error(error: Exception) -> bool:
    # torch's writer reports a full disk as a RuntimeError of its own.
    words = ("PytorchStreamWriter", "unexpected pos", "file write")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn a file error inside, such as a full disk, into one message."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_write_error(error):
            raise
        raise ExportError(
            f"Cannot write {output}: {error}. Nothing was left there. Make room, or name another "
            "place by --output."
        ) from None
