"""An exported program of ``torch.export``, normalisation inside, any batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import Dim

from dat_ds.export.base import Format, Loaded
from dat_ds.export.source import Source

PROGRAM = "model.pt2"


class ProgramFormat(Format):
    """``model.pt2``: needs neither this package nor the network's own, and has gradients."""

    name = "program"
    summary = "a program of torch.export (.pt2), normalisation inside, any batch"
    library = "pytorch"

    def write(self, source: Source, folder: Path) -> None:
        """One file."""
        program = torch.export.export(
            source.model, (source.example(2),), dynamic_shapes=({0: Dim("batch")},), strict=False
        )
        torch.export.save(program, folder / PROGRAM)

    def load(self, source: Source, folder: Path) -> Loaded:
        """By torch alone."""
        return torch.export.load(folder / PROGRAM).module()

    def usage(self, source: Source, place: str) -> str:
        """One line."""
        return f'import torch\n\nmodel = torch.export.load("{PROGRAM}").module()'
