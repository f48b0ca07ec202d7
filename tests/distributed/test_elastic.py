"""A run goes on with other ranks, at another ZeRO stage, with other accumulation."""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks

GLOBAL_BATCH, IMAGES = 12, 30  # an epoch ends with an uneven batch
PART = 5  # optimizer steps between two changes
SECTIONS: dict[str, dict[str, Any]] = {
    "adam": {"dat": {"ema": {"decay": 0.5}}},
    "muon": {"optimizer": None, "dat": {"optimizer": {"name": "muon"}}},
    "fp16": tiny.PRECISIONS["fp16"],
    "lamb": {"optimizer": None, "dat": {"optimizer": {"name": "lamb"}}},
    "bf16": {**tiny.PRECISIONS["bf16"], "dat": {"ema": {"decay": 0.5}}},
}
# What ranks have of their own starts anew on other ranks; on ZeRO-0 in the first two parts.
OWN: dict[str, tuple[dict[str, Any], str]] = {
    "one_bit_adam": (
        {"optimizer": None, "dat": {"optimizer": {"name": "one_bit_adam", "freeze_step": 2}}},
        "Compression errors of 2 ranks do not fit 1: they start from zero.",
    ),
    "int8": (
        {"dat": {"compression": {"name": "int8", "error_feedback": True}}},
        "Start from zero again: errors of gradient compression.",
    ),
    "fgsm_pgi": (
        {"dat": {"attack": {"name": "fgsm_pgi"}}},
        "Start from zero again: perturbations that the attack carries along.",
    ),
}
FLOAT32 = ("adam", "muon", "lamb")
SHORT, LONG = ("adam", "muon", "fp16"), ("lamb", "bf16")
# (ranks, ZeRO stage): 2 -> 1 -> 3 -> 2 ranks, stages 0 -> 2 -> 3 and back.
ROUTE = ((2, 0), (1, 2), (3, 3), (2, 1))
MICRO = {2: 3, 1: 4, 3: 4}  # by ranks; accumulation makes up the rest


def start(name: str, ranks: int, stage: int, data: Any = None) -> Any:
    from torch.utils.data import TensorDataset

    import dat_ds

    section = OWN[name][0] if name in OWN else SECTIONS[name]
    config = tiny.config(
        stage,
        **{
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            **section,
        },
        train_batch_size=GLOBAL_BATCH,
        train_micro_batch_size_per_gpu=MICRO[ranks],
    )
    config.pop("gradient_accumulation_steps")
    if config["optimizer"] is None:
        config.pop("optimizer")
    data = TensorDataset(*tiny.images(IMAGES)) if data is None else data
    return dat_ds.initialize(model=tiny.vit(), config=config, training_data=data)[0]


def train(engine: Any, steps: int) -> list[tuple[float, list[int]]]:
    """The global loss and the samples of each step, in the order of the global batch."""
    rows: list[tuple[float, list[int]]] = []
    while len(rows) < steps:
        for batches in engine.loader.steps():
            engine.train_step(batches)
            plans = [plan for _, _, plan in batches]
            own = [(plan.first_position, plan.indices) for plan in plans]
            pieces = sorted(piece for shard in engine.ranks.gather(own) for piece in shard)
            samples = [index for _, indices in pieces for index in indices]
            rows.append((engine.reduced_metrics()["loss"], samples))
            if len(rows) == steps:
                break
    return rows


def whole_state(engine: Any) -> dict[str, Any]:
    """Weights, optimizer state and average of all ranks, put together by parameter."""
    import torch

    from dat_ds.engine import hooks

    optimizer = hooks.basic_optimizer(engine.deepspeed)
    own = []
    for master in hooks.master_weights(engine.deepspeed):
        state = optimizer.state[master.tensor]
        flats = {"master": master.tensor, **state}
        for key, flat in flats.items():
            if isinstance(flat, torch.Tensor) and flat.dim():
                for name, first, numel, at in master.pieces:
                    own.append((key, name, first, flat.detach().flatten()[at : at + numel].clone()))
    held = {"held": hooks.held_weights(engine.deepspeed)}
    if engine.ema is not None:
        held["average"] = engine.ema.averages
    for key, tensors in held.items():
        for tensor, piece in zip(tensors, hooks.held_pieces(engine.deepspeed), strict=True):
            name, first, numel, _ = piece
            own.append((key, name, first, tensor.detach().flatten()[:numel].clone()))
    found: dict[str, dict[int, Any]] = {}
    for shard in engine.ranks.gather(own):
        for key, name, first, values in shard:
            if len(values):
                found.setdefault(f"{key} of {name}", {})[first] = values
    return {key: torch.cat([v for _, v in sorted(at.items())]) for key, at in found.items()}


