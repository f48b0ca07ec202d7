"""Compressed averages over 2 and 3 ranks: close to the mean, the same everywhere, few bytes."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.compression import CODECS, CompressedAllReduce, CompressedReduceScatter, build_codec
from dat_ds.traffic import kind_of_traffic
from tests.distributed.harness import run_ranks

ODD = 10_007
SIZES = (0, 1, 2, 5, ODD)
SIDES = ("single", "double")
LARGE, DRAWS = 120_000, 36
SHAPES = ((3,), (5, 7), (0,), (1,), (4, 4))


def own(size: int, rank: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + rank))


def mean(size: int, ranks: int, seed: int = 0) -> Tensor:
    return torch.stack([own(size, rank, seed) for rank in range(ranks)]).mean(dim=0)


def averages() -> dict[Any, Tensor]:
    """Of every codec, size and side: the first average, and the mean over many steps."""
    report = {}
    for name in CODECS:
        for size in SIZES:
            for sides in SIDES:
                reduce = CompressedAllReduce(size, build_codec(name), sides=sides)
                tensor = own(size, reduce.rank)
                draws = [reduce(tensor, step) for step in range(DRAWS if size == ODD else 4)]
                assert torch.equal(tensor, own(size, reduce.rank))
                report[name, size, sides] = draws[0], torch.stack(draws).mean(dim=0)
    return report


def exact_codec() -> Any:
    """Keeps every entry: what is left is the layout."""
    return build_codec("topk", ratio=1.0, block_size=4)


def layouts() -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = [CompressedAllReduce(size, exact_codec())(own(size, rank), 0) for size in SIZES]
    sizes = [math.prod(shape) for shape in SHAPES]
    tensors = [own(size, rank).view(shape) for size, shape in zip(sizes, SHAPES, strict=True)]
    return {
        "whole": [
            (ours - mean(n, ranks)).abs().sum() for ours, n in zip(whole, SIZES, strict=True)
        ],
        "shares": CompressedReduceScatter(sizes, exact_codec())(tensors, 0),
    }


def traffic() -> dict[Any, Any]:
    from dat_ds.engine.traffic import Traffic, listen, stop_listening

    counter, report = Traffic(), {}
    listen(counter)
    for name in CODECS:
        for sides in SIDES:
            reduce = CompressedAllReduce(LARGE, build_codec(name), sides=sides)
            with counter.counting("backward"):
                reduce(torch.ones(LARGE), 0)
            report[name, sides] = counter.take()
    with counter.counting("backward"):
        dist.all_reduce(torch.ones(LARGE))
        report["float32"] = counter.take()
        with kind_of_traffic("norms"), kind_of_traffic("momentum"):
            dist.all_reduce(torch.ones(1))
        report["named"] = counter.take()
        CompressedAllReduce(1, build_codec("int8"))
        report["setup"] = set(counter.take()[0])
    stop_listening(counter)
    return report


def determinism() -> dict[str, Any]:
    def run(step: int, seed: int = 0, bucket: int = 0) -> Tensor:
        reduce = CompressedAllReduce(1000, build_codec("int4"), seed=seed, bucket=bucket)
        return reduce(own(1000, reduce.rank), step)

    first = run(0)
    others = {"step": run(1), "seed": run(0, seed=1), "bucket": run(0, bucket=1)}
    return {
        "again": torch.equal(first, run(0)),
        "same": [name for name, other in others.items() if torch.equal(first, other)],
    }


def continued() -> dict[str, Any]:
    """Interrupted after three steps, with and without its state, and with other ranks' state."""
    report = {}
    for size in (1, 1000, ODD):
        codec, rank = build_codec("sign"), dist.get_rank()
        whole = CompressedAllReduce(size, codec)
        results = [whole(own(size, rank, step), step) for step in range(5)]
        part = CompressedAllReduce(size, codec)
        for step in range(3):
            part(own(size, rank, step), step)
        kept, fresh = CompressedAllReduce(size, codec), CompressedAllReduce(size, codec)
        kept.load_state_dict(part.state_dict())
        last = [(kept(own(size, rank, s), s), fresh(own(size, rank, s), s)) for s in (3, 4)]
        report[size] = (
            all(torch.equal(a, b) for (a, _), b in zip(last, results[3:], strict=True)),
            all(torch.equal(a, b) for (_, a), b in zip(last, results[3:], strict=True)),
        )
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dat_ds").addHandler(handler)
    kept.load_state_dict({**part.state_dict(), "ranks": 17})
    report["warning"], report["state"] = messages, kept.state_dict()
    return report


