"""Claims about Square: where its changes lie, what they add up to, and rows that are apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import SampleGenerator, ThreatModel, cw_margin, project_l1_box, square
from dat_ds.attacks.square import _MOVES, _bump, _draws, _shrunk
from tests.unit.attack_helpers import (
    EPS,
    assert_no_trace,
    batch,
    every_mode,
    every_norm,
    model_in_training,
    trace,
)

pytestmark = pytest.mark.fast


def images(size: int = 3, side: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 3, side, side, generator=generator)


class Sum(nn.Module):
    """Two classes; the margin of the first rises with the sum of the pixels. Rows are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.grad_enabled: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.queries.append(x.clone())
        self.grad_enabled.add(torch.is_grad_enabled())
        total = torch.cat([row.sum(dtype=torch.float64).view(1, 1) for row in x])
        return torch.cat([torch.zeros_like(total), total - 1e6], dim=1)


def attacked(norm: str, queries: int, model: nn.Module | None = None, **options) -> Tensor:
    x = images()
    y = torch.zeros(len(x), dtype=torch.int64)
    model = Sum() if model is None else model
    threat = ThreatModel(norm, 0.1 if norm == "linf" else EPS[norm])
    options.setdefault("generator", SampleGenerator(0, 0))
    return square(model, x, y, threat=threat, queries=queries, **options)


# ---- closed forms


def test_on_a_sum_linf_ends_at_the_corner_that_raises_it():
    x = images(1, side=4)[:, :1]
    y = torch.zeros(1, dtype=torch.int64)
    threat = ThreatModel("linf", 0.1)
    generator = SampleGenerator(0, 0)
    x_adv = square(Sum(), x, y, threat=threat, queries=600, generator=generator)
    assert_close(x_adv, (x + 0.1).clamp(0, 1), rtol=0, atol=1e-7)


@every_norm
def test_queries_only_raise_the_margin(norm):
    few, many = (attacked(norm, queries).flatten(1).sum(dim=1) for queries in (10, 60))
    assert (many >= few).all()
    assert many.mean() > few.mean()


@every_norm
def test_every_query_is_inside_the_threat_model(norm):
    model = Sum()
    attacked(norm, 60, model)
    x = images().double()
    threat = ThreatModel(norm, 0.1 if norm == "linf" else EPS[norm])
    for query in model.queries:
        slack = 1e-7 if norm == "linf" else 0
        assert (threat.distance(query.double(), x) <= threat.eps + slack).all()
        assert query.min() >= 0
        assert query.max() <= 1
    assert model.grad_enabled == {False}
    assert len(model.queries) == 60


def test_the_linf_start_is_vertical_stripes_at_full_eps():
    model = Sum()
    x_adv = attacked("linf", 1, model)
    delta = x_adv - images()
    free = (images() > 0.1) & (images() < 0.9)
    assert_close(delta[free].abs(), torch.full_like(delta[free], 0.1), rtol=0, atol=1e-7)
    signs = torch.where(free, delta.sign(), 0.0)
    assert (signs.amax(dim=2) * signs.amin(dim=2) >= 0).all(), "one sign a column"
    assert len(torch.unique(signs)) == 3


def test_an_linf_query_changes_one_square_with_one_sign_per_channel():
    x = torch.full((6, 3, 12, 12), 0.5)
    moves = _MOVES["linf"](ThreatModel("linf", 0.1), x)
    draws = torch.rand(6, moves.num_draws, generator=torch.Generator().manual_seed(0))
    delta = moves.candidate(x, 4, draws) - x
    assert_close(delta.abs().flatten(2).sum(dim=2), torch.full((6, 3), 1.6), rtol=1e-5, atol=0)
    assert_close(delta.flatten(2).sum(dim=2).abs(), torch.full((6, 3), 1.6), rtol=1e-5, atol=0)
    changed = (delta != 0).all(dim=1)
    assert (changed.any(dim=1).sum(dim=1) == 4).all()
    assert (changed.any(dim=2).sum(dim=1) == 4).all()
    corners = {(int(c.any(1).int().argmax()), int(c.any(0).int().argmax())) for c in changed}
    assert len(corners) > 1, "squares differ from row to row"


def test_an_l2_query_keeps_the_norm_where_the_box_does_not_bind():
    x = torch.full((6, 3, 12, 12), 0.5)
    threat = ThreatModel("l2", 0.5)
    moves = _MOVES["l2"](threat, x)
    best = moves.start(SampleGenerator(0, 0))
    for draws in _draws(x, moves.num_draws, 20, SampleGenerator(0, 1)):
        assert_close(threat.distance(best, x), torch.full((6,), 0.5), rtol=1e-5, atol=0)
        best = moves.candidate(best, 5, draws)