def go_on(number: int, folder: str, names: Sequence[str]) -> dict[str, Any]:
    """One part of the route for each section; the first also trains all of it uninterrupted."""
    from dat_ds.engine import hooks

    ranks, stage = ROUTE[number]
    allow_fp16()
    reports: dict[str, Any] = {}
    for name in names:
        if number == 0 and name in FLOAT32:
            whole = start(name, ranks, stage)
            reports[f"{name}, uninterrupted"] = train(whole, PART * len(ROUTE))
            whole.close()
        engine = start(name, ranks, stage)
        place = Path(folder) / name
        if number:
            engine.load_checkpoint(place)
        assert engine.global_steps == number * PART
        before = whole_state(engine), hooks.loss_scale(engine.deepspeed)
        reports[name] = train(engine, PART if name in FLOAT32 else 2)
        if name not in FLOAT32:
            engine.deepspeed.global_steps = (number + 1) * PART
        engine.save_checkpoint(place)
        after = whole_state(engine), hooks.loss_scale(engine.deepspeed)
        reports[f"{name}, states"] = before, after
        engine.close()
    return reports


def start_anew(number: int, folder: str) -> dict[str, Any]:
    """On two ranks, then on one: global losses of each, and what was warned of."""
    reports = {}
    for name in OWN:
        engine = start(name, ROUTE[number][0], 0)
        place = Path(folder) / name
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, found=records: found.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("dat_ds").addHandler(handler)
        if number:
            engine.load_checkpoint(place)
        logging.getLogger("dat_ds").removeHandler(handler)
        rows = train(engine, PART)
        engine.save_checkpoint(place)
        engine.close()
        reports[f"{name}, own"] = [loss for loss, _ in rows], records
    return reports


def part_of_route(number: int, folder: str, names: Sequence[str]) -> dict[str, Any]:
    own = start_anew(number, folder) if number < 2 and names == SHORT else {}
    return {**own, **go_on(number, folder, names)}


def follow_route(names: Sequence[str]) -> list[dict[str, Any]]:
    """What rank 0 reports of each part of the route."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            run_ranks(part_of_route, ranks, number, folder, names)[0]
            for number, (ranks, _) in enumerate(ROUTE)
        ]


@pytest.fixture(scope="module", params=[SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def names_and_parts(request: pytest.FixtureRequest) -> tuple[Sequence[str], list[dict[str, Any]]]:
    return request.param, follow_route(request.param)


def test_losses_and_samples_go_on_wherever_it_runs(names_and_parts: Any) -> None:
    names, parts = names_and_parts
    for name in set(names) & set(FLOAT32):
        expected = parts[0][f"{name}, uninterrupted"]
        found = [row for part in parts for row in part[name]]
        assert [samples for _, samples in found] == [samples for _, samples in expected]
        losses = [loss for loss, _ in found]
        assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert len({round(loss, 3) for loss in losses}) > PART  # they change on the way


def test_what_ranks_have_of_their_own_starts_anew_and_says_so(names_and_parts: Any) -> None:
    names, parts = names_and_parts
    for name, (_, words) in OWN.items() if names == SHORT else ():
        (first, _), (second, warnings) = parts[0][f"{name}, own"], parts[1][f"{name}, own"]
        assert any(warning.endswith(words) for warning in warnings), warnings
        assert max(second) < max(first) + 0.1  # goes on, not from random weights of another scale


def test_every_element_is_that_of_the_checkpoint(names_and_parts: Any) -> None:
    names, parts = names_and_parts
    for name in names:
        for earlier, later in itertools.pairwise(parts):
            saved, saved_scale = earlier[f"{name}, states"][1]
            loaded, loaded_scale = later[f"{name}, states"][0]
            assert saved.keys() == loaded.keys()
            assert any(key.startswith(("exp_avg ", "momentum_buffer ")) for key in saved)
            assert all(saved[key].equal(loaded[key]) for key in saved)
            assert saved_scale == loaded_scale


def draw(curves: dict[str, tuple[list[float], list[float]]], file: str) -> None:
    """Both losses of each optimizer, step by step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    for axis, (name, (straight, changed)) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        steps = range(1, len(straight) + 1)
        axis.plot(steps, straight, color="0.7", linewidth=4, label="2 ranks, uninterrupted")
        axis.plot(steps, changed, color="C0", label="on 2, 1, 3, 2 ranks")
        for change in range(PART, len(straight), PART):
            axis.axvline(change + 0.5, color="0.85", linestyle=":")
        axis.set(title=name, xlabel="step")
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":  # the table, and with a file name the curves
    each, curves = follow_route(FLOAT32), {}
    for section in FLOAT32:
        straight = [loss for loss, _ in each[0][f"{section}, uninterrupted"]]
        changed = [loss for part in each for loss, _ in part[section]]
        curves[section] = straight, changed
        worst = max(abs(a / b - 1) for a, b in zip(changed, straight, strict=True))
        print(f"{section}: largest relative difference of the loss {worst:.1e}")
        for step, pair in enumerate(zip(straight, changed, strict=True), 1):
            print(f"  step {step:2}: {pair[0]:.9f} {pair[1]:.9f}")
    if len(sys.argv) > 1:
        draw(curves, sys.argv[1])
