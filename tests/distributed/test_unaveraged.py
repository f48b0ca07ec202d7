"""The un-averaged weights of a checkpoint are the engine's own, at every ZeRO stage."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from tests.distributed import tiny
from tests.distributed.harness import run_ranks

STEPS = 3
CASES = [
    *((stage, "vit", "float32") for stage in range(4)),
    *((stage, "vit", "bf16") for stage in (0, 1, 3)),
    (3, "cnn", "float32"),
]


def errors_of(folder: Path, stage: int, model: str, precision: str) -> dict[str, float]:
    import dat_ds
    from dat_ds.engine import hooks
    from dat_ds.engine.unaveraged import unaveraged_weights
    from dat_ds.models.pretrained import read_weights

    config = tiny.config(stage, dat={"ema": {"decay": 0.9}}, **tiny.PRECISIONS[precision])
    data = TensorDataset(*tiny.images(8 * STEPS))
    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.MODELS[model](), config=config, training_data=data
    )
    assert loader is not None
    for x, y in loader:
        engine.backward(engine(x, y))
        engine.step()
    engine.save_checkpoint(folder, "now")
    trained = hooks.full_state_dict(engine.deepspeed)
    parameters = {name for name, _ in engine.module.named_parameters()}
    engine.close()
    if not trained:  # the main rank holds the gathered state
        return {}
    raw, saved = unaveraged_weights(folder / "now"), read_weights(folder / "now/model.safetensors")
    assert raw.keys() == trained.keys()
    buffers = raw.keys() - parameters
    return {
        "raw": max(float((raw[k] - trained[k]).abs().max()) for k in parameters),
        "average": max(float((saved[k] - trained[k]).abs().max()) for k in parameters),
        "buffers": sum(float((raw[k] - saved[k]).abs().sum()) for k in buffers),
        "dtypes": float(any(raw[k].dtype != trained[k].dtype for k in raw)),
    }


def all_cases(folder: str) -> list[dict[str, float]]:
    return [
        errors_of(Path(folder) / f"{i}", *case)  # type: ignore[arg-type]
        for i, case in enumerate(CASES)
    ]


@pytest.fixture(scope="module")
def outcomes() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        outcomes: list[Any] = run_ranks(all_cases, 2, folder)[0]
    return outcomes


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"zero{s}-{m}-{p}" for s, m, p in CASES])
def test_unaveraged_weights_are_those_of_the_engine(outcomes: list[Any], case: int) -> None:
    assert outcomes[case]["raw"] == 0
    assert outcomes[case]["dtypes"] == 0
    assert outcomes[case]["average"] > 1e-4, "the average is another set of weights"
    assert outcomes[case]["buffers"] == 0


def test_a_damaged_checkpoint_and_ranks_of_their_own_weights_are_refused(tmp_path: Path) -> None:
    from dat_ds.engine.unaveraged import unaveraged_weights
    from dat_ds.errors import CheckpointError

    state = {"format": 1, "ranks": 2, "config": {"zero_optimization": {"stage": 3}}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be read: .* All files of all ranks"):
        unaveraged_weights(tmp_path)
    state["config"]["dat"] = {"optimizer": {"name": "zero_one_adam"}}  # type: ignore[index]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="each of its 2 ranks steps by itself"):
        unaveraged_weights(tmp_path)
