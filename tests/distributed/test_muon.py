"""Muon orthogonalises whole matrices, however ZeRO cuts them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.optim import PADDING, Layout, build_optimizer
from dat_ds.optim.muon import muon_groups
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks
from tests.distributed.test_parity import weights_of
from tests.distributed.test_trust_ratio import SHARDINGS, distances

STEPS, MICRO_BATCH = 5, 4
MUON = {"name": "muon", "lr": 0.01}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no nesterov, half": {"nesterov": False, "adam_lr_ratio": 0.5},
    # The gradient of a key's bias is zero but for rounding, from which AdamW makes a whole step.
    # Means over two ranks are exact, but not those over three.
    "large eps": {"eps": 1e-5},
}
CASES = [
    *itertools.product(SHARDINGS, ["vit"], ["plain"], [(1, 0.0)]),
    *itertools.product(
        ["0", "1", "2, offload, round robin", "3", "3, sub-groups, offload"],
        ["cnn"],
        ["no nesterov, half"],
        [(2, 0.05)],
    ),
]
ALONE = [
    *itertools.product("0123", ["vit"], ["plain"], [(1, 0.0)]),
    ("2, offload, round robin", "cnn", "plain", (2, 0.0)),
]
THREE = [
    *itertools.product(
        ["1", "2, round robin", "3", "3, sub-groups"], ["vit"], ["large eps"], [(1, 0.0)]
    ),
    *itertools.product("13", ["one matrix", "no matrix"], ["large eps"], [(1, 0.0)]),
]
HALF = [
    (precision, sharding)
    for precision in ("bf16", "autocast", "fp16")
    for sharding in ("0", "1", "2, offload, round robin", "3", "3, sub-groups, offload")
    if (precision, sharding) != ("fp16", "0")
]
RESUMED = [
    *itertools.product(
        ["0", "1", "2, offload, round robin", "3", "3, sub-groups, offload"], ["float32"]
    ),
    *itertools.product(["0", "2, round robin", "3, sub-groups"], ["bf16"]),
]


def vit() -> nn.Module:
    """Shards of it cut matrices, as those of all blocks would not: one is frozen."""
    model = tiny.vit()
    model.get_parameter("blocks.0.attn.qkv.weight").requires_grad_(False)
    return model


def cnn() -> nn.Module:
    """Convolutions in one, two and as many groups as channels, and a frozen one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.GroupNorm(2, 12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.Conv2d(12, 12, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
        nn.ReLU(),
        nn.Linear(10, tiny.CLASSES),
    )
    model[8].requires_grad_(False)
    return model


def mlp(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(3 * tiny.SIZE**2, 8)]
    for inputs, outputs in itertools.pairwise((8, *widths, tiny.CLASSES)):
        layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


MODELS = {
    "vit": vit,
    "cnn": cnn,
    "one matrix": lambda: mlp(6),
    "no matrix": lambda: mlp(),
}


def start(
    sharding: str, model: str, options: str, accumulation: int = 1, clip: float = 0.0, **keys: Any
) -> Any:
    """An engine that trains naturally: attacks do not concern optimizers."""
    import dat_ds

    stage, zero = SHARDINGS[sharding]
    dat = {"optimizer": {**MUON, **OPTIONS[options]}, "attack": {"name": "none"}}
    config = tiny.config(
        stage,
        zero_optimization=zero,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=clip,
        dat={**dat, **keys.pop("dat", {})},
        **keys,
    )
    del config["optimizer"]
    return dat_ds.initialize(model=MODELS[model](), config=config)[0]


def batches(slots: int) -> list[tuple[Tensor, Tensor]]:
    x, y = tiny.images(STEPS * slots * MICRO_BATCH)
    return list(zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True))


def take_steps(engine: Any, first: int = 0, last: int = STEPS) -> None:
    slots, ranks = engine.accumulation * engine.ranks.count, engine.ranks
    data = batches(slots)
    for step in range(first, last):
        for micro in range(engine.accumulation):
            engine.backward(engine(*data[step * slots + micro * ranks.count + ranks.rank]))
            engine.step()


