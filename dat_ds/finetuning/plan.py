"""Makes a model ready for fine-tuning: adapters, what is frozen, and the options of the rest."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dat_ds.errors import ConfigError
from dat_ds.finetuning.layers import Network, classifier_of, network_of, rates_by_depth
from dat_ds.finetuning.lora import add_adapters, is_adapter
from dat_ds.finetuning.section import FinetuningConfig, ParameterRule
from dat_ds.optim import ParameterOptions
from dat_ds.patching import keep_in_evaluation

logger = logging.getLogger("dat_ds")
_PATH = "dat.finetuning"
_NEAR = 4


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the model.

    Attributes:
        name: In the network.
        tensor: Itself.
        rule: The first that matches its name; None where none does.
    """

    name: str
    tensor: nn.Parameter
    rule: ParameterRule | None


def prepare(
    model: nn.Module, config: FinetuningConfig, *, seed: int = 0
) -> Mapping[Tensor, ParameterOptions]:
    """Make a model ready for fine-tuning, in place.

    Frozen parameters do not require a gradient, and the model's input still may. BatchNorm whose
    own parameters are all frozen (where it has none: those of the module that it is in) stays in
    evaluation mode, so that its statistics are as fixed as they. Parameters that required no
    gradient before stay frozen, but for those of a rule with ``freeze=false``.

    Args:
        model: Its parameters are whole where adapters are asked for.
        config: What to do.
        seed: Of the adapters' initial weights.

    Returns:
        What trained parameters do differently from their optimizer's defaults; empty where none
        does.

    Raises:
        ConfigError: With all problems: patterns that decide about no parameter, a classifier or
            depth that is not known, or nothing left to train.
    """
    if not config.is_on:
        return {}
    network = network_of(model)
    trained_before = {p for p in model.parameters() if p.requires_grad}
    if config.lora is not None:
        add_adapters(network.module, config.lora, seed=seed)
    parameters = _matched(model, network, config)
    default = _trained_by_default(parameters, network, config, trained_before)
    for p in parameters:
        freeze = None if p.rule is None else p.rule.freeze
        p.tensor.requires_grad_(p.tensor in default if freeze is None else not freeze)
    trained = [p for p in parameters if p.tensor.requires_grad]
    if not trained:
        raise ConfigError(
            f"{_PATH} freezes all {len(parameters)} parameters, so there is nothing to train: "
            "write a rule with freeze=false, or fewer with freeze=true."
        )
    _refuse_idle(parameters, config)
    _fix_statistics(model)
    _say(trained, parameters)
    depth = {} if config.layer_decay is None else rates_by_depth(network, config.layer_decay)
    options: dict[Tensor, ParameterOptions] = {p.tensor: _options(p, depth) for p in trained}
    differs = any(own != ParameterOptions() for own in options.values())
    return options if differs else {}


def _options(parameter: _Parameter, depth: Mapping[str, float]) -> ParameterOptions:
    by_depth = depth.get(parameter.name, 1.0)
    rule = parameter.rule
    if rule is None:
        return ParameterOptions(by_depth)
    return ParameterOptions(by_depth * (1.0 if rule.lr is None else rule.lr), rule.weight_decay)


def _matched(model: nn.Module, network: Network, config: FinetuningConfig) -> list[_Parameter]:
    """All parameters with their rules, after refusing rules that none of them follows."""
    rules = config.parameters
    patterns = [re.compile(rule.match) for rule in rules]
    parameters, used, seen = [], set[int](), set[int]()
    for full_name, tensor in model.named_parameters():
        name = network.name_of(full_name)
        hits = [i for i, pattern in enumerate(patterns) if pattern.search(name)]
        seen.update(hits)
        used.update(hits[:1])
        parameters.append(_Parameter(name, tensor, rules[hits[0]] if hits else None))
    problems = []
    for i, rule in enumerate(rules):
        if i in used:
            continue
        at = f"{_PATH}.parameters[{i}].match={rule.match!r}"
        if i in seen:
            problems.append(
                f"{at}: all parameters that it matches follow an earlier rule. Write it before "
                "that one, or remove it."
            )
            continue
        names = [p.name for p in parameters]
        near = difflib.get_close_matches(rule.match, names, n=_NEAR, cutoff=0.3) or names[:_NEAR]
        problems.append(f"{at} matches no parameter of the model. Near: {', '.join(near)}.")
    if problems:
        raise ConfigError("\n".join(problems))
    return parameters


def _trained_by_default(
    parameters: list[_Parameter],
    network: Network,
    config: FinetuningConfig,
    trained_before: set[nn.Parameter],
) -> set[nn.Parameter]:
    """Parameters that are trained where no rule says otherwise."""
    if not config.linear_probe and config.lora is None:
        return trained_before
    classifier = classifier_of(network)
    if not classifier and config.linear_probe:
        raise ConfigError(
            f"{_PATH}.linear_probe=true: which part of {type(network.module).__name__} is its "
            f"classifier is not known. Write instead, with its name, {_PATH}.parameters=["
            '{"match": "^NAME", "freeze": false}, {"match": ".", "freeze": true}].'
        )
    heads = tuple(f"{name}." for name in classifier)
    return {
        p.tensor
        for p in parameters
        if is_adapter(p.name) or (p.name.startswith(heads) and p.tensor in trained_before)
    }


def _refuse_idle(parameters: list[_Parameter], config: FinetuningConfig) -> None:
    """Refuse rates of what is not trained."""
    problems = []
    for i, rule in enumerate(config.parameters):
        if rule.freeze is not None:
            continue
        if not any(p.tensor.requires_grad for p in parameters if p.rule is rule):
            problems.append(
                f"{_PATH}.parameters[{i}].match={rule.match!r} matches frozen parameters only: "
                "remove it, or write freeze=false in it."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _fix_statistics(model: nn.Module) -> None:
    for parent in model.modules():
        for module in parent.children():
            if not isinstance(module, _BatchNorm):
                continue
            own = list(module.parameters(recurse=False)) or list(parent.parameters())
            if own and not any(p.requires_grad for p in own):
                keep_in_evaluation(module)


def _say(trained: list[_Parameter], parameters: list[_Parameter]) -> None:
    frozen = [p for p in parameters if not p.tensor.requires_grad]
    if frozen:
        logger.info(
            "Fine-tuning trains %d of %d parameter tensors (%d of %d weights); the others are "
            "frozen.",
            len(trained),
            len(parameters),
            *(sum(_numel(p) for p in group) for group in (trained, parameters)),
        )


def _numel(parameter: _Parameter) -> int:
    return int(getattr(parameter.tensor, "ds_numel", parameter.tensor.numel()))
