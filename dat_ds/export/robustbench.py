"""An entry for RobustBench: its description of a model, and code that builds the model."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from dat_ds.export.base import (
    WEIGHTS,
    Format,
    Loaded,
    classifiers_only,
    network,
    timm_model_args,
    timm_name,
    write_description,
    write_tensors,
)
from dat_ds.export.measured import Measured
from dat_ds.export.source import Source

CODE = "model.py"
_THREATS = {"linf": "Linf", "l2": "L2"}
_DATASETS = ("cifar10", "cifar100", "imagenet")
_TO_FILL_IN = ("link", "name", "authors", "venue", "additional_data")
_CODE = '''"""{architecture}: pixels in [0, 1] to logits. Needs torch, timm and safetensors."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn


class Model(nn.Module):
    """The network, with normalisation inside."""

    def __init__(self):
        super().__init__()
        self.body = timm.create_model({arguments})
{stem}        self.register_buffer("mean", torch.tensor({mean}).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor({std}).view(1, -1, 1, 1))

    def forward(self, x):
        return self.body((x - self.mean) / self.std)


def build():
    """The model with its weights, in eval mode."""
    model = Model()
    model.body.load_state_dict(load_file(Path(__file__).with_name("{weights}")))
    return model.eval()
'''
_CIFAR_STEM = """\
        conv = self.body.conv1  # a stem for small images
        self.body.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=False)
        self.body.maxpool = nn.Identity()
"""


class RobustBenchFormat(Format):
    """``model_info/DATASET/THREAT/NAME.json``, ``model.py`` and ``model.safetensors``."""

    name = "robustbench"
    summary = "an entry for RobustBench: model-info JSON, code and weights"
    library = "timm"

    def problems(self, source: Source) -> Iterator[str]:
        """What RobustBench has no table for, and what its entry needs."""
        yield from classifiers_only(source, self.name)
        if source.is_hugging_face:
            yield (
                "--to robustbench: model.py builds the network by timm, and this one is of "
                "transformers. Write --to hf or program."
            )
        if source.measured is None:
            yield (
                "--to robustbench: an entry has accuracies, and none are known of these weights. "
                "Run dat-ds eval first, or name its evaluation.json by --record."
            )
        elif source.measured.norm not in _THREATS:
            yield (
                f"--to robustbench: its tables are of linf and l2, not of {source.measured.norm}."
            )

    def write(self, source: Source, folder: Path) -> None:
        """Three files."""
        measured = source.measured
        assert measured is not None
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", source.name)
        info = folder / "model_info" / _dataset(measured) / _THREATS[measured.norm]
        info.mkdir(parents=True)
        write_description(info / f"{name}.json", entry(source, measured))
        (folder / CODE).write_text(_code(source), encoding="utf-8")
        write_tensors(network(source).state_dict(), folder / WEIGHTS, folder / CODE)

    def load(self, source: Source, folder: Path) -> Loaded:
        """By ``model.py``, which imports nothing of ours."""
        model: nn.Module = runpy.run_path(str(folder / CODE))["build"]()
        return model

    def usage(self, source: Source, place: str) -> str:
        """One line, beside the files."""
        return "from model import build\n\nmodel = build()"


def entry(source: Source, measured: Measured) -> dict[str, Any]:
    """RobustBench's description of a model.

    Accuracies are in percent, as text. ``reported`` is the worst case over our ensemble;
    ``autoattack_acc`` is RobustBench's own measurement and stays null. What only an author knows
    is null as well.
    """
    worst = measured.worst_case
    assert measured.natural_acc is not None
    footnote = (
        f"Evaluated on {measured.num_examples} images with dat_ds ({measured.file}, sha256 "
        f"{measured.sha256}): "
    )
    footnote += "; ".join(f"{words} {acc:.2%}" for words, acc in measured.rows()) + "."
    unknown: dict[str, Any] = dict.fromkeys(_TO_FILL_IN)
    dataset = _dataset(measured)
    return {
        **unknown,
        "number_forward_passes": 1,
        "dataset": dataset if dataset in _DATASETS else None,
        "architecture": timm_name(source),
        "eps": measured.eps,
        "clean_acc": f"{100 * measured.natural_acc:.2f}",
        "reported": None if worst is None else f"{100 * worst:.2f}",
        "autoattack_acc": None,
        "footnote": footnote,
        "unreliable": bool(measured.remarks),
    }


def _dataset(measured: Measured) -> str:
    return re.sub(r"[^a-z0-9]+", "", measured.data.lower()) or "unknown"


def _code(source: Source) -> str:
    arguments = {"num_classes": source.spec["num_classes"], **timm_model_args(source)}
    words = [repr(timm_name(source)), *(f"{k}={v!r}" for k, v in arguments.items())]
    return _CODE.format(
        architecture=timm_name(source),
        arguments=", ".join(words),
        stem=_CIFAR_STEM if source.spec.get("stem") == "cifar" else "",
        mean=source.spec["mean"],
        std=source.spec["std"],
        weights=WEIGHTS,
    )
