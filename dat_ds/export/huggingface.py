"""transformers' layout: ``AutoModelForImageClassification`` and ``AutoImageProcessor``.

timm's layout is transformers' too: its ``TimmWrapperForImageClassification`` reads it as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_ds.export.base import (
    Format,
    Loaded,
    classifiers_only,
    label_names,
    network,
    normalised,
    unchanged_only,
)
from dat_ds.export.source import Source
from dat_ds.export.timm import write_timm


class HuggingFaceFormat(Format):
    """A folder for ``from_pretrained``, with the processor that normalises."""

    name = "hf"
    summary = "transformers' layout, for AutoModelForImageClassification"
    library = "transformers"
    normalises = False

    def problems(self, source: Source) -> Iterator[str]:
        """Models other than classifiers, stems that timm lacks, images that are not pictures."""
        yield from classifiers_only(source, self.name)
        if source.head == "classes":
            yield from unchanged_only(source, self.name, "transformers' TimmWrapper")
        channels = source.image_shape[0]
        if channels not in (1, 3):
            yield (
                f"--to hf: its image processors take images of 1 or 3 channels, not {channels}. "
                "Write --to timm, safetensors, onnx, program or folder."
            )

    def write(self, source: Source, folder: Path) -> None:
        """Config, weights and, of a network of transformers, the processor's config."""
        if not source.is_hugging_face:
            write_timm(source, folder)
            return
        model: Any = network(source)
        names = label_names(source)
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config._name_or_path = ""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        _processor(source).save_pretrained(folder)

    def load(self, source: Source, folder: Path) -> Loaded:
        """By transformers; pixels go through its image processor as levels of 8 bits.

        A processor that resizes by the shorter edge and crops would resize images of the model's
        own size as well; of such a one only the normalisation is used.
        """
        import transformers

        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(folder)

        def logits_of(values: Tensor) -> Tensor:
            logits: Tensor = model(values).logits
            return logits

        def classify(x: Tensor) -> Tensor:
            levels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            images = [image.numpy() for image in levels]
            return logits_of(processor(images, return_tensors="pt")["pixel_values"])

        if source.crop_share is not None:
            return normalised(logits_of, *_statistics(processor))
        return classify

    def usage(self, source: Source, place: str) -> str:
        """Model and processor."""
        return (
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
            f'model = AutoModelForImageClassification.from_pretrained("{place}")\n'
            f'processor = AutoImageProcessor.from_pretrained("{place}")'
        )


def _statistics(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of an image processor, transformers' own or timm's."""
    config = getattr(processor, "data_config", None)
    if config is None:
        return list(processor.image_mean), list(processor.image_std)
    return list(config["mean"]), list(config["std"])


def _processor(source: Source) -> Any:
    """What our pixels go through on their way from a picture to the network, as transformers'."""
    import transformers

    channels, height, width = source.image_shape
    shape: dict[str, Any] = {"size": {"height": height, "width": width}, "do_center_crop": False}
    if source.crop_share is not None:
        shape = {
            "size": {"shortest_edge": round(height / source.crop_share)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return transformers.CLIPImageProcessor(
        do_resize=True,
        resample=2,  # bilinear
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=source.spec["mean"],
        image_std=source.spec["std"],
        do_convert_rgb=channels == 3,
        **shape,
    )
