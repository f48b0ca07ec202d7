"""Claims about FAB: distances in closed form, steps to a hyperplane, and rows that are apart."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import brentq, linprog
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import NORMS, SampleGenerator, ThreatModel, fab
from dat_ds.attacks.projections import step_to_plane
from tests.unit.attack_helpers import (
    assert_no_trace,
    batch,
    every_mode,
    every_norm,
    linear,
    mid_range,
    model_in_training,
    trace,
)

pytestmark = pytest.mark.fast

WIDE = {"linf": 1.0, "l2": 10.0, "l1": 100.0}
DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}


def correct(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def near_the_boundary(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model with small margins on pixels in mid-range: the box binds nowhere."""
    model = linear(classes)
    x, _ = mid_range()
    with torch.no_grad():
        model[1].bias.copy_(-model(x).mean(dim=0) + model[1].bias)
    return model, x, correct(model, x)


# ---- closed forms


@every_norm
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("targets", [None, 2])
def test_the_distance_to_a_linear_boundary_is_the_margin_over_the_dual_norm(norm, classes, targets):
    model, x, y = near_the_boundary(classes)
    threat = ThreatModel(norm, WIDE[norm])
    x_adv = fab(model, x, y, threat=threat, steps=30, targets=targets)
    logits, weight = model(x).detach(), model[1].weight.detach()
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = (weight[y][:, None] - weight).norm(p=DUAL[norm], dim=2)
    nearest = (gaps / slopes).nan_to_num(nan=float("inf")).amin(dim=1)
    assert (correct(model, x_adv) != y).all()
    found = threat.distance(x_adv, x)
    assert (found >= nearest * (1 - 1e-9)).all(), "nothing nearer is misclassified"
    assert_close(found, nearest, rtol=1e-6, atol=0)


def test_a_class_that_is_further_away_is_reached_where_it_is_the_target():
    model, x, y = near_the_boundary(3)
    threat = ThreatModel("l2", 10)
    target = model(x).scatter(1, y[:, None], float("inf")).argmin(dim=1)
    far, near = (
        threat.distance(fab(model, x, y, threat=threat, steps=1, targets=chosen), x)
        for chosen in (target, None)
    )
    assert (far >= near).all()
    assert (far > 1.01 * near).any()


@every_norm
def test_an_image_that_lies_outside_the_ball_is_not_returned(norm):
    model, x, y = near_the_boundary(2)
    wide = ThreatModel(norm, WIDE[norm])
    distances = wide.distance(fab(model, x, y, threat=wide, steps=20), x)
    threat = ThreatModel(norm, float(distances.median()))
    x_adv = fab(model, x, y, threat=threat, steps=20)
    outside = distances > threat.eps
    assert 0 < outside.sum() < len(x)
    assert torch.equal(x_adv[outside], x[outside])
    assert (correct(model, x_adv)[~outside] != y[~outside]).all()


def test_a_misclassified_image_stays_as_it_is():
    model, x, y = near_the_boundary(2)
    assert torch.equal(fab(model, x, 1 - y, threat=ThreatModel("l2", 1), steps=3), x)


# ---- the step to a hyperplane


def problem(seed: int, norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    weight[0, 0] = 0
    x = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    x[0, 1] = 1  # no room on one side
    rise = 1.5 * torch.randn(1, generator=generator, dtype=torch.float64)
    return weight, rise, -x, 1 - x, norm


def shortest(weight: Tensor, rise: Tensor, low: Tensor, high: Tensor, norm: str) -> float | None:
    """The length by scipy; None where the plane misses the box."""
    w, r = weight[0].numpy(), float(rise)
    lo, hi = low[0].numpy(), high[0].numpy()
    n = len(w)
    if norm == "l2":  # u = clip(lam w) by its optimality conditions

        def excess(lam: float) -> float:
            return float((w * (lam * w).clip(lo, hi)).sum() - r)

        if excess(-1e6) > 0 or excess(1e6) < 0:
            return None
        u = (brentq(excess, -1e6, 1e6, xtol=1e-14) * w).clip(lo, hi)
        return float((u**2).sum() ** 0.5)
    # u = p - q; l1 minimises sum(p + q), l-infinity a bound t on it.
    rows, cost = [], [1.0] * (2 * n) + [0.0]
    if norm == "linf":
        cost = [0.0] * (2 * n) + [1.0]
        rows = [[float(j in (i, n + i)) for j in range(2 * n)] + [-1.0] for i in range(n)]
    found = linprog(
        cost,
        A_ub=rows or None,
        b_ub=[0.0] * n if rows else None,
        A_eq=[[*w, *-w, 0.0]],
        b_eq=[r],
        bounds=[*((0, b) for b in hi), *((0, -b) for b in lo), (0, None)],
    )
    return float(found.fun) if found.success else None


@every_norm
@pytest.mark.parametrize("seed", range(12))
def test_a_step_to_a_hyperplane_is_the_shortest_in_the_box(norm, seed):
    weight, rise, low, high, _ = task = problem(seed, norm)
    step = step_to_plane(*task)
    assert (step >= low).all()
    assert (step <= high).all()
    expected = shortest(*task)
    if expected is None:
        best = torch.where(weight * rise > 0, high, low).where(weight != 0, 0.0)
        assert_close(step, best, rtol=0, atol=0)
        return
    assert_close((weight * step).sum(dim=1), rise, rtol=1e-12, atol=1e-12)
    length = torch.linalg.vector_norm(step, ord={"linf": float("inf"), "l2": 2, "l1": 1}[norm])
    assert float(length) == pytest.approx(expected, rel=1e-7)


def test_some_of_those_hyperplanes_miss_the_box():
    missed = [shortest(*problem(seed, "l2")) is None for seed in range(12)]
    assert 0 < sum(missed) < 12


@every_norm
def test_steps_from_several_points_are_those_from_each(norm):
    weight, rise, low, high, _ = problem(1, norm)
    both = step_to_plane(
        weight,
        torch.stack([rise, -rise / 3]),
        torch.stack([low, low / 2]),
        torch.stack([high, high / 2]),
        norm,
    )
    assert torch.equal(both[0], step_to_plane(weight, rise, low, high, norm))
    assert torch.equal(both[1], step_to_plane(weight, -rise / 3, low / 2, high / 2, norm))


@every_norm
@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e30])
def test_weights_of_any_size_give_finite_steps(norm, weight):
    flat = torch.full((1, 4), weight)
    low, high = -torch.ones(1, 4), torch.ones(1, 4)
    step = step_to_plane(flat, torch.ones(1), low, high, norm)
    assert step.isfinite().all()
    assert (step.abs() <= 1).all()


