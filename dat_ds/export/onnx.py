"""ONNX, normalisation inside, any batch."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from dat_ds.export.base import Format, Loaded
from dat_ds.export.source import Source

GRAPH = "model.onnx"
_INPUT = "pixels"
_MOST_IN_ONE_FILE = 1_500_000_000  # bytes; protobuf ends at two gibibytes


class OnnxFormat(Format):
    """``model.onnx``, and a file of weights beside it where they are large."""

    name = "onnx"
    summary = "an ONNX graph, normalisation inside, any batch"
    library = "onnx"
    needs = ("onnx", "onnxscript")

    def write(self, source: Source, folder: Path) -> None:
        """By torch's exporter on top of ``torch.export``."""
        weights = sum(p.numel() * p.element_size() for p in source.model.parameters())
        # The exporter reports its progress.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                source.model,
                (source.example(2),),
                folder / GRAPH,
                dynamo=True,
                dynamic_shapes=({0: Dim("batch")},),
                input_names=[_INPUT],
                output_names=[_output(source)],
                external_data=weights > _MOST_IN_ONE_FILE,
            )

    def load(self, source: Source, folder: Path) -> Loaded:
        """By onnxruntime where it is installed, else by ONNX's reference implementation."""
        file = str(folder / GRAPH)
        if importlib.util.find_spec("onnxruntime") is not None:
            import onnxruntime

            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        else:
            import onnx.reference

            session = onnx.reference.ReferenceEvaluator(file)

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {_INPUT: x.numpy()})[0])

        return run

    def usage(self, source: Source, place: str) -> str:
        """A session, and what it is fed."""
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{GRAPH}")\n'
            f'{_output(source)} = session.run(None, {{"{_INPUT}": pixels}})[0]'
        )


def _output(source: Source) -> str:
    return "logits" if source.head in ("classes", "rotation") else "features"
