"""Low-rank adapters: put into a network by peft, and merged into its weights where it is saved."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dat_ds.errors import ConfigError
from dat_ds.finetuning.section import LoraConfig

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
_ATTENTION = ("attn", "attention")
_FUSED = ("qkv", "proj")
_APART = ("query", "value", "q_proj", "v_proj")
_LISTED = 4


def without_adapters(name: str) -> str:
    """The name that a parameter of a layer with an adapter had before."""
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, is an adapter's."""
    return name.endswith((_A, _B))


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state's values, but for those of adapters, by the names that they have without any."""
    return {without_adapters(name): v for name, v in state.items() if not is_adapter(name)}


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state of the network without adapters that computes the same.

    Each ``W`` becomes ``W + scale * B A``, computed in float32 and rounded once, to the dtype of
    ``W``.

    Args:
        state: Whole tensors of a network with adapters, by name.
        scale: Factor of ``B A``.
    """
    plain: dict[str, Tensor] = plain_names(state)
    for name, down in state.items():
        if not name.endswith(_A):
            continue
        layer = name.removesuffix(_A)
        weight = plain[f"{layer}.weight"]
        update = state[layer + _B].float() @ down.float()
        plain[f"{layer}.weight"] = (weight.float() + scale * update).to(weight.dtype)
    return plain


def add_adapters(network: nn.Module, config: LoraConfig, *, seed: int) -> None:
    """Put adapters into a network, in place; they change none of its outputs at first.

    The first forward refuses layers that the network reads the weights of without calling them.

    Args:
        network: Its parameters are whole.
        config: Which layers, and how.
        seed: Decides on the initial ``A``, the same on all ranks; ``B`` is zero.

    Raises:
        ConfigError: Without peft, or for names of no linear layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"dat.finetuning.lora needs peft ({error}): install it with "
            'pip install "dat-ds[finetune]".'
        ) from None
    if any(hasattr(p, "ds_status") for p in network.parameters()):
        raise ConfigError(
            "dat.finetuning.lora adds layers to the model, but its parameters are sharded already: "
            "build it without deepspeed.zero.Init."
        )
    names = _targets(network, config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        bias="none",
    )
    was_training = {name: network.get_submodule(name).training for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(settings, network)
    for name in names:
        network.get_submodule(name).train(was_training[name])
    _UseCheck(network, names)


def _targets(network: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the layers that get an adapter."""
    linear = [name for name, m in network.named_modules() if type(m) is nn.Linear]
    if config.targets is None:
        attention = [n for n in linear if any(word in n.lower() for word in _ATTENTION)]
        for ends in (_FUSED, _APART):
            found = [n for n in attention if n.rpartition(".")[2] in ends]
            if any(n.rpartition(".")[2] == ends[0] or ends is _APART for n in found):
                return found
        raise ConfigError(
            "dat.finetuning.lora.targets is missing: the network has no attention layers by the "
            f"usual names ({', '.join((*_FUSED, *_APART))}). Write names of linear layers, such as "
            f"{_listed(linear)}."
        )
    chosen, problems = [], []
    for i, target in enumerate(config.targets):
        found = [n for n in linear if n == target or n.endswith(f".{target}")]
        if not found:
            near = difflib.get_close_matches(target, linear, n=_LISTED, cutoff=0.3)
            others = [n for n, _ in network.named_modules() if n == target or n.endswith(target)]
            kind = ""
            if others:
                kind = f" ({others[0]} is a {type(network.get_submodule(others[0])).__name__})"
            problems.append(
                f"dat.finetuning.lora.targets[{i}]={target!r} is not a linear layer of the network"
                f"{kind}. Near: {_listed(near or linear)}."
            )
        chosen += found
    if problems:
        raise ConfigError("\n".join(problems))
    return list(dict.fromkeys(chosen))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) or "none: it has no linear layer"


class _UseCheck:
    """Finds out, in the first forward of a network, which of its adapters it passes by.

    Some attention layers read ``qkv.weight`` and never call ``qkv``: an adapter of it would get no
    gradient.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self._unused = set(names)
        self._handles = [network.register_forward_hook(self._check)]
        for name in names:
            layer = network.get_submodule(name)
            # No closure: a deep copy of the network has to check its own layers.
            hook = functools.partial(self._see, name)
            self._handles.append(layer.register_forward_hook(hook))

    def _see(self, name: str, _module: nn.Module, _given: Any, _output: Any) -> None:
        self._unused.discard(name)

    def _check(self, _module: nn.Module, _given: Any, _output: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._unused:
            raise ConfigError(
                f"dat.finetuning.lora: the network reads the weights of "
                f"{_listed(sorted(self._unused))} without calling the layer, so an adapter there "
                "would never train. Write dat.finetuning.lora.targets with other layers, such as "
                "['attn.proj', 'mlp.fc1']."
            )
