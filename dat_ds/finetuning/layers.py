"""Where the network of a model is, what its classifier is, and how deep its parameters lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from torch import nn

from dat_ds.errors import ConfigError
from dat_ds.finetuning.lora import without_adapters
from dat_ds.models.families.huggingface import HuggingFaceBody
from dat_ds.models.families.timm import timm_head_names
from dat_ds.optim.muon import CLASSIFIERS


@dataclass(frozen=True)
class Network:
    """The network inside a model.

    Attributes:
        module: Of timm, of Hugging Face, or the model itself.
        prefix: What the names of its parameters begin with in the model.
    """

    module: nn.Module
    prefix: str

    @property
    def is_timm(self) -> bool:
        """Whether timm says how its parameters are grouped."""
        return callable(getattr(self.module, "group_matcher", None))

    @property
    def is_hugging_face(self) -> bool:
        """Whether it is a Hugging Face model."""
        return _is_hugging_face(self.module)

    def name_of(self, name: str) -> str:
        """A parameter's name in the network, from that in the model, as if it had no adapter."""
        return without_adapters(name.removeprefix(self.prefix))


def network_of(model: nn.Module) -> Network:
    """The network of timm or of Hugging Face within a model; else the model itself.

    Wrappers that hold one such network are looked through.
    """
    for name, module in model.named_modules():
        inner, inner_name = module, name
        if isinstance(module, HuggingFaceBody):
            inner, inner_name = module.model, f"{name}.model".lstrip(".")
        is_timm = callable(getattr(inner, "group_matcher", None))
        if is_timm or _is_hugging_face(inner):
            return Network(inner, f"{inner_name}." if inner_name else "")
    return Network(model, "")


def _is_hugging_face(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix") and hasattr(module, "config")


def classifier_of(network: Network) -> tuple[str, ...]:
    """Names of the modules that make up a network's classifier, within it; empty where unknown."""
    module = network.module
    if network.is_timm:
        return timm_head_names(module)
    if network.is_hugging_face:
        backbone = getattr(module, "base_model_prefix", "")
        return tuple(name for name, _ in module.named_children() if name != backbone)
    return tuple(name for name, _ in module.named_children() if name in CLASSIFIERS)


def rates_by_depth(network: Network, decay: float) -> dict[str, float]:
    """Factor of each parameter's learning rate: ``decay`` to the power of the layers above it.

    Layers of timm's networks are timm's: the stem, each block, the classifier. Those of Hugging
    Face's encoders are counted as by Bao et al.: what is defined before the blocks, each block, and
    what is defined behind them.

    Args:
        network: Its parameters, also those of adapters.
        decay: In (0, 1].

    Returns:
        Factors by name within the network.

    Raises:
        ConfigError: If its blocks are not one chain.
    """
    module: Any = network.module
    if network.is_timm:
        matcher = module.group_matcher(coarse=False)
        layers: Mapping[str, int] = group_parameters(module, matcher, reverse=True)
    else:
        layers = _numbers_by_block(network)
    top = max(layers.values())
    return {without_adapters(name): decay ** (top - layer) for name, layer in layers.items()}


def _numbers_by_block(network: Network) -> dict[str, int]:
    found = [
        (name, part)
        for name, part in network.module.named_modules()
        if isinstance(part, nn.ModuleList) and any(True for _ in part.parameters())
    ]
    if not network.is_hugging_face or len(found) != 1:
        held = ", ".join(repr(name) for name, _ in found) or "none"
        raise ConfigError(
            f"dat.finetuning.layer_decay: {type(network.module).__name__} is neither a network of "
            "timm nor a Hugging Face encoder of one chain of blocks (lists of blocks in it: "
            f"{held}), so its layers are not known. Write rates by name: dat.finetuning.parameters="
            '[{"match": "...", "lr": 0.1}].'
        )
    ((chain, blocks),) = found
    numbers, is_behind = {}, False
    for name, _ in network.module.named_parameters():
        if name.startswith(f"{chain}."):
            numbers[name] = int(name.removeprefix(f"{chain}.").split(".")[0]) + 1
            is_behind = True
        else:
            numbers[name] = len(blocks) + 1 if is_behind else 0
    return numbers
