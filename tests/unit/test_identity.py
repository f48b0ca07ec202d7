"""Of which run a checkpoint is: its config, its ranks, its training data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from dat_ds.config import load_config
from dat_ds.data import build_data
from dat_ds.data.fingerprint import difference, fingerprint
from dat_ds.data.transforms import Augmented
from dat_ds.engine.identity import Identity
from dat_ds.errors import CheckpointError

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
    "zero_optimization": {"stage": 0},
    "dat": {"schedule": {"epochs": 2}},
}


def images(count: int = 100, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 4, 4, generator=generator)
    return TensorDataset(x, torch.arange(count) % 3)


def identity(ranks: int = 2, batch: int = 16, data: Any = None, **keys: Any) -> Identity:
    data = images() if data is None else data
    return Identity(load_config({**BASE, **keys}), ranks, batch, fingerprint(data))


def state(of: Identity) -> dict[str, Any]:
    return {"format": 3, **of.to_state()}


def refusal(now: Identity, saved: Identity, *changed: str) -> str | None:
    try:
        now.check(Path("runs/a/checkpoints/step-00000005"), state(saved), changed)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "keys",
    [
        {"ranks": 1, "gradient_accumulation_steps": 2},
        {"ranks": 4, "train_micro_batch_size_per_gpu": 4},
        {"zero_optimization": {"stage": 3}},
        {"dat": {"schedule": {"epochs": 2}, "evaluation": {"pictures": 0}}},
    ],
)
def test_where_it_runs_may_change(keys: dict[str, Any]) -> None:
    assert refusal(identity(**keys), identity()) is None


@pytest.mark.parametrize(
    ("keys", "words", "name"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}},
            "optimizer.params.lr: checkpoint 0.003, this run 0.001",
            "optimizer.params.lr",
        ),
        (
            {"dat": {"schedule": {"epochs": 3}}},
            "dat.schedule.epochs: checkpoint 2.0, this run 3.0",
            "dat.schedule",
        ),
        ({"batch": 32}, "train_batch_size: checkpoint 16, this run 32", "train_batch_size"),
        (
            {"data": images(101)},
            "dat.data: other training data: checkpoint 100 samples, this run 101",
            "dat.data",
        ),
        (
            {"data": images(seed=1)},
            "dat.data: other training data: sample 0 and 63 more of 64",
            "dat.data",
        ),
    ],
)
def test_what_changes_the_trajectory_has_to_be_named(
    keys: dict[str, Any], words: str, name: str
) -> None:
    message = refusal(identity(**keys), identity())
    assert message is not None
    assert words in message
    assert "--changed KEY" in message
    assert refusal(identity(**keys), identity(), name) is None


def test_a_changed_key_that_is_none_is_refused() -> None:
    message = refusal(identity(), identity(), "dat.shedule")
    assert message is not None
    assert message.startswith("--changed dat.shedule: the config has no such key")


def test_a_new_epoch_begins_where_the_order_of_the_data_differs() -> None:
    assert identity().restarts_epoch(["dat.data.train_fraction"])
    assert identity().restarts_epoch(["dat"])
    assert identity().restarts_epoch(["train_batch_size"])
    assert not identity().restarts_epoch(["dat.schedule", "optimizer.params.lr"])


def test_checkpoints_without_a_layout_stay_with_their_ranks() -> None:
    saved = {**state(identity()), "format": 2}
    with pytest.raises(CheckpointError, match="ranks: checkpoint 2, this run 1"):
        identity(1, gradient_accumulation_steps=2).check(Path("c"), saved)


class Random(Dataset[Any]):
    """Other pixels each time."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(1, 2, 2), index


class Stream(IterableDataset[Any]):
    """No length."""

    def __iter__(self) -> Iterator[Any]:
        yield from images()


def test_fingerprints_do_not_see_augmentation_subsets_or_noise() -> None:
    data = images()
    order = list(range(100))
    augmented = Augmented(Subset(data, order), "crop", seed=5)
    assert fingerprint(augmented) == fingerprint(data)
    assert fingerprint(Random()) == {"num_samples": 50, "samples": {}}
    assert fingerprint(Stream()) is None
    assert difference(fingerprint(Random()), fingerprint(Random())) is None
    assert difference(None, fingerprint(data)) is None


def test_one_other_label_among_the_samples_that_are_compared_is_found() -> None:
    data, other = images(30), images(30)
    other.tensors[1][29] += 1
    assert difference(fingerprint(data), fingerprint(other)) == (
        "sample 29 and 0 more of 30 that were compared"
    )


def test_one_other_label_among_thousands_is_found(tmp_path: Path) -> None:
    x, y = np.zeros((2000, 4, 4), np.uint8), np.arange(2000) % 5
    paths = [tmp_path / name for name in ("before.npz", "after.npz")]
    for path in paths:
        np.savez(path, x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
        y[7] = 4  # none of the 64 samples that are compared
    extra = {"extra": {"name": "npz", "path": str(paths[0])}, "extra_fraction": 0.5}
    for keys in ({}, {"damaged": "skip"}, {"mixup": 0.1}, extra):
        keys = {"validation_fraction": 0, **keys}
        before, after, again = (
            build_data("npz", path=path, **keys).train for path in (*paths, paths[0])
        )
        assert difference(fingerprint(before), fingerprint(after)) == "labels of some samples"
        assert difference(fingerprint(before), fingerprint(again)) is None


def test_pseudo_labels_are_not_part_of_a_fingerprint() -> None:
    splits = build_data("digits", labelled_fraction=0.5)
    before = fingerprint(splits.train)
    assert splits.mixture is not None
    splits.mixture.label(torch.zeros(splits.mixture.num_unlabelled, dtype=torch.int64))
    after = fingerprint(splits.train)
    assert before is not None
    assert after is not None
    assert before["labels"] == after["labels"]


def test_fine_tuning_stays_as_it_was() -> None:
    tuned = identity(dat={**BASE["dat"], "finetuning": {"layer_decay": 0.5}})
    words = refusal(tuned, identity())
    assert words is not None
    assert "dat.finetuning.layer_decay: checkpoint None, this run 0.5" in words
    for name in ("dat.finetuning.layer_decay", "dat.finetuning", "dat"):
        words = refusal(tuned, identity(), name)
        assert words is not None
        assert words.startswith("--changed: dat.finetuning.layer_decay differs")
    assert refusal(tuned, tuned, "dat.finetuning") is None


def test_checkpoints_from_before_there_was_fine_tuning_trained_everything() -> None:
    saved = state(identity())
    del saved["config"]["dat"]["finetuning"]
    identity().check(Path("step-00000005"), saved)
    tuned = identity(dat={**BASE["dat"], "finetuning": {"linear_probe": True}})
    with pytest.raises(CheckpointError, match="linear_probe: checkpoint False, this run True"):
        tuned.check(Path("step-00000005"), saved)
