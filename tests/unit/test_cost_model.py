"""The cost model against closed forms."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dat_ds.bench.prediction.cost_model import (
    COLLECTIVES,
    Cluster,
    Hardware,
    Link,
    Workload,
    codec_entries,
    collective_seconds,
    crossing_mbit,
    fit_link,
    link_error,
    non_negative_fit,
    same_link,
    step_time,
)
from dat_ds.compression import CODECS, build_codec

pytestmark = pytest.mark.fast

LINK = Link(alpha=1e-4, beta=8e-8)  # 100 us, 100 Mbit/s
FAST = Link(alpha=1e-6, beta=1e-10)
P, K, B = 10_000_000, 3, 16
GPU = Hardware(forward=1e-3, optimizer=1e-9)


def flat(ranks: int, link: Link = LINK) -> Cluster:
    return Cluster(ranks, 1, same_link(link), same_link(FAST))


def work(**changes: object) -> Workload:
    return dataclasses.replace(Workload(P, K, B), **changes)


def gradients(cluster: Cluster, **changes: object) -> float:
    return step_time(work(**changes), GPU, cluster).gradients


def test_a_link_is_written_as_people_say_it() -> None:
    link = Link.of(mbit=100, microseconds=100)
    assert (link.alpha, link.beta) == pytest.approx((1e-4, 8e-8))
    assert link.mbit == pytest.approx(100)


@pytest.mark.parametrize(("collective", "halves"), zip(COLLECTIVES, (2, 1, 1, 1), strict=True))
def test_collectives_are_those_of_rings(collective: str, halves: int) -> None:
    n, p = 4e6, 5
    seconds = collective_seconds(collective, n, p, LINK)
    assert seconds == pytest.approx(halves * (4 * 1e-4 + 4 / 5 * n * 8e-8))
    assert collective_seconds(collective, n, 1, LINK) == 0
    # With ever more ranks the bandwidth's part tends to the whole tensor, once for every half.
    no_latency = Link(0.0, LINK.beta)
    assert collective_seconds(collective, n, 10**9, no_latency) == pytest.approx(
        halves * n * LINK.beta
    )
    many = collective_seconds(collective, n, p, LINK, calls=10)
    assert many - seconds == pytest.approx(halves * 9 * 4 * 1e-4)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    parts = [collective_seconds(c, 1e6, 8, LINK) for c in ("reduce_scatter", "all_gather")]
    assert collective_seconds("all_reduce", 1e6, 8, LINK) == pytest.approx(sum(parts))


def test_one_rank_computes_and_sends_nothing() -> None:
    for codec in ("none", *CODECS, "one_bit_adam"):
        parts = step_time(work(codec=codec), GPU, flat(1))
        assert parts.attack == pytest.approx(2 * K * B * 1e-3)
        assert parts.update == pytest.approx(3 * B * 1e-3)
        assert parts.total == pytest.approx((2 * K + 3) * B * 1e-3 + P * 1e-9)
        assert (parts.codec, parts.gradients, parts.parameters) == (0, 0, 0)


def test_computation_is_2k_plus_3_forwards() -> None:
    fixed = Hardware(forward=1e-3, forward_fixed=5e-3, overhead=1.2, slowdown=2)
    parts = step_time(work(accumulation=4), fixed, flat(1))
    assert parts.total == pytest.approx(2 * 1.2 * 4 * (2 * K + 3) * (5e-3 + B * 1e-3))
    natural = step_time(work(attack_steps=0), fixed, flat(1))
    assert natural.attack == 0


def test_twice_the_bandwidth_halves_what_bytes_take() -> None:
    slow, fast = (flat(8, Link(0.0, beta)) for beta in (8e-8, 4e-8))
    for stage in range(4):
        one, other = (step_time(work(zero_stage=stage), GPU, c) for c in (slow, fast))
        assert one.gradients == pytest.approx(2 * other.gradients)
        assert one.parameters == pytest.approx(2 * other.parameters)
        assert one.attack == other.attack


def test_stages_send_what_zero_sends() -> None:
    cluster, whole = flat(4), 4 * P
    reduced = collective_seconds("all_reduce", whole, 4, LINK)
    half = collective_seconds("all_gather", whole, 4, LINK)
    found = {s: step_time(work(zero_stage=s), GPU, cluster) for s in range(4)}
    assert [found[s].gradients for s in range(4)] == pytest.approx([reduced] * 3 + [half])
    assert [found[s].parameters for s in range(4)] == pytest.approx([0, half, half, 2 * half])
    assert found[0].optimizer == pytest.approx(4 * found[1].optimizer), "a share of the entries"


def test_zero_3_gathers_once_for_the_attack_or_in_each_of_its_steps() -> None:
    half = collective_seconds("all_gather", 4 * P, 4, LINK)
    for resident, gathers in ((True, 2), (False, K + 1)):
        parts = step_time(work(zero_stage=3, resident=resident), GPU, flat(4))
        assert parts.parameters == pytest.approx(gathers * half)
    assert work(zero_stage=3, attack_steps=0).gathers == 1
    assert work(zero_stage=3, accumulation=2).gathers == 4
    assert work(zero_stage=3, num_parameters=2 * 10**9).gathers == 3, "backward gathers again"


def test_accumulation_reduces_once_below_stage_2_and_every_time_from_there() -> None:
    assert [work(zero_stage=s, accumulation=4).reductions for s in range(4)] == [1, 1, 4, 4]
    once, often = (gradients(flat(4), zero_stage=2, accumulation=n) for n in (1, 4))
    assert often == pytest.approx(4 * once)


def test_sides_and_codecs_send_their_payloads() -> None:
    cluster = flat(4, Link(0.0, 8e-8))
    share = 3 / 4 * 8e-8
    entry = build_codec("int8").bytes_of(2**20) / 2**20
    assert gradients(cluster, codec="int8") == pytest.approx(2 * share * entry * P)
    single = gradients(cluster, codec="int8", sides="single")
    assert single == pytest.approx(share * (entry + 4) * P)
    third = step_time(work(codec="int8", sides="single", zero_stage=3), GPU, cluster)
    assert third.gradients == pytest.approx(share * entry * P)
    assert third.parameters == pytest.approx(2 * share * 4 * P)
    double = step_time(work(codec="int8", zero_stage=3), GPU, cluster)
    assert double.parameters == pytest.approx(2 * share * entry * P)


def test_after_the_freeze_one_bit_an_entry_travels() -> None:
    cluster = flat(4, Link(0.0, 8e-8))
    ratio = gradients(cluster, codec="one_bit_adam") / gradients(cluster)
    assert ratio == pytest.approx((1 + 32 / 1024) / 32)


def test_codecs_work_on_what_is_sent_and_received() -> None:
    assert codec_entries(work(), 4) == (0, 0)
    assert codec_entries(work(codec="int8"), 4) == pytest.approx((1.25 * P, 2 * P))
    assert codec_entries(work(codec="int8", sides="single"), 4) == pytest.approx((P, P))
    assert codec_entries(work(codec="topk"), 4) == pytest.approx((1.25 * P, 3 * P))
    assert codec_entries(work(codec="one_bit_adam"), 4) == pytest.approx((1.25 * P, 3 * P))
    assert codec_entries(work(codec="int8", zero_stage=3), 4) == pytest.approx((P, P))
    hardware = Hardware(1e-3, encode={"int8": 2e-9}, decode={"int8": 3e-9}, slowdown=2)
    parts = step_time(work(codec="int8"), hardware, flat(4))
    assert parts.codec == pytest.approx(2 * (1.25 * 2e-9 + 2 * 3e-9) * P)
    gathers = step_time(work(codec="int8", zero_stage=3), hardware, flat(4)).codec
    assert gathers == pytest.approx(2 * ((1 + 2 / 4) * 2e-9 + (1 + 2) * 3e-9) * P)


def test_machines_of_several_gpus_cross_their_link_once_a_half() -> None:
    cluster = Cluster(4, 8, same_link(LINK), same_link(FAST))
    n = 4e6
    inside = collective_seconds("all_reduce", n, 8, FAST)
    between = collective_seconds("all_reduce", n, 4, LINK)
    assert cluster.seconds("all_reduce", n) == pytest.approx(inside + between)
    assert cluster.ranks == 32
    # Pairwise, each of 8 GPUs sends 24 of 32 parts through the machine's one link.
    alone = Cluster(4, 8, same_link(Link(0.0, 8e-8)), same_link(Link(0.0, 0.0)))
    assert alone.seconds("all_to_all", n) == pytest.approx(8 * 24 / 32 * n * 8e-8)
    for shape, link in (((1, 8), FAST), ((8, 1), LINK)):
        flat_one = Cluster(*shape, same_link(LINK), same_link(FAST))
        for collective in COLLECTIVES:
            assert flat_one.seconds(collective, n) == pytest.approx(
                collective_seconds(collective, n, 8, link)
            )


def test_a_link_is_recovered_from_timed_collectives() -> None:
    sizes = [4**e for e in range(6, 13)]
    for collective in COLLECTIVES:
        samples = [(n, collective_seconds(collective, n, 4, LINK)) for n in sizes]
        found = fit_link(collective, 4, samples)
        assert (found.alpha, found.beta) == pytest.approx((LINK.alpha, LINK.beta))
        assert link_error(collective, 4, samples, found) == pytest.approx(0, abs=1e-9)


def test_a_size_that_a_buffer_swallows_does_not_bend_the_fit() -> None:
    sizes = [4**e for e in range(6, 13)]
    samples = [(n, collective_seconds("all_reduce", n, 2, LINK)) for n in sizes]
    samples[2] = (samples[2][0], samples[2][1] / 10)
    found = fit_link("all_reduce", 2, samples)
    assert (found.alpha, found.beta) == pytest.approx((LINK.alpha, LINK.beta))


def test_coefficients_are_fitted_and_none_is_negative() -> None:
    rows = [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [3.0, 1.0, 1.0]]
    truth = [2.0, 0.5, 0.25]
    targets = [sum(a * c for a, c in zip(row, truth, strict=True)) for row in rows]
    assert non_negative_fit(rows, targets, targets) == pytest.approx(truth)
    # (1, -1) fits exactly; without negative numbers the best is (a, 0): a = 6 / 5 - 2 / 5.
    found = non_negative_fit([[1.0, 1.0], [2.0, 1.0]], [0.0, 1.0], [1.0, 1.0])
    assert found == pytest.approx([2 / 5, 0])
    assert non_negative_fit([[1.0, 0.0], [2.0, 0.0]], [1.0, 2.0], [1.0, 1.0]) == [1, 0]


def test_at_the_crossing_bandwidth_float32_takes_a_tenth_longer() -> None:
    costs = dict.fromkeys(CODECS, 1e-10)
    hardware = dataclasses.replace(GPU, encode=costs, decode=costs)
    shape = {"machines": 16, "gpus": 1, "inside": same_link(FAST), "alpha": 5e-5}
    coded = work(codec="int8")
    mbit = crossing_mbit(work(), coded, hardware, **shape)
    assert mbit is not None
    cluster = flat(16, Link.of(mbit=mbit, microseconds=50))
    ratio = step_time(work(), hardware, cluster).total / step_time(coded, hardware, cluster).total
    assert ratio == pytest.approx(1.1)
    assert crossing_mbit(work(), work(), hardware, **shape) == 0, "no different from itself"
    slower = crossing_mbit(
        work(attack_steps=0), work(codec="int8", attack_steps=0), hardware, **shape
    )
    assert slower is not None
    assert slower > mbit, "a step that computes less hides less"
    nothing = Hardware(forward=0.0)
    free_latency = {**shape, "alpha": 0.0}
    assert crossing_mbit(work(), coded, nothing, **free_latency) is None
    assert math.isfinite(mbit)
