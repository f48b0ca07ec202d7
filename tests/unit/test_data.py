import pickle
import random
import traceback
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from dat_ds.data import (
    AUGMENTATIONS,
    DATASETS,
    Augmented,
    DistributedBatchSampler,
    DistributedLoader,
    SampleKey,
    build_data,
    evaluation_batches,
    hold_out,
    plan_step,
    shard_evenly,
)
from dat_ds.errors import CheckpointError, DataError


def make_dataset(size, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(size, *shape, generator=generator), torch.arange(size))


def sampler_of(size, micro_batch, accumulation, rank, ranks, seed=3):
    return DistributedBatchSampler(
        size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        ranks=ranks,
        seed=seed,
    )


def global_batches(size, micro_batch, accumulation, ranks, seed=3, epoch=0):
    """Each step's slots in slot order, as lists of plans."""
    per_rank = []
    for rank in range(ranks):
        sampler = sampler_of(size, micro_batch, accumulation, rank, ranks, seed)
        sampler.set_position(epoch, 0)
        per_rank.append(list(sampler.plans()))
    assert len({len(plans) for plans in per_rank}) == 1
    in_slot_order = [plan for same_time in zip(*per_rank, strict=True) for plan in same_time]
    slots = accumulation * ranks
    return [in_slot_order[i : i + slots] for i in range(0, len(in_slot_order), slots)]


def flat(batch):
    return [index for plan in batch for index in plan.indices]


setups = st.tuples(
    st.integers(4, 60), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)
)  # samples, micro batch, accumulation, ranks


# --- planning ---


@settings(deadline=None)
@given(setups)
def test_an_epoch_hands_out_every_sample_exactly_once_over_the_ranks(setup):
    seen = [index for batch in global_batches(*setup) for index in flat(batch)]
    assert sorted(seen) == list(range(setup[0]))


@settings(deadline=None)
@given(setups)
def test_weighted_local_means_average_to_the_mean_of_the_global_batch(setup):
    values = torch.rand(setup[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for batch in global_batches(*setup):
        local = [
            plan.weight * values[list(plan.indices)].mean() if plan.indices else 0 * values[0]
            for plan in batch
        ]
        # Tolerance: float64 rounding of at most 24 terms.
        torch.testing.assert_close(
            torch.stack(local).mean(), values[flat(batch)].mean(), rtol=1e-12, atol=0
        )


@settings(deadline=None)
@given(setups)
def test_sizes_within_a_step_differ_by_at_most_one_and_positions_are_consecutive(setup):
    _, micro_batch, _, _ = setup
    batches = global_batches(*setup)
    for batch in batches:
        sizes = [len(plan.indices) for plan in batch]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= micro_batch
        assert [plan.first_position for plan in batch] == [
            sum(sizes[:j]) for j in range(len(sizes))
        ]
    for batch in batches[:-1]:
        assert [plan.weight for plan in batch] == [1.0] * len(batch)


def test_a_last_batch_smaller_than_the_slots_leaves_some_slots_empty_with_weight_zero():
    assert plan_step(num_left=2, micro_batch=4, slots=4) == [(0, 1), (1, 1), (2, 0), (2, 0)]
    *_, last = global_batches(18, micro_batch=4, accumulation=2, ranks=2)
    assert [plan.weight for plan in last] == [2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [24, 23, 21, 17])
def test_trading_ranks_for_accumulation_keeps_every_global_batch_and_slot(size):
    one_rank = global_batches(size, micro_batch=3, accumulation=2, ranks=1)
    two_ranks = global_batches(size, micro_batch=3, accumulation=1, ranks=2)
    assert [[plan.indices for plan in batch] for batch in one_rank] == [
        [plan.indices for plan in batch] for batch in two_ranks
    ]


def test_the_global_order_depends_on_the_global_batch_only():
    few = [flat(batch) for batch in global_batches(50, micro_batch=12, accumulation=1, ranks=1)]
    many = [flat(batch) for batch in global_batches(50, micro_batch=2, accumulation=3, ranks=2)]
    assert few == many


def test_every_epoch_and_seed_has_its_own_order():
    orders = {
        tuple(index for batch in global_batches(30, 5, 1, 1, seed, epoch) for index in flat(batch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_without_shuffling_the_order_is_that_of_the_dataset():
    sampler = DistributedBatchSampler(
        5, micro_batch=2, accumulation=1, rank=0, ranks=1, seed=0, shuffle=False
    )
    assert list(sampler) == [
        [SampleKey(0, 0), SampleKey(0, 1)],
        [SampleKey(0, 2), SampleKey(0, 3)],
        [SampleKey(0, 4)],
    ]


def test_the_plans_from_a_step_are_the_tail_of_the_whole_epoch():
    sampler = sampler_of(40, 3, 2, rank=1, ranks=2)
    sampler.set_position(2, 0)
    whole = list(sampler.plans())
    sampler.set_position(2, 2)
    assert list(sampler.plans()) == whole[4:]


def test_the_last_step_of_an_epoch_is_followed_by_the_next_epoch():
    sampler = sampler_of(10, 5, 1, rank=0, ranks=1)
    sampler.set_position(0, 2)
    assert (sampler.epoch, sampler.step) == (1, 0)


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0, 3)])
def test_a_position_outside_the_data_is_refused(position):
    with pytest.raises(ValueError, match=r"step in 0\.\.2"):
        sampler_of(10, 5, 1, rank=0, ranks=1).set_position(*position)


def test_more_ranks_than_samples_are_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"3 samples but there are 4 ranks.*--num_gpus 3"):
        sampler_of(3, 1, 1, rank=0, ranks=4)


@pytest.mark.parametrize(
    ("setup", "text"),
    [((9, 0, 1, 0, 1), "micro_batch=0"), ((9, 1, 1, 2, 2), r"rank=2 is outside 0\.\.1")],
)
def test_impossible_counts_and_ranks_are_refused(setup, text):
    with pytest.raises(ValueError, match=text):
        sampler_of(*setup)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 7))
