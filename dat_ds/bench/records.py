"""Files of a benchmark's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dat_ds.errors import CheckpointError, ConfigError
from dat_ds.evaluation import commit, hardware, versions
from dat_ds.files import write_json


def write_record(output: str | None, values: Mapping[str, Any], device: torch.device) -> None:
    """Write numbers as JSON, with the hardware, versions and commit that they come from.

    Args:
        output: File; None writes nothing.
        values: What can be written as JSON.
        device: Where it was measured.

    Raises:
        ConfigError: If it cannot be written.
    """
    if output is None:
        return
    origin = {"hardware": hardware(device), "versions": versions(), "commit": commit()}
    try:
        write_json(Path(output), {**values, **origin})
    except CheckpointError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"{reason}: make room, and repeat the command.") from None
