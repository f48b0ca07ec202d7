"""A loop of the user's own: exact resume, evaluation without a trace, readable refusals."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from tests.distributed import tiny
from tests.distributed.harness import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "own_loop.md"
STAGES, STEPS, SAVED = (0, 1, 2, 3), 10, 6
IMAGES = 28  # an epoch ends within both parts of the run, in an uneven batch
SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "free": {"dat": {"attack": {"name": "free", "replays": 2}}},
    "fgsm_pgi": {"dat": {"attack": {"name": "fgsm_pgi"}}},
    "int8": {"dat": {"compression": {"name": "int8", "error_feedback": True}}},
    "topk": {"dat": {"compression": {"name": "topk", "ratio": 0.1}}},
    "lamb": {"optimizer": None, "dat": {"optimizer": {"name": "lamb"}}},
    "awp": {"dat": {"weight_perturbation": {"name": "awp"}}},
    "ema": {"dat": {"ema": {"decay": 0.5}}},
    "autocast": tiny.PRECISIONS["autocast"],
    "stream": {"dat": {"schedule": {"name": "constant", "max_steps": STEPS}}},
    "accumulation": {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2},
}
UNSHARDED: dict[str, dict[str, Any]] = {
    "one_bit_adam": {
        "optimizer": None,
        "dat": {"optimizer": {"name": "one_bit_adam", "freeze_step": 2}},
    },
    "zero_one_adam": {
        "optimizer": None,
        "dat": {"optimizer": {"name": "zero_one_adam", "var_freeze_step": 2}},
    },
}
# On two ranks a section runs under two stages, in turns, and these under all; alone under one.
EVERYWHERE = ("plain", "free", "int8")
TURNS = [
    (name, stage, (stage - number) % len(STAGES))
    for number, name in enumerate(SECTIONS)
    for stage in STAGES
]
CASES = {
    1: [(name, stage) for name, stage, turn in TURNS if turn == 0],
    2: [(name, stage) for name, stage, turn in TURNS if turn in (0, 2) or name in EVERYWHERE],
}
for cases in CASES.values():
    cases += [(name, 0) for name in UNSHARDED]


class Noisy(Dataset[Any]):
    """Images with noise of the global generators of torch, Python and numpy."""

    def __init__(self) -> None:
        self.x, self.y = tiny.images(IMAGES)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = float(torch.rand(())) + random.random() + np.random.random()
        return (self.x[index] + noise / 30).clamp(0, 1), int(self.y[index])


class Stream(IterableDataset[Any]):
    """The images of an epoch, one after another, as dicts."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for x, y in zip(*tiny.images(IMAGES, seed=self.epoch), strict=True):
            yield {"image": x, "label": y}


def start(
    name: str, stage: int, seed: int = 0, data: Any = None, model: nn.Module | None = None
) -> Any:
    import dat_ds

    config = tiny.config(stage, **{**SECTIONS, **UNSHARDED}[name])
    if config["optimizer"] is None:
        config.pop("optimizer")
    if model is None:
        model = nn.Sequential(tiny.cnn(seed), nn.Dropout(0.1))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    if data is None:
        data = Stream() if name == "stream" else Noisy()
    return dat_ds.initialize(model=model, config=config, training_data=data)[0]


def losses_until(engine: Any, stop: int) -> list[float]:
    losses = []
    while True:
        for x, y in engine.loader:
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
            if engine.global_steps == stop:
                return losses


def state_of(engine: Any) -> list[Tensor]:
    """Weights, statistics and averages of this rank."""
    from dat_ds.engine import hooks

    averages = [] if engine.ema is None else engine.ema.state_dict()["averages"]
    held = [*hooks.held_weights(engine.deepspeed), *engine.module.buffers(), *averages]
    return [tensor.detach().clone() for tensor in held]


def shared_folder(engine: Any) -> Path:
    folder = tempfile.mkdtemp() if engine.ranks.is_main else ""
    return Path(str(engine.ranks.gather(folder)[0]))


