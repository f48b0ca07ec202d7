"""A plain state dict, and a description that says whose network it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import nn

from dat_ds.export.base import (
    WEIGHTS,
    Format,
    Loaded,
    changes,
    network,
    normalised,
    timm_model_args,
    timm_name,
    write_description,
    write_tensors,
)
from dat_ds.export.source import Source
from dat_ds.models.families.huggingface import HuggingFaceBody, body_from_config
from dat_ds.models.families.projection import use_projection_head
from dat_ds.models.families.stem import use_cifar_stem
from dat_ds.models.families.timm import timm_head_names

DESCRIPTION = "spec.json"


class SafetensorsFormat(Format):
    """The state dict of the network itself, by its library's own names."""

    name = "safetensors"
    summary = "a plain state dict, and a JSON file with architecture and normalisation"
    library = "pytorch"
    normalises = False

    def write(self, source: Source, folder: Path) -> None:
        """``model.safetensors`` and ``spec.json``."""
        write_description(folder / DESCRIPTION, describe_network(source))
        write_tensors(network(source).state_dict(), folder / WEIGHTS, folder / DESCRIPTION)

    def load(self, source: Source, folder: Path) -> Loaded:
        """Into a network that is built from ``spec.json`` alone."""
        values = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        body = _build(values)
        inner = body.model if isinstance(body, HuggingFaceBody) else body
        inner.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        return normalised(body.eval(), values["mean"], values["std"])

    def usage(self, source: Source, place: str) -> str:
        """The network of the spec, then its weights."""
        values = describe_network(source)
        if source.is_hugging_face:
            build = (
                'config = transformers.AutoConfig.for_model(**spec["config"])\n'
                "model = transformers.AutoModelForImageClassification.from_config(config)"
            )
        else:
            build = (
                'model = timm.create_model(spec["architecture"], num_classes=spec["num_classes"], '
                '**spec["model_args"])'
            )
        lines = [
            f"import json, safetensors.torch, {values['library']}",
            "",
            'spec = json.load(open("spec.json"))',
            build,
            *(f"# Change it first: {change}." for change in values["changes"]),
            'model.load_state_dict(safetensors.torch.load_file("model.safetensors"))',
        ]
        return "\n".join(lines)


def describe_network(source: Source) -> dict[str, Any]:
    """What somebody without dat_ds needs to build the network of the weights."""
    spec = source.spec
    values: dict[str, Any] = {
        "library": "transformers" if source.is_hugging_face else "timm",
        "num_classes": spec["num_classes"],
        "image_shape": list(source.image_shape),
        "mean": spec["mean"],
        "std": spec["std"],
        "stem": spec.get("stem", "default"),
        "head": source.head,
        "changes": changes(source),
    }
    if source.is_hugging_face:
        return {**values, "config": spec["hf_config"]}
    return {
        **values,
        "architecture": timm_name(source),
        "model_args": timm_model_args(source),
    }


def _build(values: dict[str, Any]) -> nn.Module:
    """The network that a description tells of, with weights that are to be overwritten."""
    if values["library"] == "transformers":
        body: nn.Module = body_from_config(values["config"])
        assert isinstance(body, HuggingFaceBody)
        if values["head"] == "projection":
            use_projection_head(body.model, body.head_names(), "it")
        return body
    name = values["architecture"]
    body = timm.create_model(name, num_classes=values["num_classes"], **values["model_args"])
    if values["stem"] == "cifar":
        use_cifar_stem(body, name)
    if values["head"] == "projection":
        use_projection_head(body, timm_head_names(body), name)
    return body
