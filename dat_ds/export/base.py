"""Base of the formats, and what several of them write."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor, nn

from dat_ds.export.source import Source
from dat_ds.models import Normalize
from dat_ds.models.families.timm import timm_arguments

WEIGHTS = "model.safetensors"

Loaded = Callable[[Tensor], Tensor]
"""An exported model: pixels in [0, 1], float32 ``(B, C, H, W)``, to outputs ``(B, K)``."""


class Format(ABC):
    """A format of another library, or our own.

    Attributes:
        name: Value of ``--to``.
        summary: In a few words.
        library: ``library_name`` of the model card.
        needs: Packages that writing it takes, of the extra ``export``.
        normalises: Whether normalisation is inside, so that it takes pixels in [0, 1].
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    library: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    normalises: ClassVar[bool] = True

    def problems(self, source: Source) -> Iterator[str]:
        """Why it cannot hold a model, each with the format to write in its place."""
        yield from ()

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Write the model's files into an empty folder."""

    @abstractmethod
    def load(self, source: Source, folder: Path) -> Loaded:
        """Load what :meth:`write` wrote, by the library that it was written for."""

    @abstractmethod
    def usage(self, source: Source, place: str) -> str:
        """Python that loads it from ``place``, a folder or the id of a repository."""


def write_tensors(state: Mapping[str, Tensor], file: Path, readable: Path) -> None:
    """Write a state dict as safetensors; tied tensors as separate copies.

    Args:
        state: Name to tensor.
        file: File to write.
        readable: A file whose permissions it gets; safetensors leaves it to its owner alone.
    """
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(copies, file, metadata={"format": "pt"})
    shutil.copymode(readable, file)


def write_description(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def network(source: Source) -> nn.Module:
    """The network without normalisation, as timm or transformers has it."""
    body = source.model.body
    return body.get_submodule("model") if source.is_hugging_face else body


def normalised(model: Loaded, mean: list[float], std: list[float]) -> Loaded:
    """A model of normalised images as one of pixels."""
    normalize = Normalize(mean, std)
    return lambda x: model(normalize(x))


def timm_name(source: Source) -> str:
    """Name of the architecture in timm, without the tag of published weights."""
    return str(source.spec["name"]).partition(".")[0]


def timm_model_args(source: Source) -> dict[str, Any]:
    """Keyword arguments of ``timm.create_model`` but for the number of classes."""
    arguments = timm_arguments(source.spec)
    return {key: value for key, value in arguments.items() if key != "num_classes"}


def label_names(source: Source) -> list[str]:
    """Names of the classes in the order of the outputs, ``LABEL_0`` ... where none are known."""
    names = None if source.measured is None else source.measured.class_names
    names = names or source.spec.get("class_names")
    if names is not None and len(names) == source.spec["num_classes"]:
        return list(names)
    return [f"LABEL_{i}" for i in range(source.spec["num_classes"])]


def changes(source: Source) -> list[str]:
    """What about the network is not timm's or transformers' own, in words."""
    found = []
    if source.spec.get("stem", "default") == "cifar":
        found.append(
            "dat.model.stem='cifar' puts a 3x3 convolution of stride 1 without max-pooling in the "
            "place of its stem"
        )
    if source.head == "projection":
        found.append("its projection head has two layers in the place of the classifier")
    return found


def unchanged_only(source: Source, name: str, library: str) -> Iterator[str]:
    """A problem for each change that ``library`` has no argument for."""
    for change in changes(source):
        yield (
            f"--to {name}: {change}, which {library} cannot build. Write --to safetensors, onnx, "
            "program or folder."
        )


def classifiers_only(source: Source, name: str) -> Iterator[str]:
    """A problem for outputs that are not logits of the data's classes."""
    if source.head != "classes":
        yield (
            f"--to {name}: it is for classifiers, and this model gives {source.head!r} "
            "(a self-supervised objective). Fine-tune it first (--set dat.model.pretrained=RUN), "
            "or write --to safetensors, onnx, program or folder."
        )