def resume(name: str, stage: int) -> dict[str, Any]:
    engine = start(name, stage)
    losses = losses_until(engine, SAVED)
    folder = shared_folder(engine)
    client_state = {"rank": engine.ranks.rank, "best": (1, torch.arange(3))}
    path = engine.save_checkpoint(folder, client_state=client_state)
    losses += losses_until(engine, STEPS)
    end = state_of(engine)
    engine.close()
    again = start(name, stage, seed=9)
    loaded, client = again.load_checkpoint(folder)
    losses_again = losses_until(again, STEPS)
    report = {
        "losses": (losses[-len(losses_again) :], losses_again),
        "same_state": all(map(torch.equal, end, state_of(again))),
        "same_place": loaded == path == folder / "step-00000006",
        "client": client["rank"] == again.ranks.rank and client["best"][1].tolist() == [0, 1, 2],
        "frozen": getattr(again.averaging_optimizer, "is_frozen", True),
    }
    again.close()
    return report


def evaluate_in_between(stage: int) -> dict[str, Any]:
    """The same run with an evaluation after each step, of data that draw random numbers."""
    results: dict[str, Any] = {}
    for evaluates in (False, True):
        engine = start("ema", stage)
        losses = []
        for step in range(3):
            losses += losses_until(engine, step + 1)
            if evaluates:
                results["record"] = engine.evaluate(Noisy(), "pgd-2", num_examples=13).to_dict()
        results[evaluates] = (losses, state_of(engine))
        engine.close()
    return {
        "same_losses": results[False][0] == results[True][0],
        "same_state": all(map(torch.equal, results[False][1], results[True][1])),
        "record": results["record"],
    }


def evaluate_average() -> dict[str, Any]:
    """Evaluation of the engine and of the model that a checkpoint exports, on fixed data."""
    from safetensors.torch import load_file

    from dat_ds.attacks import ThreatModel
    from dat_ds.evaluation import evaluate

    data = TensorDataset(*tiny.images(IMAGES))
    engine = start("ema", 2, data=data)
    losses_until(engine, 5)
    folder = engine.save_checkpoint(shared_folder(engine))
    record = engine.evaluate(data, ["pgd-3"], batch_size=4, seed=7)
    model = nn.Sequential(tiny.cnn(), nn.Dropout(0.1))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    threat = ThreatModel("linf", 0.1)
    alone = evaluate(model, data, threat, ["pgd-3"], batch_size=4, seed=7)
    engine.close()
    return {"engine": record.to_dict(), "exported": alone.to_dict()}


def save_before_training() -> bool:
    """Whether a batch that was handed out but not trained on comes again after a resume."""
    data = TensorDataset(*tiny.images(IMAGES))
    engine = start("plain", 0, data=data)
    folder = shared_folder(engine)
    batches = iter(engine.loader)
    engine.train_step([next(batches)])
    x, _ = next(batches)
    engine.save_checkpoint(folder)
    engine.close()
    again = start("plain", 0, seed=9, data=data)
    again.load_checkpoint(folder)
    x_again, _ = next(iter(again.loader))
    again.close()
    return torch.equal(x, x_again)


