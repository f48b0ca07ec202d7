"""Files of a benchmark's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dat_ds.evaluation import commit, hardware, versions
from dat_ds.files import write_json


def write_record(output: str | None, values: Mapping[str, Any], device: torch.device) -> None:
    """Write numbers as JSON, with the hardware, versions and commit that they come from.

    Args:
        output: File; None writes nothing.
        values: What can be written as JSON.
        device: Where it was measured.
    """
    if output is None:
        return
    origin = {"hardware": hardware(device), "versions": versions(), "commit": commit()}
    write_json(Path(output), {**values, **origin})
