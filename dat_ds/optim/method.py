"""Base of the optimizer sections of a run config: an optimizer's options, and how it is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dat_ds.method import Method, above, at_least, option
from dat_ds.optim.groups import ParameterOptions, split_groups

BETAS = "two numbers in [0, 1)"


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Default of a parameter, as JSON has it: an optimizer's numbers stand in its signature."""
    default = inspect.signature(function).parameters[name].default
    return list(default) if isinstance(default, tuple) else default


def are_betas(values: list[float]) -> bool:
    """Whether ``values`` are two numbers in [0, 1)."""
    return len(values) == 2 and all(0 <= value < 1 for value in values)


def betas_option(default: list[float]) -> Any:
    """A field of Adam's two decays."""
    return option(default, BETAS, are_betas)


@dataclass(frozen=True, kw_only=True)
class OptimizerMethod(Method):
    """An optimizer of a run, instead of DeepSpeed's ``optimizer`` section.

    Vectors (biases, normalisation weights) are excluded from weight decay, as timm does.

    Attributes:
        scaling: The rule by which its learning rate usually follows the global batch.
        needs_layers: Whether it needs whole layers, which ZeRO's shards cut; see
            :class:`dat_ds.optim.LayerwiseOptimizer`.
        compresses: Whether ranks exchange its compressed momentum in the place of gradients.
        presets: Defaults by the value of the key ``preset``, where it has one.
    """

    kind: ClassVar[str] = "optimizer"
    scaling: ClassVar[str | None] = None
    needs_layers: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    lr: float = above(0, 1e-3)
    """Learning rate."""
    weight_decay: float = at_least(0, 0.0)
    """Weight decay of every parameter with at least two dimensions."""

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the preset."""
        preset = values.get("preset")
        return dict(cls.presets.get(preset, {})) if isinstance(preset, str) else {}

    def problems(self) -> Iterator[str]:
        """The optimizer's own errors about its options, found by building it for one layer."""
        try:
            self.build(nn.Linear(1, 1))
        except ValueError as error:
            starts_with_key = str(error).split("=")[0] in self.known_keys()
            yield str(error) if starts_with_key else f"name={self.name!r}: {error}"

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups; what a subclass defines."""
        raise TypeError(f"{type(self).__name__} defines no optimizer.")

    def arguments(self) -> dict[str, Any]:
        """Its options but for the preset, by name."""
        return {key: getattr(self, key) for key in self.known_keys() if key != "preset"}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a model."""
        return parameter_groups(model, self.weight_decay)

    def rate_of(self, group: Mapping[str, Any]) -> float:
        """Learning rate of one of its groups."""
        return float(group.get("lr", self.lr))

    def build(
        self, model: nn.Module, options: Mapping[Tensor, ParameterOptions] | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable parameters.

        Args:
            model: Any module.
            options: What some of its parameters do differently.
        """
        groups = self.groups(model)
        return self.optimizer(split_groups(groups, options, self.rate_of) if options else groups)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed matrices and undecayed vectors, as timm does.

    Args:
        model: Any module.
        weight_decay: Decay of every parameter with at least two dimensions.

    Returns:
        At most two groups for a torch optimizer; empty groups are left out (ZeRO refuses them).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
