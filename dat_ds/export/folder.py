"""Our own saved model: weights and the arguments of ``build_model``."""

from __future__ import annotations

from pathlib import Path

from dat_ds.export.base import Format, Loaded
from dat_ds.export.source import Source
from dat_ds.models import load, save_weights


class FolderFormat(Format):
    """A folder for ``dat_ds.models.load``."""

    name = "folder"
    summary = "our own saved model, for dat_ds.models.load and dat-ds eval"
    library = "dat_ds"

    def write(self, source: Source, folder: Path) -> None:
        """``model.safetensors`` and ``model.json``."""
        save_weights(folder, source.model.state_dict(), source.spec)

    def load(self, source: Source, folder: Path) -> Loaded:
        """By ``dat_ds.models.load``."""
        return load(folder)

    def usage(self, source: Source, place: str) -> str:
        """One line."""
        return f'import dat_ds.models\n\nmodel = dat_ds.models.load("{place}")'