def matrices(model: str) -> dict[str, int]:
    """Elements of the matrices that Muon takes, by name."""
    network = MODELS[model]()
    names = {id(p): name for name, p in network.named_parameters()}
    groups = [group for group in muon_groups(network, 0.0) if group["muon"]]
    return {names[id(p)]: p.numel() for group in groups for p in group["params"]}


def count_cut(layout: Layout, model: str) -> int:
    """Matrices of which this rank holds a part."""
    numel = matrices(model)
    return sum(
        layer != PADDING and size < numel.get(layout.names[layer], 0)
        for segments in layout.segments.values()
        for size, layer in zip(segments.sizes, segments.layers, strict=True)
    )


def train(case: tuple[Any, ...], **keys: Any) -> dict[str, Any]:
    sharding, model, options, (accumulation, clip) = case
    engine = start(sharding, model, options, accumulation, clip, **keys)
    take_steps(engine)
    report = {"weights": weights_of(engine), "rates": engine.deepspeed.get_lr()}
    report["cut"] = count_cut(engine.deepspeed.basic_optimizer.layout, model)
    report["collectives"] = engine.collectives.get("momentum", 0)
    report["bytes_sent"] = engine.metrics["bytes_sent"].get("momentum", 0)
    engine.close()
    return report


def resume(sharding: str, folder: str, **keys: Any) -> tuple[Any, Any]:
    """Weights after five steps without a break, and with one after two."""
    engine = start(sharding, "vit", "plain", **keys)
    take_steps(engine, 0, 2)
    engine.deepspeed.save_checkpoint(folder, tag="here")
    take_steps(engine, 2)
    unbroken = weights_of(engine)
    engine.close()
    engine = start(sharding, "vit", "plain", **keys)
    engine.deepspeed.load_checkpoint(folder, tag="here")
    take_steps(engine, 2)
    resumed = weights_of(engine)
    engine.close()
    return unbroken, resumed


def refused() -> list[str]:
    import dat_ds
    from dat_ds.errors import ConfigError
    from dat_ds.optim.muon import Muon

    messages = []
    zero = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    for sections in (
        {"zero_optimization": zero, "dat": {"optimizer": MUON}},
        {"zero_optimization": zero},
        {"dat": {"optimizer": {**MUON, "adam_parameters": ["blocks.7.*"]}}},
    ):
        model = tiny.vit()
        config = tiny.config(3, **sections)
        del config["optimizer"]
        own = None if "dat" in sections else Muon(muon_groups(model, 0.1))
        with pytest.raises(ConfigError) as caught:
            dat_ds.initialize(model=model, config=config, optimizer=own)
        messages.append(str(caught.value))
    return messages


def on_two_ranks(folder: str) -> dict[str, Any]:
    from dat_ds.engine.launch import setup_ranks

    setup_ranks()
    allow_fp16()
    schedule = {"name": "cosine", "max_steps": 10, "scaling": "linear", "base_batch": 4}
    keys = {"dat": {"schedule": schedule}}
    reports: dict[str, Any] = {
        "refused": refused(),
        "cases": {case: train(case) for case in CASES},
        "scheduled": train(("2", "vit", "no nesterov, half", (1, 0.0)), **keys),
        "half": {},
        "resumed": [],
    }
    for precision, sharding in HALF:
        keys = tiny.PRECISIONS[precision]
        if precision == "fp16":
            keys = {"fp16": {"enabled": True, "initial_scale_power": 8}}
        case = (sharding, "vit", "plain", (1, 0.0))
        reports["half"][precision, sharding] = train(case, **keys)["weights"]
    keys = {**tiny.PRECISIONS["bf16"], "data_types": {"grad_accum_dtype": "fp32"}}
    case = ("1", "vit", "plain", (1, 0.0))
    reports["half"]["bf16", "1, BF16_Optimizer"] = train(case, **keys)["weights"]
    for i, (sharding, precision) in enumerate(RESUMED):
        here = str(Path(folder) / str(i))
        reports["resumed"].append(resume(sharding, here, **tiny.PRECISIONS[precision]))
    return reports


