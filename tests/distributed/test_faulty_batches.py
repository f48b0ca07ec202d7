"""Claim: an image that is damaged on one rank is told on all before a checkpoint holds it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.harness import run_ranks


def damaged(folder: str) -> dict[str, Any]:
    """Messages of this rank, by who asked, and the checkpoints that were written."""
    import dat_ds
    from dat_ds.errors import DataError

    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for stage in (0, 3):
        for asked in ("save_checkpoint", "reduced_metrics"):
            engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=tiny.config(stage))
            home = Path(folder) / f"{stage}-{asked}"
            engine.watch.folder = home
            x, y = tiny.images(4, seed=rank)
            for step in range(3):
                spoiled = x.clone()
                if step == 1 and rank == 1:
                    spoiled[2, 0, 0, 0] = float("nan")
                loss = engine(spoiled, y)
                engine.backward(loss)
                engine.step()
            try:
                call = getattr(engine, asked)
                call(str(home)) if asked == "save_checkpoint" else call()
                found[f"{stage} {asked}"] = None
            except DataError as error:
                found[f"{stage} {asked}"] = str(error)
            found[f"{stage} {asked} files"] = sorted(os.listdir(home)) if home.exists() else []
            engine.close()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        results: list[dict[str, Any]] = run_ranks(damaged, 2, folder)
    return results


@pytest.mark.parametrize("asked", ["save_checkpoint", "reduced_metrics"])
@pytest.mark.parametrize("stage", [0, 3])
def test_every_rank_names_the_image_of_the_rank_that_saw_it(found, stage, asked):
    messages = [of_rank[f"{stage} {asked}"] for of_rank in found]
    place = "NaN or infinite pixels. This is image 2 of micro-step 0 in step 2 on rank 1"
    assert messages[0].startswith("rank 1: Images hold")
    assert all(place in message for message in messages)
    files = {name for of_rank in found for name in of_rank[f"{stage} {asked} files"]}
    assert files == {"faulty_image_rank1_step2.npz"}