def test_evaluation_shards_cover_all_in_order_with_equally_many_batches(size, ranks, batch_size):
    shards = [shard_evenly(size, rank, ranks, batch_size) for rank in range(ranks)]
    assert [i for shard in shards for batch in shard for i in batch] == list(range(size))
    assert len({len(shard) for shard in shards}) == 1
    assert all(len(batch) <= batch_size for shard in shards for batch in shard)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 5))
def test_holding_out_is_disjoint_complete_and_proportional(labels, fraction, seed):
    y = torch.tensor(labels)
    kept, held = hold_out(y, fraction, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert len(held) == round(fraction * len(labels))
    for label in set(labels):
        expected = fraction * labels.count(label)
        assert abs(sum(labels[i] == label for i in held) - expected) <= 1
    assert (kept, held) == hold_out(y, fraction, seed)


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
    with pytest.raises(ValueError, match="must be one of none, crop"):
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


# --- datasets ---


def write_cifar(root, monkeypatch, name="CIFAR10"):
    """Lay down six tiny files per torchvision's format, with their checksums accepted."""
    kind = getattr(torchvision.datasets, name)
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    for file, _ in kind.train_list + kind.test_list:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        entry = {"data": pixels, key: [i % 10 for i in range(20)]}
        (folder / file).write_bytes(pickle.dumps(entry))
    classes = {kind.meta["key"]: [f"class{i}" for i in range(10 if name == "CIFAR10" else 100)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(classes))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return pickle.loads((folder / kind.test_list[0][0]).read_bytes())["data"]


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def write_folder(root, train=("cat", "dog"), test=("cat", "dog"), part="test"):
    rng = np.random.default_rng(0)
    for name, classes in (("train", train), (part, test)):
        for label in classes:
            (root / name / label).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / label / f"{i}.png")
    return root


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        build_data(*args, **kwargs)
    return str(caught.value)


def check_samples(splits):
    for split in (splits.train, splits.validation, splits.test):
        for index in range(min(len(split), 3)):
            x, y = split[index]
            assert x.shape == splits.image_shape
            assert x.dtype == torch.float32
            assert x.min() >= 0
            assert x.max() <= 1
            assert 0 <= y < splits.num_classes
    assert len(splits.mean) == len(splits.std) == splits.image_shape[0]


def test_digits_are_scaled_to_unit_range_and_split_by_fifths_and_tenths():
    splits = build_data("digits", augment="crop")
    check_samples(splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1294, 144, 359)
    assert (splits.image_shape, splits.num_classes, splits.name) == ((1, 8, 8), 10, "digits")
    assert splits.test.images.max() == 1
    assert splits.class_names == tuple("0123456789")


def test_the_test_split_of_digits_is_the_same_for_every_seed():
    one, other = (build_data("digits", seed=seed) for seed in (0, 9))
    assert torch.equal(one.test.images, other.test.images)
    assert one.mean == other.mean
    assert one.validation.indices != other.validation.indices


def test_mean_and_std_are_those_of_the_training_data():
    data = build_data("digits", validation_fraction=0.0)
    images = torch.stack([data.train[i][0] for i in range(len(data.train))]).double()
    assert data.mean == pytest.approx([images.mean().item()], rel=1e-9)
    assert data.std == pytest.approx([images.std(correction=0).item()], rel=1e-9)


def test_validation_is_disjoint_from_train_stratified_and_never_augmented():
    splits = build_data("digits", augment="crop", validation_fraction=0.2)
    train, validation = splits.train.dataset, splits.validation
    assert set(train.indices).isdisjoint(validation.indices)
    assert len(train) + len(validation) == len(train.dataset)
    counts = train.dataset.labels[validation.indices].bincount()
    expected = train.dataset.labels.bincount() * 0.2
    assert (counts - expected).abs().max() < 1
    assert torch.equal(validation[0][0], validation.dataset.images[validation.indices[0]])


def test_validation_fraction_zero_gives_an_empty_validation_split():
    splits = build_data("synthetic", validation_fraction=0.0)
    assert (len(splits.train), len(splits.validation)) == (512, 0)


@pytest.mark.parametrize(
    ("name", "kind", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)]
)
def test_cifar_is_read_from_the_files_of_torchvision(tmp_path, monkeypatch, name, kind, classes):
    test_pixels = write_cifar(tmp_path, monkeypatch, kind)
    splits = build_data(name, path=tmp_path, augment="crop_flip")
    check_samples(splits)
    assert (splits.num_classes, splits.image_shape) == (classes, (3, 32, 32))
    assert splits.class_names[0] == "class0"
    expected = torch.from_numpy(test_pixels[3].reshape(3, 32, 32)).float() / 255
    assert torch.equal(splits.test[3][0], expected)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_files_are_refused_with_how_to_get_them(tmp_path, name):
    text = refusal(name, path=tmp_path / "nowhere")
    assert f"dat.data.path='{tmp_path}/nowhere'" in text
    assert "batches.meta" in text or "meta" in text
    assert f"torchvision.datasets.{name.upper()}('{tmp_path}/nowhere', download=True)" in text


