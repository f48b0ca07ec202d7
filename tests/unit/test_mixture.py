"""Claims about batches with fixed shares: what they hold, on any ranks, and after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset

from dat_ds.config import load_config
from dat_ds.data import (
    Augmented,
    DistributedBatchSampler,
    DistributedLoader,
    FixedShare,
    Mixed,
    Mixture,
    SampleKey,
    build_data,
)
from dat_ds.data.fingerprint import difference, fingerprint
from dat_ds.data.sampler import seeded_generator
from dat_ds.errors import CheckpointError, ConfigError, DataError


def dataset(size: int, first: int = 0) -> TensorDataset:
    """Grey images whose level tells them apart, and labels that count them."""
    labels = torch.arange(first, first + size)
    return TensorDataset(labels.div(1000).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), labels)


def sampler(size, further, micro_batch=4, accumulation=1, rank=0, ranks=1, seed=3, replays=1):
    return DistributedBatchSampler(
        size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        ranks=ranks,
        seed=seed,
        further=further,
        replays=replays,
    )


def global_batches(size, further, micro_batch, accumulation, ranks, epochs=1, replays=1):
    """Plans of each step of some epochs, in the order of their places in the global batch."""
    steps = []
    for epoch in range(epochs):
        per_rank = []
        for rank in range(ranks):
            one = sampler(size, further, micro_batch, accumulation, rank, ranks, replays=replays)
            one.set_position(epoch, 0)
            per_rank.append(list(one.plans()))
        ordered = [plan for together in zip(*per_rank, strict=True) for plan in together]
        slots = accumulation * ranks
        steps += [ordered[i : i + slots] for i in range(0, len(ordered), slots)]
    return steps


def flat(step):
    return [index for plan in step for index in plan.indices]


shares = st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 0.45)), min_size=1, max_size=2)


@settings(deadline=None)
@given(st.integers(8, 60), shares, st.integers(4, 6), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_is_one_pass_over_the_first_part_with_the_others_on_and_on(
    size, parts, micro_batch, accumulation, ranks
):
    further = [FixedShare(n, fraction) for n, fraction in parts]
    total = micro_batch * accumulation * ranks
    counts = [round(part.fraction * total) for part in further]
    if min(counts) < 1 or sum(counts) >= total:
        with pytest.raises(DataError, match="every part needs at least one"):
            sampler(size, further, micro_batch, accumulation, 0, ranks)
        return
    epochs = 3
    steps = global_batches(size, further, micro_batch, accumulation, ranks, epochs)
    per_epoch = len(steps) // epochs
    assert per_epoch == -(-size // (total - sum(counts)))
    starts = np.cumsum([size, *(part.num_samples for part in further)])
    for epoch in range(epochs):
        seen = [
            i for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for i in flat(step)
        ]
        assert sorted(i for i in seen if i < size) == list(range(size))
    for number, (part, count) in enumerate(zip(further, counts, strict=True)):
        start = starts[number]
        walked = []
        for position, step in enumerate(steps):
            own = [i - start for i in flat(step) if start <= i < starts[number + 1]]
            if position % per_epoch < per_epoch - 1:
                assert len(own) == count
                assert len(flat(step)) == total
            walked += own
        # On and on, whole passes, one after the other.
        for first in range(0, len(walked) - part.num_samples + 1, part.num_samples):
            window = walked[first : first + part.num_samples]
            assert sorted(window) == list(range(part.num_samples))


@pytest.mark.parametrize("size", [24, 23, 17])
def test_ranks_may_be_traded_for_accumulation(size):
    further = [FixedShare(11, 0.3), FixedShare(7, 0.2)]
    one, two, three = (
        global_batches(size, further, 2, accumulation, ranks, epochs=3)
        for accumulation, ranks in ((6, 1), (3, 2), (2, 3))
    )
    assert [flat(step) for step in one] == [flat(step) for step in two]
    assert [flat(step) for step in one] == [flat(step) for step in three]
    assert [[p.keys for p in step] for step in one] == [[p.keys for p in step] for step in three]


def test_every_micro_batch_has_its_share():
    further = [FixedShare(1000, 0.7)]
    for step in global_batches(300, further, 10, 2, 3)[:-1]:
        for plan in step:
            assert sum(i >= 300 for i in plan.indices) == 7


def test_the_last_batch_of_an_epoch_keeps_the_shares():
    *_, last = global_batches(25, [FixedShare(99, 0.5)], 20, 1, 1)
    found = flat(last)
    assert (sum(i < 25 for i in found), sum(i >= 25 for i in found)) == (5, 5)


def test_weighted_means_are_those_of_the_global_batch():
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in global_batches(29, [FixedShare(11, 0.4)], 3, 2, 2):
        means = [
            plan.weight * values[list(plan.indices)].mean() if plan.indices else 0 * values[0]
            for plan in step
        ]
        torch.testing.assert_close(
            torch.stack(means).mean(), values[flat(step)].mean(), rtol=1e-12, atol=0
        )


def test_replays_repeat_a_batch_and_walk_no_further():
    further = [FixedShare(11, 0.5)]
    plain = [flat(step) for step in global_batches(20, further, 4, 1, 2, epochs=2)]
    twice = [flat(step) for step in global_batches(20, further, 4, 1, 2, epochs=2, replays=2)]
    assert twice == [batch for batch in plain for _ in range(2)]


def test_a_repeated_image_is_augmented_anew_in_every_pass():
    data = Augmented(Mixture(dataset(32), dataset(4, 500), 0.5), "crop", seed=0)
    loader = DistributedLoader(data, micro_batch=8)
    plans = [plan for _ in range(2) for _ in loader for plan in [loader.plan]]
    keys = [key for plan in plans for key in plan.keys if key.index == 33]
    assert len(keys) == len(set(keys)) == 8 * 2
    assert keys == [SampleKey(p, 33) for p in range(16)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_in_mid_epoch_gives_the_rest(ranks, num_workers):
    data = Mixture(Mixture(dataset(40), dataset(9, 100), 0.25, "a"), dataset(13, 200), 0.25, "b")

    def make(rank):
        return DistributedLoader(
            data, micro_batch=12 // ranks, rank=rank, ranks=ranks, seed=5, num_workers=num_workers
        )

    for rank in range(ranks):
        first, second, other = make(rank), make(rank), make(rank)
        whole = [y.tolist() for _ in range(3) for _, y in other]
        found = []
        for count, (_, y) in enumerate(first):
            found.append(y.tolist())
            if count == 2:
                break
        second.load_state_dict(first.state_dict())
        found += [y.tolist() for _ in range(3) for _, y in second]
        assert found == whole


def test_another_mixture_is_refused_on_resume():
    def state(fraction, size=10):
        data = Mixture(dataset(20), dataset(size), fraction) if fraction else dataset(20)
        return DistributedLoader(data, micro_batch=10)

    saved = state(0.5).state_dict()
    for other, words in (
        (state(0.3), "per_batch_of_part_2: checkpoint 5, this run 3"),
        (state(0.5, 11), "num_samples_of_part_2: checkpoint 10, this run 11"),
        (state(None), "per_batch_of_part_2: checkpoint 5, this run none"),
    ):
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="lacks num_samples_of_part_2"):
        state(0.5).load_state_dict(state(None).state_dict())
    state(0.5).load_state_dict(saved)


def test_the_fingerprint_looks_at_every_part():
    one = Mixture(dataset(1000), dataset(3, 5000), 0.5)
    other = Mixture(dataset(1000), dataset(3, 6000), 0.5)
    shorter = Mixture(dataset(999), dataset(4, 5000), 0.5)
    assert fingerprint(one)["parts"] == [1000, 3]
    assert difference(fingerprint(one), fingerprint(one)) is None
    assert "sample 1000 and 2 more of 67" in difference(fingerprint(one), fingerprint(other))
    assert difference(fingerprint(one), fingerprint(shorter)) == (
        "checkpoint 1000 + 3 samples in parts, this run 999 + 4"
    )


def test_partners_of_mixup_are_of_each_part_as_often_as_in_a_batch():
    mixture = Mixture(dataset(10), dataset(990, 10), 0.3)
    mixed = Mixed(mixture, 1000, mixup=1.0, cutmix=0, seed=0)
    counts = [0, 0]
    for epoch in range(1000):
        _, label = mixed[SampleKey(epoch, 0)]
        partner = max((i for i in label.nonzero().flatten().tolist()), default=0)
        counts[partner >= 10] += 1
    # 1000 draws of probability 0.3: within four standard deviations.
    assert abs(counts[1] - 300) < 58


# ---- dat.data.extra


def write_npz(path: Path, count: int = 30, *, classes: int = 10, names=("x", "y"), side=8, first=0):
    rng = np.random.default_rng(first)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    np.savez(path, **{names[0]: images, names[1]: np.arange(first, first + count) % classes})
    return path


@pytest.mark.parametrize(
    "names", [("x", "y"), ("images", "labels"), ("x_train", "y_train"), ("image", "label")]
)
def test_generated_images_come_from_an_npz_without_a_test_part(tmp_path, names):
    path = write_npz(tmp_path / "a.npz", names=names)
    splits = build_data(
        "digits", augment="crop", extra={"name": "npz", "path": str(path)}, extra_fraction=0.7
    )
    plain = build_data("digits", augment="crop")
    assert splits.num_extra == 30
    assert len(splits.train) == len(plain.train) + 30
    assert len(splits.validation) == len(plain.validation)
    assert splits.mean == plain.mean
    loader = DistributedLoader(splits.train, micro_batch=10)
    for x, _ in loader:
        assert x.shape[1:] == (1, 8, 8)
        assert sum(i >= len(plain.train) for i in loader.plan.indices) == round(0.7 * len(x))


def test_a_folder_of_some_classes_can_be_extra(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train/a", "train/b", "train/c", "test/a", "test/b", "test/c", "more/c", "more/a"):
        (tmp_path / part).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{i}.png")
    splits = build_data(
        "imagefolder",
        path=tmp_path,
        img_size=16,
        validation_fraction=0.25,
        augment="resized_crop_flip",
        extra={"name": "imagefolder", "path": str(tmp_path / "more")},
        extra_fraction=0.5,
    )
    y = [splits.train[i][1] for i in range(len(splits.train))]
    assert y[-8:] == [0] * 4 + [2] * 4
    assert splits.train[len(y) - 1][0].shape == (3, 16, 16)


def test_both_mixtures_go_together(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    splits = build_data(
        "digits",
        labelled_fraction=0.1,
        unlabelled_batch_fraction=0.4,
        extra={"name": "npz", "path": str(path)},
        extra_fraction=0.3,
    )
    loader = DistributedLoader(splits.train, micro_batch=10)
    labelled = splits.mixture.num_labelled
    seen = []
    for _, y in loader:
        extra = [i for i in loader.plan.indices if i >= len(splits.train) - 30]
        seen += [i for i in loader.plan.indices if i < labelled]
        if len(y) == 10:
            assert ((y == -1).sum(), len(extra)) == (4, 3)
    assert sorted(seen) == list(range(labelled))
    assert loader.steps_per_epoch == -(-labelled // 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write_npz(p, side=9), "images of shape .1, 9, 9.* the others have .1, 8, 8."),
        (lambda p: write_npz(p, classes=12), "run from 0 to 11; valid are 0..9"),
        (lambda p: write_npz(p, 0), "dat.data.extra of the dataset 'npz' has no images"),
        (lambda p: np.savez(p, x=np.zeros(3)), "dat.data.extra.path=.* to be trained on it needs"),
        (lambda p: None, "dat.data.extra.path=.* is not a readable npz file"),
    ],
)
def test_extra_images_that_do_not_fit_are_refused(tmp_path, make, words):
    make(tmp_path / "a.npz")
    with pytest.raises(DataError, match=words):
        build_data(
            "digits",
            extra={"name": "npz", "path": str(tmp_path / "a.npz")},
            extra_fraction=0.5,
        )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"extra": {"name": "npz", "path": "a"}}, "dat.data.extra_fraction is missing: "),
        ({"extra_fraction": 0.5}, "dat.data.extra is missing: "),
        ({"extra": {"name": "npz"}, "extra_fraction": 0.5}, "dat.data.extra.path is missing: "),
        (
            {"extra": {"name": "npc", "path": "a"}, "extra_fraction": 0.5},
            "dat.data.extra.name='npc' is not valid (did you mean 'npz'?)",
        ),
        (
            {"extra": {"name": "npz", "path": "a", "augment": "crop"}, "extra_fraction": 0.5},
            "dat.data.extra.augment='crop' is a key of dat.data itself, for all images",
        ),
        (
            {"extra": {"name": "npz", "path": "a", "pth": "b"}, "extra_fraction": 0.5},
            "dat.data.extra has an unknown key: extra.pth (did you mean 'path'?)",
        ),
        (
            {
                "extra": {"name": "npz", "path": "a"},
                "extra_fraction": 0.5,
                "labelled_fraction": 0.5,
                "unlabelled_batch_fraction": 0.5,
            },
            "leave no other image in a batch",
        ),
        (
            {
                "labelled_fraction": 0.5,
                "unlabelled_batch_fraction": 0.5,
                "labelled_repeats": 2,
            },
            "dat.data.labelled_repeats=2 beside unlabelled_batch_fraction=0.5",
        ),
        ({"unlabelled_batch_fraction": 0.5}, "concerns unlabelled images"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(ConfigError) as caught:
        load_config(
            {
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "dat": {
                    "data": {"name": "digits", **keys},
                    "objective": {"name": "trades"},
                },
            }
        )
    assert words in str(caught.value)


def test_an_empty_unlabelled_set_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(DataError, match="holds no image"):
        build_data("digits", unlabelled_path=tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"labelled_fraction=0\.9999 .*no image without a label"):
        build_data("digits", labelled_fraction=0.9999)


def test_without_further_parts_plans_are_as_they_were():
    order = torch.randperm(10, generator=seeded_generator("order", 3, 0))
    (plan, *_) = sampler(10, []).plans()
    assert (plan.indices, plan.passes) == (tuple(order[:4].tolist()), ())