# ---- contract


class Rows(nn.Module):
    """A small network whose rows are computed apart, so that they are exact in any batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)
        ).eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(row) for row in x.split(1)])


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Tensor, Tensor]:
    model = Rows()
    x = torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return model, x, correct(model, x)


@every_norm
@pytest.mark.parametrize("targets", [None, 3])
def test_a_batch_is_its_rows_one_by_one(norm, targets, rows):
    model, x, y = rows
    threat = ThreatModel(norm, WIDE[norm] / 4)

    def attack(which: slice) -> Tensor:
        generator = SampleGenerator(0, 0, first_index=which.start)
        images, labels = x[which], y[which]
        return fab(
            model,
            images,
            labels,
            threat=threat,
            steps=4,
            restarts=2,
            targets=targets,
            generator=generator,
        )

    together = attack(slice(0, 5))
    assert (together != x).flatten(1).any(dim=1).any()
    for row in range(5):
        assert torch.equal(attack(slice(row, row + 1))[0], together[row])


@every_norm
def test_the_result_is_inside_the_threat_model(norm, rows):
    model, x, y = rows
    threat = ThreatModel(norm, WIDE[norm] / 50)
    x_adv = fab(model, x, y, threat=threat, steps=5, restarts=3, generator=SampleGenerator(0, 0))
    assert (threat.distance(x_adv, x) <= threat.eps).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_a_restart_never_makes_the_distance_larger():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        model[1].weight.mul_(20)  # so that linearisations mislead
    x, _ = batch(8)
    y, threat = correct(model, x), ThreatModel("l2", 10)

    def distances(restarts: int) -> Tensor:
        source = SampleGenerator(0, 0)
        x_adv = fab(model, x, y, threat=threat, steps=3, restarts=restarts, generator=source)
        return threat.distance(x_adv, x)

    once, more = distances(1), distances(4)
    found = once > 0
    # The final steps start elsewhere, so that a nearer image may end a little further away.
    assert (more <= once * 1.01)[found].all()
    assert (more < 0.99 * once).any()


@every_mode
def test_it_leaves_no_trace(model_mode):
    model = model_in_training()
    x, y = batch()
    before = trace(model, x)
    fab(
        model,
        x,
        y,
        threat=ThreatModel("linf", 0.1),
        steps=2,
        restarts=2,
        generator=SampleGenerator(0, 0),
        model_mode=model_mode,
    )
    assert_no_trace(before, trace(model, x))


@pytest.mark.parametrize(("targets", "restarts"), [(None, 1), (2, 1), (2, 3)])
def test_the_number_of_forwards_is_known(targets, restarts):
    model = model_in_training()
    x, y = batch()
    fab(model, x, y, threat=ThreatModel("l2", 1), steps=5, targets=targets, restarts=restarts)
    # Two a step; the original, the nearest image, three on the way between; one for targets.
    expected = 2 * 5 * restarts * (targets or 1) + 5 + (targets is not None)
    assert model.num_forwards == expected


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1, "restarts": 0}])
@pytest.mark.parametrize("targets", [None, 0])
def test_counts_below_1_are_refused(options, targets):
    x, y = batch()
    with pytest.raises(ValueError, match="must be at least 1"):
        fab(linear(), x.double(), y, threat=ThreatModel("l2", 1), targets=targets, **options)


@every_norm
def test_no_image_gives_no_image(norm):
    x = torch.zeros(0, 1, 4, 4)
    y = torch.zeros(0, dtype=torch.int64)
    assert fab(linear(), x, y, threat=ThreatModel(norm, 1), steps=1).shape == x.shape


def test_every_norm_is_covered():
    assert set(WIDE) == set(DUAL) == set(NORMS)
