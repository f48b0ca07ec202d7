"""Claims about augmentation and the loader: functions of the seed, resumable after any step."""

import pickle
import random
import time
import traceback

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from dat_ds.data import (
    AUGMENTATIONS,
    Augmented,
    DistributedLoader,
    SampleKey,
    build_data,
    evaluation_batches,
)
from dat_ds.data.loader import one_ahead
from dat_ds.errors import CheckpointError, DataError


def make_dataset(size, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(size, *shape, generator=generator), torch.arange(size))


# --- augmentation ---


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_augmentation_is_a_function_of_seed_epoch_and_index(augment):
    data = make_dataset(4, (3, 16, 16))
    one, other = Augmented(data, augment, seed=1), Augmented(data, augment, seed=1)
    keys = [SampleKey(epoch, index) for epoch in range(2) for index in range(4)]
    forward = [one[key][0] for key in keys]
    backward = [other[key][0] for key in reversed(keys)][::-1]
    for x, again in zip(forward, backward, strict=True):
        assert torch.equal(x, again)
        assert x.shape == (3, 16, 16)
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1


@pytest.mark.parametrize("augment", AUGMENTATIONS[1:])
def test_augmentation_changes_with_seed_and_epoch(augment):
    data = make_dataset(8, (3, 16, 16))

    def images(seed, epoch):
        return torch.stack(
            [Augmented(data, augment, seed)[SampleKey(epoch, i)][0] for i in range(8)]
        )

    assert not torch.equal(images(0, 0), images(0, 1))
    assert not torch.equal(images(0, 0), images(1, 0))
    assert not torch.equal(images(0, 1), images(1, 0))


def test_flip_mirrors_about_half_of_the_images_and_moves_none():
    data = make_dataset(200, (3, 4, 6))
    flipped = Augmented(data, "flip", seed=0)
    mirrored = [torch.equal(flipped[i][0], data[i][0].flip(-1)) for i in range(200)]
    kept = [torch.equal(flipped[i][0], data[i][0]) for i in range(200)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130


def test_a_plain_index_means_epoch_zero():
    data = Augmented(make_dataset(3, (3, 16, 16)), "crop_flip", seed=0)
    assert torch.equal(data[2][0], data[SampleKey(0, 2)][0])


def test_a_subset_of_an_augmented_dataset_still_changes_with_the_epoch():
    data = Subset(Augmented(make_dataset(8, (3, 16, 16)), "crop_flip", seed=0), range(1, 8))
    loader = DistributedLoader(data, micro_batch=7, shuffle=False)
    (first, _), (second, _) = [batch for _ in range(2) for batch in loader]
    assert not torch.equal(first, second)


def test_crop_is_a_zero_padded_shift_without_mirroring():
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    shifts = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    data = Augmented([(image, 0)], "crop", seed=0)
    hits = set()
    for epoch in range(60):
        x, _ = data[SampleKey(epoch, 0)]
        hits |= {k for k, shift in enumerate(shifts) if torch.equal(x, shift)}
    assert hits == set(range(9))


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="must be one of none, flip, crop"):
        Augmented(make_dataset(1), "mixup", seed=0)


@pytest.mark.parametrize("shape", [(3, 64, 2), (3, 2, 64)])
def test_resized_crop_falls_back_to_the_centre_of_an_extreme_shape(shape):
    data = Augmented(make_dataset(1, shape), "resized_crop_flip", seed=0, size=(4, 4))
    assert all(data[SampleKey(epoch, 0)][0].shape == (3, 4, 4) for epoch in range(20))


# --- loader ---


def copies(loader, epochs=1):
    return [(x.clone(), y.clone(), loader.plan) for _ in range(epochs) for x, y in loader]


def assert_same_batches(left, right):
    assert [plan for _, _, plan in left] == [plan for _, _, plan in right]
    for (x, y, _), (x_other, y_other, _) in zip(left, right, strict=True):
        assert torch.equal(x, x_other)
        assert torch.equal(y, y_other)


def test_workers_change_nothing_of_batches_augmentation_or_plans():
    data = Augmented(make_dataset(11), "crop_flip", seed=5)
    kwargs = {"micro_batch": 2, "accumulation": 2, "rank": 1, "ranks": 2, "seed": 5}
    alone = copies(DistributedLoader(data, **kwargs), epochs=2)
    helped = copies(DistributedLoader(data, num_workers=2, **kwargs), epochs=2)
    assert_same_batches(alone, helped)


def test_the_plan_names_the_samples_of_the_batch_handed_out_last():
    loader = DistributedLoader(make_dataset(13), micro_batch=2, accumulation=2, num_workers=2)
    assert loader.plan is None
    for _, y in loader:
        assert y.tolist() == list(loader.plan.indices)


def test_batches_are_float_images_and_int64_labels_and_may_be_empty():
    loader = DistributedLoader(make_dataset(5), micro_batch=2, rank=1, ranks=2)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    assert [x.shape for x, _ in batches] == [(2, 3, 8, 8), (0, 3, 8, 8)]
    assert [y.shape for _, y in batches] == [(2,), (0,)]
    assert {x.dtype for x, _ in batches} == {torch.float32}
    assert {y.dtype for _, y in batches} == {torch.int64}
    assert loader.plan.weight == 0.0


