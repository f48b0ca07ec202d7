"""A tail of one image, and of none, in a BatchNorm network whose last map is a single pixel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.distributed import tiny
from tests.distributed.harness import run_ranks


def shrinking_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, tiny.CLASSES)
    )


def train_an_epoch(stage: int, num_images: int) -> dict[str, Any]:
    import dat_ds
    from dat_ds.engine import hooks

    config = tiny.config(stage, dat={"attack": {"name": "none"}})
    data = TensorDataset(*tiny.images(num_images))
    engine, _, loader, _ = dat_ds.initialize(
        model=shrinking_cnn(), config=config, training_data=data
    )
    assert loader is not None
    sizes = []
    for x, y in loader:
        before = {k: v.clone() for k, v in engine.module.named_buffers()}
        engine.backward(engine(x, y))
        engine.step()
        sizes.append(len(x))
        kept = all(torch.equal(before[k], v) for k, v in engine.module.named_buffers())
        assert kept == (len(x) == 0), (len(x), kept)
    state = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return {"sizes": sizes, "state": state, "num_images": num_images}


CASES = [(0, 9), (2, 9), (3, 9)]


def all_cases() -> list[dict[str, Any]]:
    return [train_an_epoch(*case) for case in CASES]


def plain_epoch(num_images: int) -> dict[str, Tensor]:
    """The same by hand: 8 images on two ranks, then one image that only its rank looks at."""
    from dat_ds.data import DistributedBatchSampler

    model = shrinking_cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x_all, y_all = tiny.images(num_images)
    plans = [
        list(
            DistributedBatchSampler(
                num_images, micro_batch=4, accumulation=1, rank=rank, ranks=2, seed=0
            ).plans()
        )
        for rank in range(2)
    ]
    for parts in zip(*plans, strict=True):
        optimizer.zero_grad()
        for part in parts:
            if not part.indices:
                continue
            x, y = x_all[list(part.indices)], y_all[list(part.indices)]
            if len(x) == 1:  # its statistics are its own values, whatever the number of copies
                x, y = torch.cat([x, x]), torch.cat([y, y])
            (part.weight / 2 * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def outcomes() -> list[list[dict[str, Any]]]:
    return run_ranks(all_cases, 2)


def test_the_tail_leaves_one_rank_empty(outcomes: list[list[dict[str, Any]]]) -> None:
    assert [rank[0]["sizes"] for rank in outcomes] == [[4, 1], [4, 0]]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"zero{s}" for s, _ in CASES])
def test_weights_equal_plain_pytorch(outcomes: list[list[dict[str, Any]]], case: int) -> None:
    state, reference = outcomes[0][case]["state"], plain_epoch(9)
    for name, value in reference.items():
        torch.testing.assert_close(state[name], value.detach(), rtol=0, atol=1e-6)
