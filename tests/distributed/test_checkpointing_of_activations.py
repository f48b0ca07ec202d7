"""Recomputing activations, in every way a model may do it, does not change adversarial training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.harness import run_ranks

STEPS, MICRO_BATCH, STAGES = 3, 4, (0, 1, 2, 3)
KINDS = ("non_reentrant", "reentrant", "deepspeed")


class Blocks(nn.Module):
    """Two residual blocks, recomputed by DeepSpeed where ``checkpointed``."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.num_block_forwards = checkpointed, 0
        self.stem = nn.Linear(3 * tiny.SIZE**2, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2)
        )
        self.head = nn.Linear(16, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        from deepspeed import checkpointing

        x = self.stem(x.flatten(1))
        for block in self.blocks:

            def run(x: Tensor, block: nn.Module = block) -> Tensor:
                self.num_block_forwards += 1
                return x + block(x)

            x = checkpointing.checkpoint(run, x) if self.checkpointed else run(x)
        return self.head(x)


def build(kind: str) -> nn.Module:
    """The model of a kind; ``none`` and ``plain`` are the references."""
    from dat_ds.models import build_model

    if kind in ("deepspeed", "plain"):
        return Blocks(kind == "deepspeed")
    model = build_model(
        "vit_tiny_patch16_224",
        num_classes=tiny.CLASSES,
        img_size=tiny.SIZE,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        activation_checkpointing=kind,  # type: ignore[arg-type]
        seed=0,
    )
    model.num_block_forwards = 0  # type: ignore[assignment]

    def count(module: nn.Module, args: Any) -> None:
        model.num_block_forwards += 1  # type: ignore[operator,assignment]

    model.body.blocks[0].attn.register_forward_pre_hook(count)  # type: ignore[index,union-attr]
    return model


def train(kind: str, stage: int, resident_gib: float = 4.0) -> dict[str, Any]:
    import dat_ds
    from dat_ds.engine import hooks

    model = build(kind)
    engine, *_ = dat_ds.initialize(
        model=model,
        config=tiny.config(stage, dat={"engine": {"resident_parameters_gib": resident_gib}}),
    )
    images = tiny.images(STEPS * MICRO_BATCH, seed=engine.ranks.rank)
    for x, y in zip(*(part.split(MICRO_BATCH) for part in images), strict=True):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
    state = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return {"state": state, "forwards": model.num_block_forwards}


def train_cases() -> dict[Any, Any]:
    cases = [
        *((kind, 0) for kind in ("none", "plain")),
        *itertools.product(KINDS, STAGES),
        *((kind, 3, 0.0) for kind in KINDS),
    ]
    return {case: train(*case) for case in cases}


@pytest.fixture(scope="module")
def trained() -> dict[Any, Any]:
    return run_ranks(train_cases, 2)[0]


@pytest.mark.parametrize("case", [*itertools.product(KINDS, STAGES), *((k, 3, 0.0) for k in KINDS)])
def test_three_steps_equal_those_without_recomputation(
    trained: dict[Any, Any], case: tuple[Any, ...]
) -> None:
    reference = trained["plain" if case[0] == "deepspeed" else "none", 0]["state"]
    state = trained[case]["state"]
    assert state.keys() == reference.keys()
    assert max((state[k] - reference[k]).abs().max().item() for k in reference) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_really_recomputed(trained: dict[Any, Any], kind: str) -> None:
    reference = trained["plain" if kind == "deepspeed" else "none", 0]["forwards"]
    for stage in STAGES:
        assert trained[kind, stage]["forwards"] == 2 * reference > 0
