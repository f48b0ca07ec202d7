"""Files of a benchmark's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dat_ds.evaluation import commit, hardware, versions


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
    Path(output).write_text(json.dumps({**values, **origin}, indent=1) + "\n", encoding="utf-8")