def non_finite() -> dict[str, Any]:
    report = {}
    for name in CODECS:
        reduce = CompressedAllReduce(3000, build_codec(name, **small_blocks(name)))
        tensor = torch.ones(3000)
        if reduce.rank == 0:
            tensor[7] = math.nan
        bad = reduce(tensor, 0)
        after = [reduce(torch.ones(3000), step) for step in range(1, 10)]
        report[name] = (
            bool(bad[:64].isfinite().all()),
            bool(bad[64:].isfinite().all()),
            all(bool(t.isfinite().all()) for t in after),
        )
    return report


def small_blocks(name: str) -> dict[str, Any]:
    return {} if name == "natural" else {"block_size": 64}


def rescaled() -> bool:
    """Doubling the unit of the tensors doubles every result, if the errors are told of it."""
    plain, doubled = (CompressedAllReduce(999, build_codec("sign")) for _ in range(2))
    tensor = own(999, plain.rank)
    for step in range(3):
        plain(tensor, step), doubled(tensor, step)
    doubled.rescale_errors(2.0)
    return torch.equal(2 * plain(tensor, 3), doubled(2 * tensor, 3))


def disagreements() -> list[str]:
    rank, messages = dist.get_rank(), []
    for options in (
        {"codec": build_codec("sign" if rank else "int8"), "numel": 5},
        {"codec": build_codec("int8"), "numel": 5 + rank},
        {"codec": build_codec("int8", block_size=8 + rank), "numel": 5},
        {"codec": build_codec("int8"), "numel": 5, "seed": rank},
        {"codec": build_codec("int8"), "numel": 5, "sides": SIDES[rank > 0]},
    ):
        with pytest.raises(ValueError, match="Ranks disagree") as caught:
            CompressedAllReduce(**options)
        messages.append(str(caught.value))
    return messages


def everything() -> dict[str, Any]:
    dist.init_process_group("gloo")
    with pytest.raises(ValueError, match="'sign' is biased"):
        CompressedAllReduce(5, build_codec("sign"), error_feedback=False)
    parts = (averages, layouts, traffic, determinism, continued, non_finite, rescaled)
    report = {part.__name__: part() for part in (*parts, disagreements)}
    dist.destroy_process_group()
    return report


@pytest.fixture(scope="module", params=[2, 3])
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(everything, request.param)


def test_every_rank_has_the_same_bits(reports: list[dict[str, Any]]) -> None:
    first = reports[0]["averages"]
    for other in reports[1:]:
        for key, (once, often) in other["averages"].items():
            assert torch.equal(once, first[key][0]), key
            assert torch.equal(often, first[key][1]), key


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(
    ("name", "once", "often"),
    [
        # Error of one average of Gaussian tensors, and of the mean of 36: of independent draws a
        # sixth; with error feedback, what is still owed after 36 steps.
        ("int8", 0.013, 0.0022),
        ("qsgd", 0.040, 0.0067),
        ("int4", 0.23, 0.039),
        ("natural", 0.45, 0.075),
        ("sign", 0.85, 0.25),
        ("topk", 0.99, 0.85),
    ],
)
def test_averages_are_close_to_the_mean_and_closer_over_time(
    reports: list[dict[str, Any]], name: str, once: float, often: float, sides: str
) -> None:
    exact = mean(ODD, len(reports))
    first, many = reports[0]["averages"][name, ODD, sides]
    assert (first - exact).norm() <= once * exact.norm()
    assert (many - exact).norm() <= often * exact.norm()