def test_npz_images_are_read_channels_last_or_grey(tmp_path):
    arrays = write_npz(tmp_path / "a.npz")
    splits = build_data("npz", path=tmp_path / "a.npz")
    check_samples(splits)
    assert (splits.image_shape, splits.num_classes) == ((3, 6, 5), 4)
    expected = torch.from_numpy(arrays["x_test"][2]).permute(2, 0, 1).float() / 255
    assert torch.equal(splits.test[2][0], expected)

    grey = {key: arrays[key][..., 0] for key in ("x_train", "x_test")}
    write_npz(tmp_path / "grey.npz", **grey)
    assert build_data("npz", path=tmp_path / "grey.npz").image_shape == (1, 6, 5)


def test_npz_also_accepts_images_and_labels_but_never_without_a_test_part(tmp_path):
    arrays = write_npz(tmp_path / "a.npz")
    named = {"images": arrays["x_train"], "labels": arrays["y_train"]}
    np.savez(tmp_path / "b.npz", **named)
    text = refusal("npz", path=tmp_path / "b.npz")
    assert "lacks the arrays test_images, test_labels" in text
    named |= {"test_images": arrays["x_test"], "test_labels": arrays["y_test"]}
    np.savez(tmp_path / "c.npz", **named)
    check_samples(build_data("npz", path=tmp_path / "c.npz"))


