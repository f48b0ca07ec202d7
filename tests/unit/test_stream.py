"""Claims about streams: batches are those of an unshuffled dataset, and resume exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dat_ds.assembly import build_loader
from dat_ds.config import load_config
from dat_ds.data import DistributedLoader, StreamLoader, is_stream
from dat_ds.errors import CheckpointError, ConfigError, DataError
from dat_ds.ranks import Ranks


def image(value: float) -> Tensor:
    return torch.full((3, 2, 2), value / 256)


class Stream(IterableDataset[Any]):
    """Samples of an epoch are a function of it; counts how often it is read."""

    def __init__(self, size: int, *, by_epoch: bool = True) -> None:
        self.size, self.by_epoch, self.epoch = size, by_epoch, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        offset = 100 * self.epoch if self.by_epoch else 0
        return iter([(image(i + offset), i + offset) for i in range(self.size)])


def as_dataset(stream: Stream) -> Dataset[Any]:
    samples = list(stream)
    return TensorDataset(
        torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
    )


def labels(loader: Any, epochs: int = 1) -> list[list[int]]:
    found = []
    for _ in range(epochs):
        for x, y in loader:
            assert torch.equal(x[:, 0, 0, 0], y.float() / 256)
            found.append(y.tolist())
    return found


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize("replays", [1, 2])
def test_batches_and_plans_are_those_of_an_unshuffled_dataset(in_worker, replays):
    for rank in range(2):
        options = {"micro_batch": 2, "accumulation": 3, "rank": rank, "ranks": 2}
        options["replays"] = replays
        stream = StreamLoader(Stream(24), in_worker=in_worker, **options)
        dataset = DistributedLoader(as_dataset(Stream(24)), shuffle=False, **options)
        plans = [[loader.plan for _ in loader] for loader in (stream, dataset)]
        assert plans[0] == plans[1]
        assert len(plans[0]) == 2 * 3 * replays
        stream.set_position(0, 0)
        dataset.set_position(0, 0)
        assert labels(stream) == labels(dataset)


def test_the_end_of_an_epoch_that_fills_no_global_batch_is_dropped():
    loader = StreamLoader(Stream(11), micro_batch=2, accumulation=2)
    assert labels(loader, epochs=2) == [
        [0, 1], [2, 3], [4, 5], [6, 7], [100, 101], [102, 103], [104, 105], [106, 107]
    ]  # fmt: skip
    assert loader.position == (2, 0)
    assert loader.steps_per_epoch is None


@pytest.mark.parametrize("replays", [1, 3])
def test_it_resumes_after_any_step(replays):
    def make() -> StreamLoader:
        return StreamLoader(Stream(13), micro_batch=2, accumulation=2, replays=replays)

    loader, whole = make(), []
    for _ in range(3):
        whole += [(y.tolist(), loader.plan, loader.state_dict()) for _, y in loader]
    assert len(whole) == 3 * 3 * 2 * replays
    for done in range(1, len(whole), 2):
        resumed, rest = make(), []
        resumed.load_state_dict(whole[done][2])
        for _ in range(3):
            rest += [(y.tolist(), resumed.plan, resumed.state_dict()) for _, y in resumed]
        expected = whole[done + 1 :]
        assert rest[: len(expected)] == expected


def test_trading_ranks_for_accumulation_keeps_the_global_batches():
    alone = labels(StreamLoader(Stream(16), micro_batch=2, accumulation=4))
    pairs = [
        labels(StreamLoader(Stream(16), micro_batch=2, accumulation=2, rank=rank, ranks=2))
        for rank in range(2)
    ]
    assert alone == [batch for pair in zip(*pairs, strict=True) for batch in pair]


@pytest.mark.parametrize("in_worker", [False, True])
def test_a_stream_that_is_too_short_is_refused(in_worker):
    loader = StreamLoader(Stream(3), micro_batch=4, in_worker=in_worker)
    with pytest.raises(DataError, match=r"^The stream ended after 3 samples, but an optimizer st"):
        list(loader)
    loader.set_position(0, 2)
    with pytest.raises(DataError, match="ended after 3 samples, but the run to continue had read"):
        list(loader)


def test_a_sample_that_cannot_be_read_is_named_by_its_place():
    class Bad(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(image(i), None if i == 5 else i) for i in range(8)])

    with pytest.raises(DataError, match="Sample 5 has a label of class NoneType"):
        list(StreamLoader(Bad(), micro_batch=2))
    own = StreamLoader(Bad(), micro_batch=2, collate_fn=lambda s: (torch.rand(2, 3, 2, 2), [0, 0]))
    assert len(list(own)) == 4


def test_the_position_of_other_data_is_refused():
    state = StreamLoader(Stream(8), micro_batch=2).state_dict()
    with pytest.raises(CheckpointError, match="global_batch: checkpoint 2, this run 4"):
        StreamLoader(Stream(8), micro_batch=4).load_state_dict(state)
    dataset = DistributedLoader(as_dataset(Stream(8)), micro_batch=2)
    with pytest.raises(CheckpointError, match="lacks streamed"):
        StreamLoader(Stream(8), micro_batch=2).load_state_dict(dataset.state_dict())


def test_an_object_that_can_only_be_iterated_is_a_stream():
    class Iterable:
        def __iter__(self) -> Iterator[Any]:
            return iter(Stream(4))

    assert is_stream(Iterable())
    assert not is_stream([1])
    assert labels(StreamLoader(Iterable(), micro_batch=2)) == [[0, 1], [2, 3]]


def test_a_run_on_a_stream_needs_its_length_and_at_most_one_worker():
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "dat": {"data": {"num_workers": 2}},
    }
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with pytest.raises(ConfigError) as caught:
        build_loader(Stream(8), load_config(values).dat, ranks, 2, 1)
    assert "write dat.schedule.max_steps" in str(caught.value)
    assert "dat.data.num_workers=2 with a stream" in str(caught.value)
    with pytest.raises(DataError, match="are a DataLoader"):
        build_loader(DataLoader(Stream(8)), load_config(values).dat, ranks, 2, 1)
    values["dat"] = {"data": {"num_workers": 1}, "schedule": {"max_steps": 3}}
    loader = build_loader(Stream(8), load_config(values).dat, ranks, 2, 1)
    assert labels(loader) == [[0, 1], [2, 3], [4, 5], [6, 7]]


# ---- streamed datasets of Hugging Face

STREAMED = 36  # a multiple of micro-batches of 2 on 1, 2 and 3 ranks


@pytest.fixture(scope="module")
def parquet_files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three files of images whose pixels are their labels; the pattern that names them."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("streamed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for number in range(3):
        own = list(range(number, STREAMED, 3))
        pixels = [np.full((2, 2, 3), i, dtype=np.uint8) for i in own]
        rows = {"image": pixels, "label": own}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{number}.parquet")
    return str(folder / "*.parquet")


def streamed(files: str, **options: Any) -> StreamLoader:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return StreamLoader(rows.shuffle(seed=0, buffer_size=8), micro_batch=2, **options)


def read_labels(loader: StreamLoader) -> list[list[int]]:
    found = []
    for x, y in loader:
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
        found.append(y.tolist())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_read_every_row_of_a_streamed_dataset_once_shuffled_anew(parquet_files, ranks):
    orders = []
    for epoch in (0, 1):
        parts = []
        for rank in range(ranks):
            loader = streamed(parquet_files, rank=rank, ranks=ranks)
            loader.set_position(epoch, 0)
            parts.append(read_labels(loader))
        orders.append([batch for step in zip(*parts, strict=True) for batch in step])
        assert sorted(i for batch in orders[-1] for i in batch) == list(range(STREAMED))
    assert orders[0] != orders[1]
    alone = streamed(parquet_files)
    assert orders == [read_labels(alone), read_labels(alone)]


@pytest.mark.parametrize("in_worker", [False, True])
def test_a_streamed_dataset_goes_on_where_it_stopped_and_reads_the_same_in_a_worker(
    parquet_files, in_worker
):
    whole = streamed(parquet_files)
    epochs = [read_labels(whole), read_labels(whole)]
    stopped = streamed(parquet_files, ranks=3, rank=1)
    stopped.set_position(1, 2)
    resumed = streamed(parquet_files, accumulation=3, in_worker=in_worker)
    resumed.load_state_dict(stopped.state_dict())
    assert read_labels(resumed) == epochs[1][6:]


def test_undecoded_rows_of_a_streamed_dataset_are_left_to_collate(parquet_files):
    """The block of docs/data.md, on small images that are no larger than what it crops."""
    import datasets

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    block = page.split("\n## Streamed datasets of Hugging Face")[1].split("```python\n")[1]
    block = block.split("\nconfig[")[0]
    asked, small = (
        'load_dataset("imagenet-1k", ',
        f'load_dataset("parquet", data_files={parquet_files!r}, ',
    )
    assert asked in block
    names: dict[str, Any] = {"torch": torch}
    exec(block.replace(asked, small).replace("256), 224", "2), 2"), names)
    loader = StreamLoader(names["rows"], micro_batch=3, collate_fn=names["collate"])
    found = read_labels(loader)
    assert len(found) == STREAMED // 3
    assert sorted(i for batch in found for i in batch) == list(range(STREAMED))
    assert isinstance(names["rows"], datasets.IterableDataset)


def test_streaming_in_a_run_s_config_is_refused_with_what_to_write():
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "dat": {"data": {"name": "huggingface", "path": "x", "streaming": True}},
    }
    words = r"dat\.data\.streaming=true: .* Write false, or pass load_dataset\(\.\.\., streaming"
    with pytest.raises(ConfigError, match=words):
        load_config(values)