def message_of(function: Callable[[], Any]) -> str:
    """Class and text of a user's error; other errors pass."""
    from dat_ds.errors import UserError

    try:
        function()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals() -> dict[str, str]:
    engine = start("accumulation", 0)
    folder = shared_folder(engine)
    found = {}
    found["nothing"] = message_of(lambda: engine.load_checkpoint(folder))
    losses_until(engine, 1)
    engine.save_checkpoint(folder, "first")
    x, y = next(iter(engine.loader))
    engine.backward(engine(x, y))
    found["before step"] = message_of(lambda: engine.save_checkpoint(folder))
    engine.step()
    found["accumulating"] = message_of(lambda: engine.save_checkpoint(folder))
    found["load accumulating"] = message_of(lambda: engine.load_checkpoint(folder))
    engine.backward(engine(x, y))
    engine.step()
    found["wrong tag"] = message_of(lambda: engine.load_checkpoint(folder, "second"))
    found["bad tag"] = message_of(lambda: engine.save_checkpoint(folder, "a/b"))
    found["inside"] = message_of(lambda: engine.load_checkpoint(folder / "first"))
    found["object"] = message_of(lambda: engine.save_checkpoint(folder, "x", {"it": object()}))
    found["places"] = message_of(
        lambda: engine.save_checkpoint(folder / f"of-rank-{engine.ranks.rank}")
    )
    engine.ranks.barrier()
    other = start("awp", 0)
    found["other config"] = message_of(lambda: other.load_checkpoint(folder))
    other.close()
    other = start("accumulation", 0, model=tiny.vit())
    found["other model"] = message_of(lambda: other.load_checkpoint(folder))
    before = state_of(engine)
    if engine.ranks.is_main:
        part = next((folder / "first").glob("*model_states.pt"))
        part.write_bytes(part.read_bytes()[:100])
    engine.ranks.barrier()
    found["cut off"] = message_of(lambda: engine.load_checkpoint(folder))
    found["untouched"] = str(all(map(torch.equal, before, state_of(engine))))
    if engine.ranks.is_main:
        (folder / "first" / "state.json").unlink()
    engine.ranks.barrier()
    found["no state"] = message_of(lambda: engine.load_checkpoint(folder, "first"))
    engine.save_checkpoint(folder, "third")
    found["recovered"] = message_of(lambda: engine.load_checkpoint(folder))
    other.close()
    engine.close()
    engine = start("awp", 0)
    x, y = next(iter(engine.loader))
    loss = engine(x, y)
    found["save perturbed"] = message_of(lambda: engine.save_checkpoint(folder))
    found["attack"] = message_of(lambda: engine.evaluate(Noisy(), "gpd-3"))
    found["perturbed"] = message_of(lambda: engine.evaluate(Noisy(), []))
    engine.backward(loss)
    engine.step()
    with torch.no_grad():
        next(engine.module.parameters()).fill_(torch.nan)
    with contextlib.suppress(RuntimeError):
        engine.save_checkpoint(folder, "damaged")
    found["damaged"] = str((folder / "damaged").exists())
    engine.close()
    return found