def test_the_bumps_of_side_3_are_the_papers():
    # n = 1, M from 0 to 1: 1/4 at the rim and 1/4 + 1 in the middle, for each of two halves.
    bumps = _bump(3, torch.device("cpu"), torch.float64)[0].view(3, 3)
    left = torch.tensor([0.25, 1.25, 0.25], dtype=torch.float64)
    assert_close(bumps[:, 0].abs(), left)
    assert (bumps[:, 0] > 0).all()
    assert (bumps[:, 1:] < 0).all()
    assert_close(bumps[:, 2], -left)


@pytest.mark.parametrize("total", [10.0, 50.0, 1e3])
def test_the_quick_l1_projection_is_close_to_the_exact_one(total):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(4, 300, generator=generator)
    high = torch.rand(4, 300, generator=generator)
    exact = project_l1_box(delta.abs(), total, -high, high)
    quick = _shrunk(delta.abs(), high, total)
    assert (quick.sum(dim=1, dtype=torch.float64) <= total * (1 + 1e-6)).all()
    assert (quick <= high).all()
    assert_close(quick, exact, rtol=0, atol=2e-3)


# ---- contract


@every_norm
def test_a_batch_is_its_rows_one_by_one(norm):
    x = images()
    y = torch.zeros(3, dtype=torch.int64)
    threat = ThreatModel(norm, EPS[norm] if norm != "linf" else 0.1)
    together = square(Sum(), x, y, threat=threat, queries=55, generator=SampleGenerator(0, 0))
    for row in range(3):
        generator = SampleGenerator(0, 0, first_index=row)
        alone = square(
            Sum(), x[row : row + 1], y[:1], threat=threat, queries=55, generator=generator
        )
        assert torch.equal(alone[0], together[row])


@every_norm
def test_the_same_generator_gives_the_same_images(norm):
    first, again, other = (
        attacked(norm, 30, generator=SampleGenerator(seed, 0)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_norm
def test_restarts_keep_the_larger_margin(norm):
    once, twice = (attacked(norm, 20, restarts=n).flatten(1).sum(dim=1) for n in (1, 3))
    assert (twice >= once).all()
    assert (twice > once).any()


@every_norm
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (3, 8, 8), (2, 7, 4)])
def test_images_of_any_size_are_attacked(norm, shape):
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(2, dtype=torch.int64)
    threat = ThreatModel(norm, 0.3)
    x_adv = square(Sum(), x, y, threat=threat, queries=40, generator=SampleGenerator(0, 0))
    assert x_adv.isfinite().all()
    assert (x_adv.flatten(1).sum(dim=1) > x.flatten(1).sum(dim=1)).all()
    assert (threat.distance(x_adv, x) <= 0.3 + 1e-6).all()


@every_norm
def test_a_ball_of_no_radius_gives_the_image(norm):
    x = images(2)
    y = torch.zeros(2, dtype=torch.int64)
    generator = SampleGenerator(0, 0)
    x_adv = square(Sum(), x, y, threat=ThreatModel(norm, 0), queries=5, generator=generator)
    assert_close(x_adv, x, rtol=0, atol=1e-7)


@every_mode
def test_it_leaves_no_trace(model_mode):
    model = model_in_training()
    x, y = batch()
    before = trace(model, x)
    threat = ThreatModel("linf", 0.1)
    square(model, x, y, threat=threat, queries=3, model_mode=model_mode)
    assert_no_trace(before, trace(model, x))


def test_the_result_has_the_best_margin_of_all_queries():
    model, (x, y) = model_in_training().eval(), batch()
    seen = []

    def watched(images: Tensor) -> Tensor:
        logits = model(images)
        seen.append(cw_margin(logits.double(), y))
        return logits

    threat = ThreatModel("l2", 1)
    x_adv = square(watched, x, y, threat=threat, queries=50, generator=SampleGenerator(0, 0))
    with torch.no_grad():
        assert_close(
            cw_margin(model(x_adv).double(), y), torch.stack(seen).amax(dim=0), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("options", [{"queries": 0}, {"restarts": 0}, {"first_share": 0.0}])
def test_values_out_of_range_are_refused(options):
    x, y = batch()
    with pytest.raises(ValueError, match="must be at least 1"):
        square(
            model_in_training(),
            x,
            y,
            threat=ThreatModel("linf", 0.1),
            **{"queries": 1, **options},
        )
