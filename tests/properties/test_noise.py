"""Claims about the counter-based random numbers: pure, independent, well distributed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dat_ds.attacks import NORMS, SampleGenerator, ThreatModel
from dat_ds.attacks.noise import (
    _GOLDEN_GAMMA,
    _MASK,
    _mix,
    _mix_tensor_,
    _signed,
    rand_like,
    randn_like,
    stream_key,
)

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
DRAWS = [rand_like, randn_like]
int64s = st.integers(-(2**63), 2**63 - 1)


def images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(batch, 3, 4, 5, dtype=dtype)


@settings(max_examples=200, deadline=None)
@given(st.lists(int64s, min_size=1, max_size=20))
def test_the_tensor_mixer_equals_the_python_integer_mixer(values):
    mixed = _mix_tensor_(torch.tensor(values, dtype=torch.int64)).tolist()
    assert mixed == [_signed(_mix(value)) for value in values]


@pytest.mark.parametrize("value", [0, 1, -1, 2**63 - 1, -(2**63), -(2**62), 1 << 30, -(1 << 31)])
def test_the_mixers_agree_at_the_ends_of_the_range(value):
    assert _mix_tensor_(torch.tensor([value])).item() == _signed(_mix(value))


def test_the_python_mixer_is_splitmix64():
    # First outputs of the reference splitmix64.c (Vigna, prng.di.unimi.it) for state 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + _GOLDEN_GAMMA) & _MASK
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("split", [[4, 4], [1] * 8, [3, 5], [7, 1]])
def test_the_numbers_do_not_depend_on_how_the_batch_is_split(draw, split):
    whole = SampleGenerator(7, 3)
    expected = [draw(images(8), whole) for _ in range(2)]
    first = 0
    for size in split:
        part = SampleGenerator(7, 3, first_index=first)
        for numbers in expected:  # the second draw as well
            assert torch.equal(draw(images(size), part), numbers[first : first + size])
        first += size


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_do_not_depend_on_how_the_batch_is_split(norm):
    threat, x = ThreatModel(norm, 0.1), torch.full((6, 1, 3, 3), 0.5)
    whole = threat.random_start(x, SampleGenerator(1, 2, first_index=10))
    tail = threat.random_start(x[4:], SampleGenerator(1, 2, first_index=14))
    assert torch.equal(whole[4:], tail)


@pytest.mark.parametrize("draw", DRAWS)
def test_seed_step_index_and_draw_each_change_every_sample(draw):
    base = SampleGenerator(7, 3, first_index=0)
    reference = draw(images(4), base)
    others = {
        "draw": draw(images(4), base),
        "seed": draw(images(4), SampleGenerator(8, 3)),
        "step": draw(images(4), SampleGenerator(7, 4)),
        "index": draw(images(4), SampleGenerator(7, 3, first_index=4)),
    }
    for name, other in others.items():
        # Two of 2^23 values agree by chance with probability 1e-7; 240 pairs are compared.
        assert (other != reference).all(), name


def test_swapping_seed_and_step_changes_the_numbers():
    assert stream_key(3, 7, 0, 0) != stream_key(7, 3, 0, 0)
    assert stream_key(0, 1) != stream_key(1, 0)
    assert stream_key(0) != stream_key(0, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(int64s, min_size=1, max_size=4))
def test_a_derived_seed_is_a_63_bit_number(parts):
    assert 0 <= stream_key(*parts) < 2**63


def test_ten_thousand_derived_seeds_are_distinct():
    seeds = {stream_key(0, step, index, 0) for step in range(100) for index in range(100)}
    assert len(seeds) == 10_000


def test_keys_are_hashes_of_seed_step_index_and_draw():
    for indices in (range(5, 9), [3, 70_000, 0, 12]):
        first = indices[0] if isinstance(indices, range) else 0
        source = SampleGenerator(-3, 11, first, None if isinstance(indices, range) else indices)
        for draw in range(3):
            expected = [stream_key(-3, 11, index, draw) for index in indices]
            assert source.keys(4).tolist() == expected
        assert source.num_draws == 3


def test_a_draw_for_more_samples_than_indices_is_refused():
    with pytest.raises(ValueError, match="A draw for 3 samples of a batch of 2"):
        SampleGenerator(0, 0, indices=[4, 7]).keys(3)


def uniforms(batch: int, numel: int, seed: int = 0) -> Tensor:
    like = torch.empty(batch, numel, dtype=torch.float64)
    return rand_like(like, SampleGenerator(seed, 0))


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution():
    u = uniforms(200, 500)
    n = u.numel()
    # k-th raw moment 1/(k+1), variance 1/(2k+1) - 1/(k+1)^2; five standard errors each.
    for k in (1, 2, 3, 4):
        error = math.sqrt((1 / (2 * k + 1) - 1 / (k + 1) ** 2) / n)
        assert abs((u**k).mean() - 1 / (k + 1)) < 5 * error


@pytest.mark.parametrize("seed", [0, 1, -5])
@pytest.mark.parametrize("shape", [(1, 40_000), (2_000, 20)])
def test_uniform_numbers_fill_sixteen_bins_evenly(seed, shape):
    counts = torch.histc(uniforms(*shape, seed=seed), bins=16, min=0, max=1)
    expected = math.prod(shape) / 16
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 44.3  # 15 degrees of freedom, exceeded with p = 1e-4
    assert chi_square > 1.7  # and too even with p = 1e-5


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_neighbouring_elements_samples_draws_and_steps_are_uncorrelated():
    like = torch.empty(100, 200, dtype=torch.float64)
    generator = SampleGenerator(0, 0)
    first, second = rand_like(like, generator), rand_like(like, generator)
    later = rand_like(like, SampleGenerator(0, 1))
    bound = 5 / math.sqrt(99 * 199)  # five standard errors
    assert abs(correlation(first[:, 1:], first[:, :-1])) < bound
    assert abs(correlation(first[1:], first[:-1])) < bound
    assert abs(correlation(first, second)) < bound
    assert abs(correlation(first, later)) < bound


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    z = randn_like(torch.empty(200, 500, dtype=torch.float64), SampleGenerator(0, 0))
    # Moments 0, 1, 0, 3, whose variances are 1, 2, 15, 96; five standard errors each.
    for k, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**k).mean() - moment) < 5 * math.sqrt(variance / z.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [0, -1, 2**63 - 1, -(2**63)])
def test_even_extreme_bits_give_numbers_strictly_inside_the_unit_interval(dtype, bits, monkeypatch):
    monkeypatch.setattr(
        SampleGenerator, "bits", lambda self, b, n, d: torch.full((b, n), bits, dtype=torch.int64)
    )
    u = rand_like(images(2, dtype), SampleGenerator(0, 0))
    assert u.min() > 0
    assert u.max() < 1
    assert randn_like(images(2, dtype), SampleGenerator(0, 0)).isfinite().all()


@pytest.mark.parametrize("draw", DRAWS)
def test_float64_images_get_the_same_numbers_in_float64(draw):
    single = draw(images(3), SampleGenerator(1, 1))
    double = draw(images(3, torch.float64), SampleGenerator(1, 1))
    assert double.dtype == torch.float64
    # Uniforms are equal; Box-Muller differs by float32 rounding of log and cos of values below 6.
    assert_close(single.double(), double, rtol=0, atol=0 if draw is rand_like else 1e-5)


@pytest.mark.parametrize("draw", DRAWS)
def test_neither_source_touches_the_global_generator(draw):
    state = torch.get_rng_state()
    draw(images(2), SampleGenerator(0, 0))
    draw(images(2), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_torch_generator_gives_its_own_numbers(draw):
    expected = {rand_like: torch.rand, randn_like: torch.randn}[draw](
        3, 3, 4, 5, generator=torch.Generator().manual_seed(4)
    )
    assert torch.equal(draw(images(3), torch.Generator().manual_seed(4)), expected)


@pytest.mark.parametrize("draw", DRAWS)
def test_an_empty_batch_gets_no_numbers(draw):
    assert draw(images(0), SampleGenerator(0, 0)).shape == (0, 3, 4, 5)


def test_bits_of_all_64_positions_are_balanced():
    bits = SampleGenerator(0, 0).bits(10, 1000, CPU)
    for position in range(64):
        share = ((bits >> position) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(bits.numel()), position


def test_streams_have_nothing_in_common_whatever_the_seeds():
    """Of 0.1, where streams were shifts of the seed, seed 0's views were seed 2's starts."""
    streams = ("start", "probe", "views", "evaluation pgd-20")
    keys = {
        (stream, seed, step): tuple(SampleGenerator(seed, step, stream=stream).keys(4).tolist())
        for stream in streams
        for seed in range(5)
        for step in range(5)
    }
    assert len(set(keys.values())) == len(keys)
    everything = [key for found in keys.values() for key in found]
    assert len(set(everything)) == len(everything)


def test_starts_are_those_of_version_0_1():
    keys = SampleGenerator(-3, 11).keys(2).tolist()
    assert keys == [stream_key(-3, 11, index, 0) for index in range(2)]