@pytest.mark.parametrize("name", CODECS)
def test_sizes_from_nothing_to_odd_ones_work(reports: list[dict[str, Any]], name: str) -> None:
    for size in SIZES:
        exact = mean(size, len(reports))
        first, many = reports[0]["averages"][name, size, "double"]
        assert first.shape == (size,)
        assert (many - exact).norm() <= 0.9 * exact.norm() + 1e-12


def test_with_a_lossless_codec_only_the_order_of_sums_is_left(
    reports: list[dict[str, Any]],
) -> None:
    ranks = len(reports)
    for report in reports:
        assert max(report["layouts"]["whole"]) < 1e-3 * ranks
    for i, shape in enumerate(SHAPES):
        size = math.prod(shape)
        shares = [report["layouts"]["shares"][i] for report in reports]
        assert {len(share) for share in shares} == {math.ceil(size / ranks)}
        assert torch.allclose(torch.cat(shares)[:size], mean(size, ranks), atol=1e-6)


def test_bytes_are_those_of_the_payloads(reports: list[dict[str, Any]]) -> None:
    ranks = len(reports)
    share = LARGE // ranks
    for report in reports:
        for name in CODECS:
            payload = build_codec(name).bytes_of(share)
            expected = {"double": 2 * payload, "single": payload + 4 * share}
            for sides in SIDES:
                sent = {"gradients": (ranks - 1) * expected[sides]}
                assert report["traffic"][name, sides] == (sent, {"gradients": 2})


@pytest.mark.parametrize(("name", "most"), [("int8", 0.27), ("sign", 0.035), ("qsgd", 0.27)])
def test_double_sided_bytes_are_a_small_part_of_float32s(
    reports: list[dict[str, Any]], name: str, most: float
) -> None:
    traffic = reports[0]["traffic"]
    full = traffic["float32"][0]["gradients"]
    assert traffic[name, "double"][0]["gradients"] <= most * full


def test_whoever_starts_a_collective_names_its_kind(reports: list[dict[str, Any]]) -> None:
    traffic = reports[0]["traffic"]
    assert set(traffic["named"][0]) == {"momentum"}
    assert traffic["setup"] == {"setup"}


def test_seed_bucket_and_step_decide_the_rounding(reports: list[dict[str, Any]]) -> None:
    assert all(report["determinism"] == {"again": True, "same": []} for report in reports)


def test_error_feedback_continues_from_its_state_bit_for_bit(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        for size in (1000, ODD):
            assert report["continued"][size] == (True, False)
        assert report["continued"][1][0]


def test_another_number_of_ranks_starts_from_zero_with_a_warning(
    reports: list[dict[str, Any]],
) -> None:
    ranks = len(reports)
    for report in reports:
        (message,) = report["continued"]["warning"]
        assert message.startswith(f"Error feedback was saved by 17 ranks, there are {ranks}")
        assert report["continued"]["state"] == {"ranks": ranks, "worker": None, "server": None}


def test_a_non_finite_entry_shows_on_every_rank_and_is_not_remembered(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        for name in CODECS:
            assert report["non_finite"][name] == (False, True, True), name


def test_errors_follow_the_unit_of_the_gradients(reports: list[dict[str, Any]]) -> None:
    assert all(report["rescaled"] for report in reports)


def test_ranks_that_disagree_all_say_so(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert len(report["disagreements"]) == 5
        assert "rank 0: double-sided all-reduce of 5 entries, Int8(" in report["disagreements"][0]
        assert "rank 1: double-sided all-reduce of 5 entries, Sign(" in report["disagreements"][0]
