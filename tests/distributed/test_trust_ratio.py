"""Trust ratios of LAMB and LARS are those of whole layers, however ZeRO cuts them."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dat_ds.optim import build_optimizer
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks
from tests.distributed.test_parity import weights_of

STEPS, MICRO_BATCH = 3, 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lamb": {"name": "lamb", "lr": 0.01},
    "lars": {"name": "lars", "nesterov": True},
    "lamb, paper": {"name": "lamb", "preset": "paper"},
    "lars, paper": {"name": "lars", "preset": "paper"},
}
ROUND_ROBIN, OFFLOAD = {"round_robin_gradients": True}, {"offload_optimizer": {"device": "cpu"}}
SMALL_GROUPS = {"sub_group_size": 500}
SHARDINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "1, round robin": (1, ROUND_ROBIN),
    "2, round robin": (2, ROUND_ROBIN),
    "1, offload": (1, OFFLOAD),
    "2, offload, round robin": (2, {**OFFLOAD, **ROUND_ROBIN}),
    "3, offload": (3, OFFLOAD),
    "3, sub-groups": (3, SMALL_GROUPS),
    "3, sub-groups, offload": (3, {**SMALL_GROUPS, **OFFLOAD}),
}
ACCUMULATED_AND_CLIPPED = (2, 0.05)
CASES = [
    *itertools.product(SHARDINGS, ["lamb"], [(1, 0.0)]),
    *itertools.product(SHARDINGS, ["lars, paper"], [ACCUMULATED_AND_CLIPPED]),
    *itertools.product(
        ["1", "2, offload, round robin", "3, sub-groups"], ["lars", "lamb, paper"], [(1, 0.0)]
    ),
]
HALF = [
    (precision, sharding)
    for precision in ("bf16", "autocast", "fp16")
    for sharding in ("0", "1", "2, offload, round robin", "3", "3, sub-groups, offload")
    if (precision, sharding) != ("fp16", "0")
]
RESUMED = [
    *itertools.product(SHARDINGS, ["lamb"], ["float32"]),
    *itertools.product(["1", "3, sub-groups"], ["lars"], ["float32"]),
    *itertools.product(["0", "2, round robin", "3, sub-groups"], ["lamb"], ["bf16"]),
]
FROZEN = "blocks.0.attn.qkv.weight"


def model_of(frozen: bool = False) -> torch.nn.Module:
    model = tiny.vit()
    model.get_parameter(FROZEN).requires_grad_(not frozen)
    return model


def start(
    sharding: str,
    optimizer: Any,
    *,
    accumulation: int = 1,
    clip: float = 0.0,
    frozen: bool = False,
    **keys: Any,
) -> Any:
    """An engine that trains naturally: attacks do not concern optimizers."""
    import dat_ds

    stage, zero = SHARDINGS[sharding]
    dat: dict[str, Any] = {"attack": {"name": "none"}, **keys.pop("dat", {})}
    config = tiny.config(
        stage,
        zero_optimization=zero,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=clip,
        dat=dat,
        **keys,
    )
    del config["optimizer"]
    if isinstance(optimizer, dict):
        config["dat"]["optimizer"] = optimizer
        return dat_ds.initialize(model=model_of(frozen), config=config)[0]
    config["zero_allow_untested_optimizer"] = True
    model = model_of(frozen)
    return dat_ds.initialize(model=model, config=config, optimizer=optimizer(model))[0]


def batches(slots: int) -> list[tuple[Tensor, Tensor]]:
    x, y = tiny.images(2 * STEPS * slots * MICRO_BATCH)
    return list(zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True))


def take_steps(engine: Any, first: int = 0, last: int = STEPS) -> list[dict[str, float]]:
    """Optimizer steps ``first`` to ``last``; the trust ratios of each that this rank knows."""
    slots, ranks = engine.accumulation * engine.ranks.count, engine.ranks
    data, ratios = batches(slots), []
    for step in range(first, last):
        for micro in range(engine.accumulation):
            engine.backward(engine(*data[step * slots + micro * ranks.count + ranks.rank]))
            engine.step()
        ratios.append(getattr(engine.deepspeed.basic_optimizer, "trust_ratios", {}))
    return ratios


def train(sharding: str, optimizer: Any, **options: Any) -> dict[str, Any]:
    engine = start(sharding, optimizer, **options)
    ratios = take_steps(engine)
    report = {
        "ratios": ratios,
        "weights": weights_of(engine),
        "calls": engine.collectives.get("norms", 0),
        "bytes": engine.metrics["bytes_sent"].get("norms", 0),
    }
    engine.close()
    return report


def resume(sharding: str, name: str, folder: str, **keys: Any) -> tuple[Any, Any]:
    """Weights after four steps without a break, and with one after two."""
    engine = start(sharding, OPTIMIZERS[name], **keys)
    take_steps(engine, 0, 2)
    engine.deepspeed.save_checkpoint(folder, tag="here")
    take_steps(engine, 2, 4)
    unbroken = weights_of(engine)
    engine.close()
    engine = start(sharding, OPTIMIZERS[name], **keys)
    engine.deepspeed.load_checkpoint(folder, tag="here")
    take_steps(engine, 2, 4)
    resumed = weights_of(engine)
    engine.close()
    return unbroken, resumed


def refuses_bare_deepspeed() -> str:
    import deepspeed

    from dat_ds.optim import Lamb

    config = tiny.config(2, zero_allow_untested_optimizer=True)
    del config["optimizer"], config["dat"]
    model = tiny.vit()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=Lamb(model.parameters()), config=config
    )
    x, y = tiny.images(MICRO_BATCH)
    engine.backward(F.cross_entropy(engine(x), y))
    with pytest.raises(RuntimeError) as caught:
        engine.step()
    engine.destroy()
    return str(caught.value)


def scaled_rate(section: dict[str, Any], scaling: str) -> tuple[float, list[str]]:
    """Learning rate of an engine at twice the base batch, and what was said on the way."""
    import dat_ds

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dat_ds")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    base_batch = dist.get_world_size() * MICRO_BATCH // 2
    schedule = {"name": "constant", "scaling": scaling, "base_batch": base_batch}
    config = tiny.config(1, dat={"schedule": schedule, **section.get("dat", {})})
    config["optimizer"] = section.get("optimizer")
    if "dat" in section:
        del config["optimizer"]
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    logger.removeHandler(handler)
    (rate,) = set(engine.deepspeed.get_lr())
    engine.close()
    return rate, [words for words in said if "earning" in words]


def refused_offload() -> str:
    import dat_ds
    from dat_ds.errors import ConfigError
    from dat_ds.optim import Lamb

    model, partial = tiny.vit(), {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    config = tiny.config(3, zero_optimization=partial)
    del config["optimizer"]
    with pytest.raises(ConfigError) as caught:
        dat_ds.initialize(model=model, config=config, optimizer=Lamb(model.parameters()))
    return str(caught.value)


def timm_lamb(model: torch.nn.Module) -> torch.optim.Optimizer:
    import timm.optim

    return timm.optim.Lamb(
        model.parameters(), lr=0.01, weight_decay=0.01, max_grad_norm=None, always_adapt=True
    )


def on_two_ranks(folder: str) -> dict[str, Any]:
    from dat_ds.engine.launch import setup_ranks

    setup_ranks()
    allow_fp16()
    adamw = {"name": "adamw"}
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    reports: dict[str, Any] = {
        "bare": refuses_bare_deepspeed(),
        "refused": refused_offload(),
        "rates": [
            scaled_rate({"dat": {"optimizer": {"name": "lamb", "lr": 0.5}}}, "sqrt"),
            scaled_rate({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}, "sqrt"),
            scaled_rate({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}, "linear"),
        ],
        "adamw": {sharding: train(sharding, adamw) for sharding in SHARDINGS},
        "timm": {sharding: train(sharding, timm_lamb) for sharding in ("0", "2")},
        "frozen": {
            sharding: train(sharding, OPTIMIZERS["lamb"], frozen=True)
            for sharding in ("0", "2, round robin", "3, sub-groups")
        },
        "cases": {},
        "half": {},
        "resumed": [],
    }
    for sharding, name, (accumulation, clip) in CASES:
        reports["cases"][sharding, name, (accumulation, clip)] = train(
            sharding, OPTIMIZERS[name], accumulation=accumulation, clip=clip
        )
    for precision, sharding in HALF:
        keys = fp16 if precision == "fp16" else tiny.PRECISIONS[precision]
        reports["half"][precision, sharding] = train(sharding, OPTIMIZERS["lamb"], **keys)
    for sharding in ("0", "2"):
        dat = {"weight_perturbation": {"name": "sam"}}
        reports["sam", sharding] = train(sharding, OPTIMIZERS["lamb"], dat=dat)
    keys = {**tiny.PRECISIONS["bf16"], "data_types": {"grad_accum_dtype": "fp32"}}
    reports["half"]["bf16", "1, BF16_Optimizer"] = train("1", OPTIMIZERS["lamb"], **keys)
    for i, (sharding, name, precision) in enumerate(RESUMED):
        here = str(Path(folder) / str(i))
        reports["resumed"].append(resume(sharding, name, here, **tiny.PRECISIONS[precision]))
    return reports


def on_three_ranks() -> dict[str, Any]:
    return {
        sharding: train(sharding, OPTIMIZERS["lamb"])
        for sharding in ("1", "2, round robin", "3", "3, sub-groups")
    }


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def reports(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    return by_rank[0]


def unsharded(
    name: str, ranks: int, accumulation: int, clip: float, frozen: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and trust ratios of one process in plain PyTorch, on all ranks' batches."""
    model = model_of(frozen)
    optimizer = build_optimizer(model, OPTIMIZERS[name])
    trainable = {id(p): n for n, p in model.named_parameters()}
    names = [trainable[id(p)] for group in optimizer.param_groups for p in group["params"]]
    slots, ratios = accumulation * ranks, []
    data = batches(slots)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in data[step * slots : (step + 1) * slots]:
            (F.cross_entropy(model(x), y) / slots).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        ratios.append(dict(zip(names, optimizer.trust_ratios.values(), strict=True)))
    return model.state_dict(), ratios