def run_page() -> list[str]:
    """The Python blocks of the page, one after another, in a folder of their own."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    os.chdir(tempfile.mkdtemp())
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return blocks


def on_ranks(count: int) -> dict[str, Any]:
    return {
        "resumed": {case: resume(*case) for case in CASES[count]},
        "evaluated": {stage: evaluate_in_between(stage) for stage in STAGES},
        "average": evaluate_average(),
        "save_before_training": save_before_training(),
        "refusals": refusals(),
    }


def alone() -> dict[str, Any]:
    return {**on_ranks(1), "page": run_page()}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[dict[str, Any]]]:
    return {1: run_ranks(alone, 1), 2: run_ranks(on_ranks, 2, 2)}


def of_all_ranks(outcomes: dict[int, list[dict[str, Any]]], key: str) -> Iterator[Any]:
    return (outcome[key] for by_rank in outcomes.values() for outcome in by_rank)


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks, cases in CASES.items() for case in cases],
    ids=lambda value: value if isinstance(value, int) else f"{value[0]}-zero{value[1]}",
)
def test_a_loaded_checkpoint_goes_on_bit_for_bit(outcomes, ranks, case):
    for outcome in outcomes[ranks]:
        report = dict(outcome["resumed"][case])
        losses, losses_again = report.pop("losses")
        assert len(losses_again) == (STEPS - SAVED) * (2 if case[0] == "accumulation" else 1)
        assert losses == losses_again
        assert all(report.values()), report


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_as_if_it_had_not_been_evaluated(outcomes, stage):
    for evaluated in of_all_ranks(outcomes, "evaluated"):
        assert evaluated[stage]["same_losses"]
        assert evaluated[stage]["same_state"]
        assert evaluated[stage]["record"]["num_examples"] == 13
        assert list(evaluated[stage]["record"]["outcomes"]) == ["natural", "pgd-2"]
    first, second = (outcome["evaluated"][stage]["record"] for outcome in outcomes[2])
    assert first == second


def test_the_engine_evaluates_the_model_that_it_exports(outcomes):
    for average in of_all_ranks(outcomes, "average"):
        assert average["engine"] == average["exported"]


def test_a_batch_that_was_not_trained_on_is_not_lost(outcomes):
    assert all(of_all_ranks(outcomes, "save_before_training"))


REFUSALS = {
    "nothing": r"CheckpointError: There is no checkpoint in \S+ \(nor any other\)\.",
    "before step": r"CheckpointError: In the middle of optimizer step 2 \(0 of 2 micro-steps",
    "accumulating": r"CheckpointError: In the middle of optimizer step 2 \(1 of 2 micro-steps",
    "load accumulating": r"CheckpointError: In the middle of optimizer step 2 \(1 of 2",
    "wrong tag": r"CheckpointError: There is no checkpoint 'second' in \S+ \(it has first\)\.",
    "bad tag": r"CheckpointError: tag='a/b' cannot name a checkpoint: write letters",
    "inside": r"CheckpointError: \S+first is one checkpoint: write .* tag='first'\.",
    "object": r"CheckpointError: client_state\['it'\] is of class object: give numbers",
    "other config": r"CheckpointError: Checkpoint \S+ belongs to another run:\n.*"
    r"dat\.weight_perturbation\.name: checkpoint 'none', this run 'awp'",
    "cut off": r"CheckpointError: Checkpoint \S+ is damaged\. \S+ has 100 of \d+ bytes\.",
    "untouched": "True",
    "no state": r"CheckpointError: \S+ is not a checkpoint of dat_ds, or damaged: ",
    "recovered": "no error",
    "other model": r"CheckpointError: Checkpoint \S+ is of another model:\n"
    r".*  0\.0\.weight: checkpoint \[8, 3, 3, 3\], this model has none\n.*and \d+ more$",
    "save perturbed": r"CheckpointError: In the middle of optimizer step 1 \(0 of 1 micro-steps",
    "attack": r"ConfigError: attacks\[0\]: .*gpd-3",
    "perturbed": r"DataError: The weights are perturbed .* call engine.backward\(loss\)",
    "damaged": "False",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_saved_or_loaded_is_refused(outcomes, case):
    for found in of_all_ranks(outcomes, "refusals"):
        assert re.match(REFUSALS[case], found[case], re.DOTALL), found[case]


def test_ranks_that_name_different_folders_are_told(outcomes):
    assert outcomes[1][0]["refusals"]["places"] == "no error"
    for outcome in outcomes[2]:
        assert "Ranks name different checkpoints, rank 0" in outcome["refusals"]["places"]


def test_the_blocks_of_the_page_run(outcomes):
    blocks = outcomes[1][0]["page"]
    assert len(blocks) >= 6
    assert "engine.save_checkpoint" in "".join(blocks)


def test_deepspeeds_own_checkpoint_says_once_what_it_leaves_out(tmp_path, caplog, monkeypatch):
    import dat_ds

    monkeypatch.setattr(logging.getLogger("dat_ds"), "propagate", True)
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=tiny.config(0))
    for tag in ("one", "two"):
        engine.deepspeed.save_checkpoint(str(tmp_path), tag=tag)
    told = [r.getMessage() for r in caplog.records if "call engine.save_checkpoint" in r.message]
    assert len(told) == 1
    caplog.clear()
    assert engine.save_checkpoint(tmp_path / "whole").exists()
    assert "leaves out" not in caplog.text
    engine.close()