def test_all_problems_of_an_npz_are_reported_together(tmp_path):
    write_npz(
        tmp_path / "a.npz",
        x_train=np.zeros((40, 6, 5, 3), dtype=np.float32),
        y_train=np.zeros(39, dtype=np.int64),
        x_test=np.zeros((8, 3, 6, 5), dtype=np.uint8),
        y_test=np.zeros((8, 1)),
    )
    text = refusal("npz", path=tmp_path / "a.npz")
    assert "x_train is float32; images must be uint8" in text
    assert "x_train has 40 images but y_train has 39 labels" in text
    assert "x_test has shape (8, 3, 6, 5)" in text
    assert "y_test is float64 of shape (8, 1)" in text
    assert text.count("dat.data.path=") == 4


def test_npz_parts_of_different_image_shape_are_refused(tmp_path):
    write_npz(tmp_path / "a.npz", x_test=np.zeros((8, 5, 5, 3), dtype=np.uint8))
    assert "x_train has images of shape (6, 5, 3), x_test of (5, 5, 3)" in refusal(
        "npz", path=tmp_path / "a.npz"
    )


def test_an_unreadable_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    write_npz(tmp_path / "object.npz", y_train=np.array([None] * 40))
    for file in ("missing.npz", "text.npz", "array.npy", "object.npz"):
        text = refusal("npz", path=tmp_path / file)
        assert f"dat.data.path='{tmp_path / file}' is not a readable npz file" in text


def test_labels_out_of_range_are_refused_for_both_parts_together(tmp_path):
    write_npz(tmp_path / "a.npz", y_test=np.arange(8) - 1)
    text = refusal("npz", path=tmp_path / "a.npz", num_classes=3)
    assert "dat.data.num_classes=3, but the labels of the train part run from 0 to 3" in text
    assert "The labels of the test part run from -1 to 6" in text
    assert "Write dat.data.num_classes=7" in text


def test_num_classes_may_exceed_the_labels_in_the_data(tmp_path):
    write_npz(tmp_path / "a.npz")
    assert build_data("npz", path=tmp_path / "a.npz", num_classes=12).num_classes == 12


def test_empty_splits_are_refused(tmp_path):
    empty = {"x_test": np.zeros((0, 6, 5, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)}
    write_npz(tmp_path / "a.npz", **empty)
    assert refusal("npz", path=tmp_path / "a.npz") == "The test part has no images."
    text = refusal("synthetic", num_train=4)
    assert "validation_fraction=0.1 of 4 images leaves the validation split empty" in text
    text = refusal("synthetic", num_train=4, validation_fraction=0.99)
    assert "leaves the training split empty" in text


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_imagefolder_yields_square_images_of_img_size(tmp_path, part, augment):
    write_folder(tmp_path, part=part)
    splits = build_data(
        "imagefolder", path=tmp_path, img_size=16, augment=augment, validation_fraction=0.25
    )
    check_samples(splits)
    assert splits.image_shape == (3, 16, 16)
    assert splits.class_names == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 8)


def test_imagefolder_is_224_unless_told_and_crops_from_the_whole_image(tmp_path):
    write_folder(tmp_path)
    splits = build_data("imagefolder", path=tmp_path, augment="resized_crop_flip")
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, 224, 224)

    red = np.zeros((10, 40, 3), dtype=np.uint8)
    red[:, :8, 0] = 255  # outside the central square, so visible only in the whole image
    for i in range(4):
        Image.fromarray(red).save(tmp_path / "train" / "cat" / f"{i}.png")
    splits = build_data(
        "imagefolder", path=tmp_path, img_size=8, augment="resized_crop_flip", validation_fraction=0
    )
    assert splits.train.dataset[0][0].max() == 0
    assert any(splits.train[SampleKey(epoch, 0)][0].max() > 0.5 for epoch in range(40))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_refused_by_name_from_any_process(tmp_path, num_workers):
    write_folder(tmp_path)
    file = tmp_path / "test" / "dog" / "2.png"
    file.write_bytes(file.read_bytes()[:200])
    test = build_data("imagefolder", path=tmp_path, img_size=8).test
    with pytest.raises(DataError) as caught:
        list(evaluation_batches(test, batch_size=4, num_workers=num_workers))
    assert str(caught.value).startswith(f"dat.data.path: cannot read the image {file} (")
    assert "Traceback" not in str(caught.value)


