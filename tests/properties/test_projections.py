"""Claims about projections onto norm balls and about threat models, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dat_ds.attacks import (
    NORMS,
    SampleGenerator,
    ThreatModel,
    project_l1,
    project_l1_box,
    project_l2,
    project_linf,
)

pytestmark = pytest.mark.fast

PROJECTIONS = {"linf": project_linf, "l2": project_l2, "l1": project_l1}
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
DUALS = {"linf": 1, "l2": 2, "l1": math.inf}
# A projection takes a handful of float64 roundings of numbers below 100: 1e-13 is ample.
TIGHT = {"rtol": 1e-13, "atol": 1e-13}

seeds = st.integers(0, 2**32)
radii = st.floats(1e-3, 10.0)
norms = st.sampled_from(NORMS)
few = settings(max_examples=40, deadline=None)


def noise(seed: int, *shape: int) -> Tensor:
    """Normal float64 numbers; not from the source under test."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pixels(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform pixels in [0, 1], with some of them exactly at either end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype).mul(1.4).sub(0.2).clamp(0, 1)


def lengths(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=ORDERS[norm], dim=1)


def with_length(delta: Tensor, norm: str, length: float) -> Tensor:
    return delta / lengths(delta, norm).view(-1, 1, 1, 1) * length


@few
@given(seeds, radii, norms, st.floats(0.0, 0.999))
def test_a_point_inside_is_returned_bit_for_bit(seed, eps, norm, share):
    inside = with_length(noise(seed, 3, 2, 3, 3), norm, share * eps)
    assert torch.equal(PROJECTIONS[norm](inside, eps), inside)


@few
@given(seeds, radii, norms, st.floats(1.001, 100.0))
def test_a_point_outside_lands_on_the_sphere(seed, eps, norm, factor):
    outside = with_length(noise(seed, 3, 2, 3, 3), norm, factor * eps)
    landed = lengths(PROJECTIONS[norm](outside, eps), norm)
    assert_close(landed, torch.full_like(landed, eps), **TIGHT)


@few
@given(seeds, radii, norms)
def test_a_point_on_the_sphere_stays_there(seed, eps, norm):
    boundary = with_length(noise(seed, 3, 2, 3, 3), norm, eps)
    assert_close(PROJECTIONS[norm](boundary, eps), boundary, **TIGHT)


@few
@given(seeds, radii, norms, st.floats(0.1, 10.0))
def test_projecting_twice_is_projecting_once(seed, eps, norm, scale):
    once = PROJECTIONS[norm](noise(seed, 4, 2, 3, 3) * scale, eps)
    assert_close(PROJECTIONS[norm](once, eps), once, **TIGHT)


@few
@given(seeds, radii, norms)
def test_no_feasible_point_is_nearer_than_the_projection(seed, eps, norm):
    delta = noise(seed, 1, 1, 2, 3) * 2 * eps
    projected = PROJECTIONS[norm](delta, eps)
    rivals = noise(seed + 1, 500, 1, 2, 3)
    rivals = with_length(rivals, norm, eps)
    rivals[::2] = 0.999 * projected + 0.001 * rivals[::2]  # many of them close by (ball is convex)
    distance = lengths(projected - delta, "l2")
    assert (lengths(rivals - delta, "l2") >= distance - 1e-12 * eps).all()


@few
@given(seeds, st.floats(0.05, 3.0), st.floats(0.1, 10.0))
def test_the_l1_projection_within_a_box_solves_its_optimality_conditions(seed, eps, scale):
    delta, low = noise(seed, 4, 1, 3, 3) * scale, -pixels(seed + 1, 4, 1, 3, 3)
    high = low + 1
    projected = project_l1_box(delta, eps, low, high)
    assert (lengths(projected, "l1") <= eps + 1e-12).all()
    assert (projected >= low).all()
    assert (projected <= high).all()
    for d, u, lo, hi in zip(delta, projected, low, high, strict=True):
        # u_i = clip(d_i shrunk by lam) for one lam >= 0, which is 0 unless the ball binds: found
        # here by bisection, an independent way.
        shrunk = lambda lam, d=d, lo=lo, hi=hi: (  # noqa: E731
            (d.abs() - lam).clamp_min(0).copysign(d).clamp(lo, hi)
        )
        left, right = 0.0, float(d.abs().max())
        if shrunk(0.0).abs().sum() > eps:
            for _ in range(100):
                middle = (left + right) / 2
                is_long = shrunk(middle).abs().sum() > eps
                left, right = (middle, right) if is_long else (left, middle)
        assert_close(u, shrunk(left), rtol=0, atol=1e-11)


