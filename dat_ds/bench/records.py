"""Files of a benchmark's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dat_ds.errors import ConfigError
from dat_ds.evaluation import commit, hardware, versions
from dat_ds.files import write_json


def read_record(path: str, command: str) -> dict[str, Any]:
    """A benchmark's numbers, from a file.

    Args:
        path: The file.
        command: Command that writes such a record, for the message.

    Raises:
        ConfigError: If it cannot be read, or holds something else than an object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path!r}: {error}. It is written by: {command}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no numbers of a benchmark. Such a file is of: {command}")
    return values


def write_record(output: str | None, values: Mapping[str, Any], device: torch.device) -> None:
    """Write numbers as JSON, with the hardware, versions and commit that they come from.

    Args:
        output: File; None writes nothing.
        values: JSON-serialisable values.
        device: Where it was measured.

    Raises:
        CheckpointError: If it cannot be written.
    """
    if output is None:
        return
    origin = {"hardware": hardware(device), "versions": versions(), "commit": commit()}
    write_json(Path(output), {**values, **origin})