def test_imagefolder_without_its_folders_or_images_is_refused(tmp_path):
    text = refusal("imagefolder", path=tmp_path)
    assert f"lacks the folders {tmp_path}/train, {tmp_path}/test" in text
    write_folder(tmp_path, test=())
    (tmp_path / "test" / "cat").mkdir(parents=True)
    assert f"no dataset in {tmp_path}/test" in refusal("imagefolder", path=tmp_path)


def test_imagefolder_with_other_classes_in_the_test_part_is_refused(tmp_path):
    write_folder(tmp_path, train=("cat", "dog", "owl"), test=("cat", "dgo"))
    text = refusal("imagefolder", path=tmp_path)
    assert "Only in train: dog, owl; only in test: dgo." in text


def test_synthetic_images_are_reproducible_class_dependent_and_sized_as_asked():
    kwargs = {"num_train": 40, "num_test": 12, "num_classes": 5, "image_shape": (2, 6, 7)}
    one, again, other = (build_data("synthetic", seed=s, **kwargs) for s in (0, 0, 1))
    check_samples(one)
    assert (len(one.train), len(one.validation), len(one.test)) == (36, 4, 12)
    assert (one.num_classes, one.image_shape) == (5, (2, 6, 7))
    assert torch.equal(one.test.images, again.test.images)
    assert not torch.equal(one.test.images, other.test.images)
    x = one.test.images.float()
    same, different = (x[0] - x[5]).abs().mean(), (x[0] - x[1]).abs().mean()
    assert same < different


def test_img_size_resizes_images_held_in_memory():
    splits = build_data("digits", img_size=16, augment="crop")
    check_samples(splits)
    assert splits.image_shape == (1, 16, 16)


def test_an_unknown_name_is_refused_with_the_closest_and_the_valid_ones():
    text = refusal("cifar_10")
    assert text == (
        "dat.data.name='cifar_10' is unknown (did you mean 'cifar10'?). "
        f"Valid: {', '.join(DATASETS)}."
    )


def test_all_problems_of_the_arguments_are_reported_together():
    text = refusal(
        "digits",
        path="/data",
        validation_fraction=1.0,
        augment="crops",
        img_size=0,
        num_classes=0,
        num_train=5,
        image_shape=(3, 32),
    )
    for part in (
        "dat.data.augment='crops' is unknown (did you mean 'crop'?)",
        "dat.data.validation_fraction=1.0 must be at least 0 and below 1",
        "dat.data.img_size=0 must be at least 1",
        "dat.data.num_classes=0 must be at least 1",
        "dat.data.image_shape=[3, 32] must be channels, height, width",
        "dat.data.path='/data' has no meaning for dat.data.name='digits'; remove it.",
        "dat.data.num_train=5 has no meaning",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["cifar10", "npz", "imagefolder"])
def test_a_dataset_on_disk_needs_a_path(name):
    assert "dat.data.path is not set" in refusal(name)


def test_consecutive_epochs_of_the_whole_pipeline_differ_and_repeat_from_the_seed():
    def epochs(seed):
        splits = build_data("digits", augment="crop", seed=seed, validation_fraction=0.9)
        loader = DistributedLoader(splits.train, micro_batch=len(splits.train), seed=seed)
        return [x.clone() for _ in range(3) for x, _ in loader]

    first = epochs(0)
    assert all(torch.equal(x, again) for x, again in zip(first, epochs(0), strict=True))
    assert not any(torch.equal(x, following) for x, following in pairwise(first))
