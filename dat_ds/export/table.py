"""The formats by name: a new one is a file and a place in this list."""

from __future__ import annotations

from dat_ds.export.base import Format
from dat_ds.export.folder import FolderFormat
from dat_ds.export.huggingface import HuggingFaceFormat
from dat_ds.export.onnx import OnnxFormat
from dat_ds.export.program import ProgramFormat
from dat_ds.export.robustbench import RobustBenchFormat
from dat_ds.export.safetensors import SafetensorsFormat
from dat_ds.export.timm import TimmFormat

_ALL: list[Format] = [
    TimmFormat(),
    HuggingFaceFormat(),
    SafetensorsFormat(),
    OnnxFormat(),
    ProgramFormat(),
    RobustBenchFormat(),
    FolderFormat(),
]

FORMATS: dict[str, Format] = {form.name: form for form in _ALL}
"""The choices of ``--to``."""
