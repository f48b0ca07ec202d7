"""Trust ratios under every ZeRO stage beside those of whole layers in plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.bench.records import write_record
from dat_ds.config import RunConfig, precision_of
from dat_ds.errors import ConfigError
from dat_ds.optim import OPTIMIZERS, Constant, TrustRatioOptimizer
from dat_ds.optim.trust_ratio import TrustRatioMethod

if TYPE_CHECKING:
    from dat_ds.bench.engines import LayerwiseSteps

STEPS = 3
_ROUND_ROBIN = {"round_robin_gradients": True}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
_SHARDINGS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "1, round robin": {"stage": 1, **_ROUND_ROBIN},
    "2, round robin": {"stage": 2, **_ROUND_ROBIN},
    "1, offload": {"stage": 1, **_OFFLOAD},
    "2, offload": {"stage": 2, **_OFFLOAD},
    "2, round robin, offload": {"stage": 2, **_ROUND_ROBIN, **_OFFLOAD},
    "3, offload": {"stage": 3, **_OFFLOAD},
    "3, sub-groups": {"stage": 3, "sub_group_size": 10_000},
    "3, sub-groups, offload": {"stage": 3, "sub_group_size": 10_000, **_OFFLOAD},
}


def bench_trust_ratios(run: RunConfig, *, output: str | None = None) -> str:
    """Train a few steps naturally under each way to shard, and by hand; a collective.

    Args:
        run: Its model, without dropout, and optimizer; images are random, and the ZeRO section is
            replaced.
        output: JSON file for the numbers, written by rank 0.

    Returns:
        A markdown table: largest relative error of a trust ratio over all layers and steps; largest
        distance of a layer's final weights, in units of how far it moved; bytes each rank sent for
        norms in a step, gradient norms included. Empty on other ranks than 0.

    Raises:
        ConfigError: Without a layer-wise optimizer, or in another precision than float32.
    """
    if run.dat.optimizer is None or not isinstance(run.dat.optimizer, TrustRatioMethod):
        names = ", ".join(
            n for n, method in OPTIMIZERS.items() if issubclass(method, TrustRatioMethod)
        )
        raise ConfigError(f"There are no trust ratios: write dat.optimizer.name, one of {names}.")
    if precision_of(run.deepspeed) != "float32":
        raise ConfigError("Errors are those of float32: remove bf16, fp16 or torch_autocast.")
    from dat_ds.bench.engines import layerwise_steps, model_and_batches
    from dat_ds.training.twin import natural_twin_of

    run = natural_twin_of(run)
    model_section = run.dat.model
    rates = {"drop_rate", "drop_path_rate"} & set(model_section.known_keys())
    off: dict[str, Any] = dict.fromkeys(rates)
    without_dropout = dataclasses.replace(model_section, **off)
    dat = dataclasses.replace(run.dat, model=without_dropout, schedule=Constant())
    run = dataclasses.replace(run, dat=dat)
    ranks, model, batches = model_and_batches(run, STEPS)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_hand = copy.deepcopy(model).to(ranks.device)
    reference = _plain_steps(run, by_hand, [[t.to(ranks.device) for t in b] for b in batches])
    rows = {}
    for name, section in _SHARDINGS.items():
        if section["stage"] == 3:  # otherwise small parameters stay whole
            section = {**section, "stage3_param_persistence_threshold": 0}
        config = {**run.deepspeed, "zero_optimization": section}
        config["zero_allow_untested_optimizer"] = True
        sharded = dataclasses.replace(run, deepspeed=config)
        found = layerwise_steps(sharded, ranks, copy.deepcopy(model), batches)
        if ranks.is_main:
            rows[name] = _errors(found, reference, start)
    if not ranks.is_main:
        return ""
    numbers = {"shardings": rows, "ranks": ranks.count, "config": run.to_dict()}
    write_record(output, numbers, ranks.device)
    return _table(run, rows, ranks.count)


def _plain_steps(
    run: RunConfig, model: nn.Module, batches: Sequence[Sequence[Tensor]]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Trust ratios by step and final parameters of one process that takes all ranks' batches."""
    assert run.dat.optimizer is not None
    optimizer = run.dat.optimizer.build(model.train())
    assert isinstance(optimizer, TrustRatioOptimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    layers = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    clipping = float(run.deepspeed["gradient_clipping"])
    smoothing = float(getattr(run.dat.objective, "label_smoothing", 0.0))
    slots, ratios = len(batches) // STEPS, []
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in batches[step * slots : (step + 1) * slots]:
            loss = F.cross_entropy(model(x), y, label_smoothing=smoothing)
            (loss / slots).backward()  # type: ignore[no-untyped-call]
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        ratios.append(dict(zip(layers, optimizer.trust_ratios.values(), strict=True)))
    return ratios, {name: p.detach().cpu() for name, p in model.named_parameters()}


def _errors(
    found: LayerwiseSteps,
    reference: tuple[list[dict[str, float]], dict[str, Tensor]],
    start: Mapping[str, Tensor],
) -> dict[str, float]:
    ratios, weights = reference
    of_ratios = [
        abs(mine[layer] / ratio - 1)
        for mine, whole in zip(found.ratios, ratios, strict=True)
        for layer, ratio in whole.items()
    ]
    of_weights = [
        float((found.state[name].double() - w.double()).norm() / moved)
        for name, w in weights.items()
        if (moved := (w.double() - start[name].double()).norm()) > 0
    ]
    return {"ratios": max(of_ratios), "weights": max(of_weights), "norm_bytes": found.norms}


def _table(run: RunConfig, rows: Mapping[str, Mapping[str, float]], ranks: int) -> str:
    assert isinstance(run.dat.optimizer, TrustRatioMethod)
    preset = run.dat.optimizer.preset
    lines = [
        f"{run.dat.optimizer.name} ({preset}), {run.dat.model.name}, "
        f"{ranks} rank(s), {STEPS} steps: errors against whole layers in plain PyTorch.",
        "",
        "| ZeRO | trust ratios | weights | bytes for norms, per step |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        errors = f"{row['ratios']:.1e} | {row['weights']:.1e}"
        lines.append(f"| {name} | {errors} | {row['norm_bytes']} |")
    return "\n".join(lines)