def test_the_epoch_advances_by_itself_and_reshuffles():
    loader = DistributedLoader(make_dataset(20), micro_batch=20)
    orders = [y.tolist() for _ in range(3) for _, y in loader]
    assert len({tuple(order) for order in orders}) == 3
    assert loader.state_dict()["epoch"] == 3


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop_after", [0, 2, 4, 6])
def test_resuming_after_any_step_equals_the_uninterrupted_run(stop_after, num_workers):
    data = Augmented(make_dataset(22), "crop_flip", seed=2)

    def make():
        return DistributedLoader(
            data, micro_batch=4, accumulation=2, seed=2, num_workers=num_workers
        )

    whole = copies(make(), epochs=3)
    first = make()
    state = first.state_dict()
    for count, _ in enumerate(first, start=1):
        if count == stop_after:
            state = first.state_dict()
            break
    assert (state["epoch"], state["step"]) == divmod(stop_after // 2, 3)

    resumed = make()
    resumed.load_state_dict(state)
    assert_same_batches(copies(resumed, epochs=2), whole[stop_after : 12 if stop_after < 6 else 18])


def test_a_step_whose_micro_batches_were_not_all_handed_out_is_not_counted():
    loader = DistributedLoader(make_dataset(20), micro_batch=2, accumulation=2)
    for _ in zip(range(3), loader, strict=False):
        pass
    assert loader.state_dict()["step"] == 1


def test_a_resume_may_trade_ranks_for_accumulation():
    data = make_dataset(24)
    one = DistributedLoader(data, micro_batch=4, accumulation=2)
    iterator = iter(one)
    next(iterator), next(iterator)
    two = [DistributedLoader(data, micro_batch=4, rank=rank, ranks=2) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(one.state_dict())
    left = [y.tolist() for _, y in iterator]
    right = [y.tolist() for pair in zip(*two, strict=True) for _, y in pair]
    assert left == right


def test_a_state_of_another_run_is_refused_naming_every_difference():
    state = DistributedLoader(make_dataset(20), micro_batch=2, seed=1).state_dict()
    loader = DistributedLoader(make_dataset(21), micro_batch=3, seed=2)
    with pytest.raises(CheckpointError) as caught:
        loader.load_state_dict(state)
    text = str(caught.value)
    assert "seed: checkpoint 1, this run 2" in text
    assert "num_samples: checkpoint 20, this run 21" in text
    assert "global_batch: checkpoint 2, this run 3" in text


def test_an_incomplete_or_impossible_state_is_refused():
    loader = DistributedLoader(make_dataset(20), micro_batch=2)
    with pytest.raises(CheckpointError, match="lacks epoch, seed"):
        loader.load_state_dict({"step": 0, "num_samples": 20, "global_batch": 2})
    with pytest.raises(CheckpointError, match="step=99"):
        loader.load_state_dict({**loader.state_dict(), "step": 99})


def test_moving_the_loader_ends_a_running_iteration_loudly():
    loader = DistributedLoader(make_dataset(20), micro_batch=2)
    iterator = iter(loader)
    next(iterator)
    loader.set_position(1, 0)
    with pytest.raises(RuntimeError, match="start a new 'for' loop"):
        next(iterator)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_building_and_reading_data_leaves_every_global_generator_alone(num_workers):
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    splits = build_data("synthetic", num_train=20, num_test=8, augment="resized_crop_flip")
    list(DistributedLoader(splits.train, micro_batch=8, num_workers=num_workers))
    list(evaluation_batches(splits.test, batch_size=4, num_workers=num_workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (pickle.dumps(np.random.get_state()), random.getstate())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_cover_the_first_examples_once_over_the_ranks(num_workers):
    data = make_dataset(9)
    per_rank = [
        list(
            evaluation_batches(
                data, batch_size=2, rank=rank, ranks=3, num_examples=7, num_workers=num_workers
            )
        )
        for rank in range(3)
    ]
    assert [len(batches) for batches in per_rank] == [2, 2, 2]
    assert [i for batches in per_rank for *_, indices in batches for i in indices] == list(range(7))
    for x, y, indices in (batch for batches in per_rank for batch in batches):
        assert y.tolist() == indices
        assert torch.equal(x, data.tensors[0][indices])


def test_evaluation_takes_all_samples_unless_told_and_none_of_an_empty_dataset():
    assert sum(len(y) for _, y, _ in evaluation_batches(make_dataset(9), batch_size=4)) == 9
    batches = evaluation_batches(make_dataset(9), batch_size=4, num_examples=100)
    assert sum(len(y) for _, y, _ in batches) == 9
    assert list(evaluation_batches(Subset(make_dataset(3), []), batch_size=4)) == []
    with pytest.raises(DataError, match="num_examples=0"):
        evaluation_batches(make_dataset(9), batch_size=4, num_examples=0)


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return torch.zeros(1, 2, 2), 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_error_keeps_its_own_message_through_the_workers(num_workers):
    loader = DistributedLoader(
        Failing(DataError("bad.jpg")), micro_batch=2, num_workers=num_workers
    )
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value) == "bad.jpg"


def test_an_error_of_the_program_itself_keeps_the_traceback_of_the_worker():
    loader = DistributedLoader(Failing(KeyError("bug")), micro_batch=2, num_workers=1)
    with pytest.raises(KeyError, match="Original Traceback") as caught:
        list(loader)
    traceback.clear_frames(caught.tb)  # they hold on to the worker


def test_a_batch_is_taken_while_the_one_before_it_is_used():
    taken = []

    def items():
        for number in range(4):
            taken.append(number)
            yield number

    ahead = one_ahead(items())
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while taken == [0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == [0, 1]  # one and no more
    assert list(ahead) == [1, 2, 3]