def on_one_rank() -> dict[Any, Any]:
    return {case: train(case) for case in ALONE}


def on_three_ranks() -> dict[Any, Any]:
    return {case: train(case) for case in THREE}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def reports(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    return by_rank[0]


def unsharded(case: tuple[Any, ...], ranks: int) -> dict[str, Tensor]:
    """Weights of one process in plain PyTorch, on all ranks' batches."""
    _, name, options, (accumulation, clip) = case
    model = MODELS[name]()
    optimizer = build_optimizer(model, {**MUON, **OPTIONS[options]})
    slots = accumulation * ranks
    data = batches(slots)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in data[step * slots : (step + 1) * slots]:
            (F.cross_entropy(model(x), y) / slots).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model.state_dict()


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, absolute or relative to values above 1."""
    return max(
        ((found[name] - value).abs() / value.abs().clamp(min=1)).max().item()
        for name, value in expected.items()
    )


def test_weights_are_those_of_one_process(by_rank: list[dict[str, Any]]) -> None:
    for case in CASES:
        found = by_rank[0]["cases"][case]["weights"]
        assert error(found, unsharded(case, 2)) <= 1e-5, case
        assert (case[0] == "0") == (by_rank[0]["cases"][case]["cut"] == 0), case


def test_with_one_rank_too() -> None:
    (found,) = run_ranks(on_one_rank, 1)
    for case in ALONE:
        assert error(found[case]["weights"], unsharded(case, 1)) <= 1e-5, case
        assert found[case]["collectives"] == 0


def test_matrices_cut_into_three_and_ranks_that_own_none() -> None:
    by_rank = run_ranks(on_three_ranks, 3)
    for case, report in by_rank[0].items():
        assert error(report["weights"], unsharded(case, 3)) <= 1e-5, case


def test_momentum_travels_in_two_collectives_there_and_back(by_rank: list[dict[str, Any]]) -> None:
    for case in CASES:
        numel = sum(matrices(case[1]).values())
        found = [report["cases"][case] for report in by_rank]
        calls = [report["collectives"] for report in found]
        sent = sum(report["bytes_sent"] for report in found)
        if case[0] == "0":
            assert (calls, sent) == ([0, 0], 0), "every rank has whole matrices"
        else:
            # Two ranks: an all-to-all sends half of its input. All elements, four bytes, twice.
            assert calls == [2, 2], case
            assert abs(sent - 4 * numel) <= 4, case


def test_both_learning_rates_follow_the_schedule_and_the_batch(reports: dict[str, Any]) -> None:
    # Five of ten steps of a cosine: the next is at its middle. Batch 8 for a base of 4.
    assert reports["scheduled"]["rates"] == pytest.approx([0.01, 0.005, 0.005])


@pytest.mark.parametrize("precision", ["bf16", "autocast", "fp16"])
def test_in_16_bits_too_a_stage_trains_the_same_however_it_is_cut(
    reports: dict[str, Any], precision: str
) -> None:
    shardings = [sharding for kind, sharding in reports["half"] if kind == precision]
    for sharding in shardings:
        # Under autocast, ZeRO-0 sums gradients in float32, ZeRO-3 gathers weights in bf16.
        twin = sharding[0] if precision == "autocast" and sharding[0] in "03" else "1"
        found, reference = (reports["half"][precision, s] for s in (sharding, twin))
        assert max(distances(found, reference).values()) <= 1e-4, sharding
    assert precision != "bf16" or "1, BF16_Optimizer" in shardings


def test_what_moves_shards_one_by_one_is_refused(reports: dict[str, Any]) -> None:
    by_name, own, misspelt = reports["refused"]
    words = "zero_optimization.offload_optimizer.ratio=0.5 with a layer-wise optimizer: it needs"
    assert words in by_name
    assert words in own
    assert misspelt == "dat.optimizer: adam_parameters: the model has no parameter 'blocks.7.*'."


def test_a_resumed_run_goes_on_bit_for_bit(reports: dict[str, Any]) -> None:
    for case, (unbroken, resumed) in zip(RESUMED, reports["resumed"], strict=True):
        assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken), case
