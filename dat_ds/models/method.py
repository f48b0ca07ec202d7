"""The sections that choose a model: where its network comes from, and that library's keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dat_ds.contracts import MOST_CLASSES
from dat_ds.kinds import Checkpointing
from dat_ds.method import Method, Table, Trait, above, fraction, option

HUGGING_FACE = "hf:"


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method):
    """A network, with normalisation inside: any timm model by name, or ``hf:PATH``.

    Where no name is given, ``digits`` get a ViT of 4 blocks and width 64 that fits their 8 x 8
    pixels.
    """

    kind: ClassVar[str] = "model"

    name: str = "vit_tiny_patch16_224"  # type: ignore[misc]  # of the network, not of the class
    """Name of the network."""
    num_classes: int | None = option(
        None,
        f"a number from 2 to {MOST_CLASSES}",
        lambda v: 2 <= v <= MOST_CLASSES,
        traits={Trait.SUPPORTS_CLASSES: lambda v: True},
    )
    """Outputs of the classifier. Default: the number of classes of the data. Self-supervised
    objectives choose their own."""
    img_size: int | None = above(0, None)
    """Side of the images that the network is built for. Default: that of the data's images."""
    pretrained: str | None = None
    """Weights to start from: a file (``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.pth.tar``);
    a run, of which the best model is taken; or ``timm`` for those that timm publishes under the
    model's name, which are fetched. The classifier is taken over where it has as many classes; that
    of a run where it serves the same purpose, too, and its classes, if both are named, are the same
    in the same order. Else it is a fresh one."""
    mean: list[float] | None = None
    """Mean of each channel that is subtracted inside the model, pixel units. Default: the data's;
    with ``pretrained`` and ``hf:``, the model's."""
    std: list[float] | None = None
    """Standard deviation of each channel, by which the model divides, pixel units. Default: as for
    ``mean``."""
    activation_checkpointing: Checkpointing = option(
        "none",
        traits={
            Trait.SAVES_RANDOM_STATES: lambda v: v != "none",
            Trait.CHANGES_THE_MODEL: lambda v: v == "reentrant",
            Trait.DROPS_GRADIENTS: lambda v: v == "reentrant",
            Trait.REFUSES_PLAIN_GRADIENTS: lambda v: v == "reentrant",
        },
    )
    """Recompute activations in the backward pass instead of keeping them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm model, or fields of the Hugging Face config."""

    def problems(self) -> Iterator[str]:
        """Half of the statistics, or a spread that is none."""
        if (self.mean is None) != (self.std is None):
            yield "mean and dat.model.std go together: give both or neither."
        if self.std is not None and min(self.std, default=0) <= 0:
            yield f"std={self.std} must hold positive numbers."

    def overrides(self) -> dict[str, Any]:
        """Arguments of :func:`dat_ds.models.build_model` that only this kind of network has."""
        own = [key for key in self.known_keys() if key not in ModelMethod.known_keys()]
        return {key: getattr(self, key) for key in own}


@dataclass(frozen=True, kw_only=True)
class TimmModel(ModelMethod):
    """A network of timm, by its name there."""

    paper: ClassVar[str] = "https://github.com/huggingface/pytorch-image-models"

    patch_size: int | None = above(0, None)
    """Side of a patch in pixels."""
    depth: int | None = above(0, None)
    """Number of blocks."""
    embed_dim: int | None = above(0, None)
    """Width of the tokens."""
    num_heads: int | None = above(0, None)
    """Number of attention heads, a divisor of the width."""
    drop_rate: float | None = fraction(None)
    """Dropout probability before the classifier."""
    drop_path_rate: float | None = fraction(None)
    """Largest stochastic-depth probability."""
    stem: Literal["default", "cifar"] = "default"
    """``cifar`` replaces the stem of a ResNet, for images of 32 pixels and less."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel(ModelMethod):
    """A Hugging Face image classifier: ``hf:`` and a local folder, or a hub id."""

    paper: ClassVar[str] = "https://github.com/huggingface/transformers"

    name: str = HUGGING_FACE  # type: ignore[misc]  # of the network, not of the class
    """``hf:`` and the folder or hub id of the network."""


class ModelTable(Table[ModelMethod]):
    """The kinds of networks, told apart by the beginning of a model's name."""

    def find(self, name: Any, path: str, problems: list[str]) -> type[ModelMethod] | None:
        """The kind of the network of that name."""
        is_hugging_face = isinstance(name, str) and name.startswith(HUGGING_FACE)
        return self["hf" if is_hugging_face else "timm"]


MODELS = ModelTable(
    "model",
    ModelMethod,
    {"timm": TimmModel, "hf": HuggingFaceModel},
    "timm",
    names="the name of any timm model, or `hf:` and a folder or hub id",
)
"""The kinds of networks that ``dat.model`` names: a new one is a class and a place in this list."""
