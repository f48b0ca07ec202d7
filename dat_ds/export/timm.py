"""timm's layout on the hub: ``timm.create_model("hf-hub:USER/NAME", pretrained=True)``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm

from dat_ds.export.base import (
    WEIGHTS,
    Format,
    Loaded,
    label_names,
    network,
    normalised,
    timm_model_args,
    timm_name,
    unchanged_only,
    write_description,
    write_tensors,
)
from dat_ds.export.source import Source

CONFIG = "config.json"


class TimmFormat(Format):
    """``config.json`` and ``model.safetensors``, with mean and std as data of the config."""

    name = "timm"
    summary = "timm's layout on the hub, for timm.create_model"
    library = "timm"
    normalises = False

    def problems(self, source: Source) -> Iterator[str]:
        """Networks that timm cannot build from a name and arguments."""
        if source.is_hugging_face:
            yield (
                "--to timm: the network is one of transformers, not of timm. Write --to hf, "
                "safetensors, onnx, program or folder."
            )
        yield from unchanged_only(source, self.name, "timm")

    def write(self, source: Source, folder: Path) -> None:
        """As timm's own ``save_for_hf`` lays it out."""
        write_timm(source, folder)

    def load(self, source: Source, folder: Path) -> Loaded:
        """By timm, from the folder alone."""
        body = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["pretrained_cfg"]
        return normalised(body, values["mean"], values["std"])

    def usage(self, source: Source, place: str) -> str:
        """One line."""
        scheme = "hf-hub" if "/" in place and not Path(place).is_absolute() else "local-dir"
        return (
            "import timm\n\n"
            f'model = timm.create_model("{scheme}:{place}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )


def write_timm(source: Source, folder: Path) -> None:
    """Write timm's two files."""
    arguments = timm_model_args(source)
    published = getattr(source.model.body, "pretrained_cfg", {})
    transform: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"}
    if source.crop_share is not None:
        transform = {"crop_pct": source.crop_share, "crop_mode": "center"}
    values: dict[str, Any] = {
        "architecture": timm_name(source),
        "num_classes": source.spec["num_classes"],
        "num_features": getattr(source.model.body, "num_features", None),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": list(source.image_shape),
            "fixed_input_size": "img_size" in arguments,
            "mean": source.spec["mean"],
            "std": source.spec["std"],
            "interpolation": "bilinear",
            **transform,
            "num_classes": source.spec["num_classes"],
            "first_conv": published.get("first_conv"),
            "classifier": published.get("classifier"),
            "custom_load": False,
        },
    }
    if source.spec["num_classes"]:
        # Without names transformers takes any 1000 classes for those of ImageNet.
        values["label_names"] = label_names(source)
    write_description(folder / CONFIG, values)
    write_tensors(network(source).state_dict(), folder / WEIGHTS, folder / CONFIG)
