"""Claims about plans of batches: every sample once, the same global batches on any ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dat_ds.data import DistributedBatchSampler, SampleKey, hold_out, plan_step, shard_evenly
from dat_ds.errors import DataError

pytestmark = pytest.mark.fast


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