def test_the_l1_projection_of_3_minus_1_onto_a_ball_of_2_is_2_0():
    projected = project_l1(torch.tensor([[3.0, -1.0], [1.5, -1.5]], dtype=torch.float64), 2.0)
    expected = torch.tensor([[2.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    assert_close(projected, expected, **TIGHT)


@few
@given(seeds, norms)
def test_the_distance_is_the_norm_of_the_difference(seed, norm):
    x, x_adv = pixels(seed, 3, 1, 2, 2), pixels(seed + 1, 3, 1, 2, 2)
    assert_close(ThreatModel(norm, 0.1).distance(x_adv, x), lengths(x_adv - x, norm), **TIGHT)


def test_the_l2_projection_of_3_4_onto_the_unit_ball_is_06_08():
    projected = project_l2(torch.tensor([[3.0, 4.0]], dtype=torch.float64), 1.0)
    assert_close(projected, torch.tensor([[0.6, 0.8]], dtype=torch.float64), **TIGHT)


def test_the_linf_projection_clips_each_entry_alone():
    projected = project_linf(torch.tensor([[3.0, -4.0, 0.25]]), 0.5)
    assert torch.equal(projected, torch.tensor([[0.5, -0.5, 0.25]]))


@pytest.mark.parametrize("norm", NORMS)
def test_samples_are_projected_independently(norm):
    batch = noise(0, 5, 1, 2, 2) * torch.tensor([0.0, 0.1, 1, 10, 100]).view(-1, 1, 1, 1)
    alone = torch.cat([PROJECTIONS[norm](sample[None], 0.7) for sample in batch])
    assert torch.equal(PROJECTIONS[norm](batch, 0.7), alone)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero_and_a_zero_radius_gives_zero(norm, dtype):
    zero = torch.zeros(2, 3, 2, 2, dtype=dtype)
    assert torch.equal(PROJECTIONS[norm](zero, 0.5), zero)
    assert torch.equal(PROJECTIONS[norm](zero, 0.0), zero)
    assert not PROJECTIONS[norm](torch.ones_like(zero), 0.0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_the_input_of_a_projection_is_left_alone(norm):
    delta = noise(3, 2, 1, 2, 2)
    copy = delta.clone()
    PROJECTIONS[norm](delta, 0.1)
    assert torch.equal(delta, copy)


# ---- ThreatModel


@few
@given(seeds, st.floats(0.0, 1.0), norms, st.floats(0.0, 3.0))
def test_projected_images_lie_in_the_ball_and_in_the_box(seed, eps, norm, scale):
    threat, x = ThreatModel(norm, eps), pixels(seed, 3, 2, 3, 3)
    x_adv = threat.project(x + scale * noise(seed + 1, 3, 2, 3, 3), x)
    assert (lengths(x_adv - x, norm) <= eps + 1e-13).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_an_allowed_image_is_projected_onto_itself(norm):
    threat, x = ThreatModel(norm, 0.5), pixels(0, 3, 1, 3, 3)
    allowed = (x + with_length(noise(1, 3, 1, 3, 3), norm, 0.49)).clamp(0, 1)
    assert_close(threat.project(allowed, x), allowed, **TIGHT)


def test_the_linf_projection_is_the_nearest_allowed_image():
    threat, x = ThreatModel("linf", 0.3), pixels(0, 1, 1, 2, 2)
    candidate = x + noise(1, 1, 1, 2, 2)
    projected = threat.project(candidate, x)
    rivals = (x + 0.6 * (pixels(2, 2000, 1, 2, 2) - 0.5)).clamp(0, 1)
    nearest = lengths(rivals - candidate, "l2").min()
    assert lengths(projected - candidate, "l2").item() <= nearest.item() + 1e-13


@few
@given(seeds, norms)
def test_the_projector_overwrites_its_argument_with_the_projection(seed, norm):
    threat, x = ThreatModel(norm, 0.2, lower=-1.0, upper=2.0), pixels(seed, 2, 1, 3, 3)
    candidate = x + noise(seed + 1, 2, 1, 3, 3)
    x_before, expected = x.clone(), threat.project(candidate, x)
    returned = threat.projector(x)(candidate)
    assert returned is candidate
    assert torch.equal(candidate, expected)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("norm", NORMS)
def test_project_leaves_its_arguments_alone(norm):
    x, candidate = pixels(0, 2, 1, 2, 2), noise(1, 2, 1, 2, 2)
    copies = x.clone(), candidate.clone()
    ThreatModel(norm, 0.1).project(candidate, x)
    assert torch.equal(x, copies[0])
    assert torch.equal(candidate, copies[1])


def generators(seed: int) -> list[torch.Generator | SampleGenerator]:
    return [torch.Generator().manual_seed(seed), SampleGenerator(seed, 0)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.9])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_random_start_is_in_the_ball_and_in_the_box(norm, eps, kind):
    x = pixels(0, 20, 3, 4, 4, dtype=torch.float32)
    start = ThreatModel(norm, eps).random_start(x, generators(5)[kind])
    assert start.dtype == torch.float32
    # Rounding of x + delta in float32 moves an entry by at most 2^-24 (pixels are below 1), which
    # adds at most sqrt(48) * 2^-24 = 4.2e-7 to the l2 norm and 48 * 2^-24 = 2.9e-6 to the l1 norm.
    assert (lengths((start.double() - x.double()), norm) <= eps + 3e-6).all()
    assert start.min() >= 0
    assert start.max() <= 1
    assert (eps == 0) == torch.equal(start, x)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_linf_start_is_uniform_in_each_pixel_with_mean_zero(kind):
    eps, count = 0.25, 20_000
    x = torch.full((count, 1, 1, 1), 0.5, dtype=torch.float64)
    delta = (ThreatModel("linf", eps).random_start(x, generators(1)[kind]) - x).flatten()
    assert abs(delta.mean()) < 5 * eps / math.sqrt(3 * count)  # 5 standard errors
    assert kolmogorov(delta, lambda d: (d / eps + 1) / 2) < 2.0  # exceeded with p = 7e-4


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dimension", [1, 2, 12])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_start_has_a_uniform_length_and_a_uniform_direction(kind, dimension, norm):
    eps, count = 0.25, 5_000
    x = torch.full((count, dimension, 1, 1), 0.5, dtype=torch.float64)
    delta = ThreatModel(norm, eps).random_start(x, generators(2)[kind]) - x
    share = lengths(delta, norm) / eps
    assert kolmogorov(share, lambda r: r) < 2.0  # exceeded with p = 7e-4
    direction = (delta / lengths(delta, norm).view(-1, 1, 1, 1)).flatten(1)
    # Second moments of a uniform direction: 1 / d on the l2 sphere, 2 / (d (d + 1)) on the l1 one.
    moment = {"l2": 1 / dimension, "l1": 2 / (dimension * (dimension + 1))}[norm]
    assert (direction.mean(0).abs() < 5 * math.sqrt(moment / count)).all()
    found = direction.square().mean(0)
    assert_close(found, torch.full_like(found, moment), rtol=0.15, atol=0)


def kolmogorov(sample: Tensor, cdf) -> float:
    """Kolmogorov's statistic: sqrt(n) times the largest distance of the distribution functions."""
    n = len(sample)
    expected = cdf(sample.sort().values)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((expected - grid[:-1]).abs().max(), (expected - grid[1:]).abs().max())
    return float(gap) * math.sqrt(n)


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_start_of_an_empty_batch_is_empty(norm):
    for generator in generators(0):
        start = ThreatModel(norm, 0.1).random_start(torch.zeros(0, 3, 2, 2), generator)
        assert start.shape == (0, 3, 2, 2)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_generator_starts_differ_and_the_global_generator_is_untouched(norm):
    x, state = torch.full((2, 1, 4, 4), 0.5), torch.get_rng_state()
    threat = ThreatModel(norm, 0.1)
    assert not torch.equal(threat.random_start(x), threat.random_start(x))
    assert torch.equal(torch.get_rng_state(), state)


@few
@given(seeds, norms, st.floats(-30, 30))
def test_the_steepest_direction_has_unit_length_and_ascends_most(seed, norm, log_scale):
    gradient = noise(seed, 3, 2, 3, 3) * 10.0**log_scale
    direction = ThreatModel(norm, 0.1).steepest(gradient.clone())
    length = lengths(direction, norm)
    assert_close(length, torch.ones_like(length), **TIGHT)
    # The dual norm is what a unit step can gain at most: l1 for l-infinity, l2 for l2. For l1 that
    # is the largest entry, which is all that moves of so few.
    gain = (direction * gradient).flatten(1).sum(1)
    dual = torch.linalg.vector_norm(gradient.flatten(1), ord=DUALS[norm], dim=1)
    assert_close(gain, dual, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_of_a_zero_gradient_is_zero(norm):
    assert not ThreatModel(norm, 0.1).steepest(torch.zeros(2, 1, 2, 2)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l7", 0.1), r"norm='l7' is not one of linf, l2, l1\."),
        (("linf", 8), r"eps=8 exceeds the pixel range .* write '8/255'"),
        (("linf", -0.1), r"eps=-0\.1 must be a finite number of at least 0"),
        (("l2", math.inf), r"eps=inf must be a finite number"),
        (("l2", math.nan), r"eps=nan must be a finite number"),
        (("linf", 0.1, 1.0, 1.0), r"lower=1\.0 must be below upper=1\.0"),
    ],
)
def test_an_impossible_threat_model_is_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(*arguments)


def test_a_full_range_linf_ball_and_an_l2_ball_beyond_one_are_allowed():
    assert ThreatModel("linf", 255, upper=255).eps == 255
    assert ThreatModel("l2", 8).eps == 8
