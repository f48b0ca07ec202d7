"""More ranks than a machine has places for are refused on GPUs, and told of on CPUs."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest

from dat_ds.engine import launch
from dat_ds.errors import ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def with_(name: str, places: int, ranks: int, rank: int) -> None:
        device = SimpleNamespace(device_name=lambda: name, device_count=lambda: places)
        monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: device)
        monkeypatch.setattr("os.cpu_count", lambda: places)
        monkeypatch.setenv("LOCAL_SIZE", str(ranks))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return with_


def test_a_rank_without_a_gpu_is_refused_with_what_to_type(machine):
    machine("cuda", places=2, ranks=4, rank=2)
    with pytest.raises(ConfigError) as caught:
        launch._check_places()
    assert str(caught.value) == (
        "LOCAL_RANK=2 is the rank number 3 of this machine, which shows 2 GPU(s): start one rank "
        "per GPU (deepspeed --num_gpus 2, or torchrun --nproc_per_node 2), or train on the CPU "
        "with DS_ACCELERATOR=cpu."
    )


def test_a_gpu_for_every_rank_is_in_order(machine):
    machine("cuda", places=2, ranks=2, rank=1)
    launch._check_places()


@pytest.mark.parametrize(("ranks", "rank", "told"), [(4, 0, True), (4, 1, False), (2, 0, False)])
def test_more_ranks_than_cores_are_told_of_once(machine, caplog, monkeypatch, ranks, rank, told):
    monkeypatch.setattr(launch.logger, "propagate", True)
    machine("cpu", places=2, ranks=ranks, rank=rank)
    with caplog.at_level(logging.WARNING):
        launch._check_places()
    words = "4 ranks share 2 cores, so every step takes longer: start at most 2 ranks here."
    assert caplog.messages == ([words] if told else [])