def merged(by_rank: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Every layer's ratio: ranks that hold no piece of it read 1."""
    ratios: dict[str, float] = {}
    for report in by_rank:
        for name, ratio in report["ratios"][step].items():
            known = ratios.get(name, 1.0)
            assert 1.0 in (known, ratio) or known == ratio, "ranks agree"
            ratios[name] = ratio if known == 1.0 else known
    return ratios


def distances(state: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Distance of each layer from the reference, relative to how far that has moved."""
    start = model_of().state_dict()
    moved = {k: (v.double() - start[k].double()).norm().item() for k, v in reference.items()}
    return {
        k: ((state[k].double() - v.double()).norm() / moved[k]).item()
        for k, v in reference.items()
        if moved[k] > 0
    }


def largest_errors(
    found: list[dict[str, Any]], weights: dict[str, Tensor], ratios: list[dict[str, float]]
) -> tuple[float, float]:
    """Relative error of the trust ratios over all steps, and of the last weights."""
    of_ratios = 0.0
    for step, reference in enumerate(ratios):
        mine = merged(found, step)
        assert mine.keys() == reference.keys()
        of_ratios = max(of_ratios, *(abs(mine[k] / reference[k] - 1) for k in reference))
    return of_ratios, max(distances(found[0]["weights"], weights).values())


def test_ratios_and_weights_are_those_of_whole_layers(by_rank: list[dict[str, Any]]) -> None:
    for case in CASES:
        _, name, (accumulation, clip) = case
        reference = unsharded(name, 2, accumulation, clip)
        found = [reports["cases"][case] for reports in by_rank]
        of_ratios, of_weights = largest_errors(found, *reference)
        # Some 10 roundings of float32; 1.1e-6 where sums run in another order (AVX2).
        assert of_ratios <= 2e-6, case
        assert of_weights <= 1e-4, case


def test_a_frozen_layer_is_no_layer(by_rank: list[dict[str, Any]]) -> None:
    reference = unsharded("lamb", 2, 1, 0.0, frozen=True)
    assert FROZEN not in reference[1][0]
    for sharding in by_rank[0]["frozen"]:
        found = [reports["frozen"][sharding] for reports in by_rank]
        of_ratios, of_weights = largest_errors(found, *reference)
        assert of_ratios <= 1e-6, sharding
        assert of_weights <= 1e-4, sharding
        assert torch.equal(found[0]["weights"][FROZEN], model_of().get_parameter(FROZEN))


def test_layers_cut_into_three() -> None:
    reference = unsharded("lamb", 3, 1, 0.0)
    by_rank = run_ranks(on_three_ranks, 3)
    for sharding in by_rank[0]:
        found = [reports[sharding] for reports in by_rank]
        of_ratios, of_weights = largest_errors(found, *reference)
        assert of_ratios <= 1e-6, sharding
        assert of_weights <= 1e-4, sharding


def test_an_optimizer_that_takes_flat_tensors_for_layers_is_far_off(
    reports: dict[str, Any],
) -> None:
    weights = {sharding: report["weights"] for sharding, report in reports["timm"].items()}
    assert max(distances(weights["2"], weights["0"]).values()) > 100


def test_without_a_layout_flat_tensors_are_refused(reports: dict[str, Any]) -> None:
    assert "cannot tell their layers: use dat_ds.initialize" in reports["bare"]


def test_what_moves_shards_one_by_one_is_refused_for_a_clients_optimizer_too(
    reports: dict[str, Any],
) -> None:
    assert reports["refused"].startswith(
        "zero_optimization.offload_optimizer.ratio=0.5 with a layer-wise optimizer: "
    )


def test_the_engine_runs_at_the_scaled_rate_and_says_so(reports: dict[str, Any]) -> None:
    lamb, unusual, sgd = reports["rates"]
    root = 0.5 * 2**0.5
    words = "Learning rate {} = 0.5 x {}, scaled ({}) from a global batch of 4 to 8."
    assert lamb == (pytest.approx(root), [words.format("0.707107", "1.414", "sqrt")])
    assert sgd == (1.0, [words.format("1", "2", "linear")])
    assert unusual[0] == pytest.approx(root)
    assert unusual[1] == [
        words.format("0.707107", "1.414", "sqrt"),
        "dat.schedule.scaling='sqrt' is unusual for SGD, whose learning rate goes by 'linear'.",
    ]


def test_ratios_cost_one_all_reduce_of_two_floats_per_layer(reports: dict[str, Any]) -> None:
    layers = len(list(tiny.vit().parameters()))
    for sharding, without in reports["adamw"].items():
        report = reports["cases"][sharding, "lamb", (1, 0.0)]
        calls, num_bytes = (report[key] - without[key] for key in ("calls", "bytes"))
        if sharding == "0":
            assert (calls, num_bytes) == (0, 0), "whole layers need none"
        else:
            # Two ranks: an all-reduce sends its size. One column is the padding's.
            assert (calls, num_bytes) == (1, 2 * (layers + 1) * 4), sharding


@pytest.mark.parametrize("precision", ["bf16", "autocast", "fp16"])
def test_in_16_bits_too_a_stage_trains_the_same_however_it_is_cut(
    by_rank: list[dict[str, Any]], precision: str
) -> None:
    reports = [report["half"] for report in by_rank]
    shardings = [sharding for kind, sharding in reports[0] if kind == precision]
    for sharding in shardings:
        # Under autocast, ZeRO-0 sums gradients in float32, ZeRO-3 gathers weights in bf16.
        twin = sharding[0] if precision == "autocast" and sharding[0] in "03" else "1"
        found = [report[precision, sharding] for report in reports]
        reference = [report[precision, twin] for report in reports]
        ratios = [merged(reference, step) for step in range(STEPS)]
        of_ratios, of_weights = largest_errors(found, reference[0]["weights"], ratios)
        assert of_ratios <= 1e-6, sharding
        assert of_weights <= 1e-4, sharding
    assert precision != "bf16" or "1, BF16_Optimizer" in shardings


def test_it_goes_with_a_weight_perturbation(reports: dict[str, Any]) -> None:
    whole, cut = (reports["sam", sharding]["weights"] for sharding in ("0", "2"))
    assert max(distances(cut, whole).values()) <= 1e-4
    plain = reports["cases"]["0", "lamb", (1, 0.0)]["weights"]
    assert max(distances(whole, plain).values()) > 1e-3


def test_a_resumed_run_goes_on_bit_for_bit(reports: dict[str, Any]) -> None:
    for case, (unbroken, resumed) in zip(RESUMED, reports["resumed"], strict=True):
        assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken), case
