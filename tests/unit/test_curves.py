"""Curves of an evaluation equal closed forms on linear models, and are drawn from JSON alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from dat_ds.attacks import ThreatModel
from dat_ds.evaluation import curves
from dat_ds.evaluation.samples import wilson_interval

SHAPE = (1, 3, 4)


class Linear(nn.Module):
    """Two classes, whose margin on ``x`` is ``w . (x - 1/2) + bias``: class 1 where positive."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(math.prod(SHAPE), generator=generator))
        self.dropout = nn.Dropout(0.9)

    def value(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        value = self.dropout(self.value(x))
        return torch.stack([-value / 2, value / 2], dim=1)


@pytest.fixture
def model() -> Linear:
    return Linear().train()


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.5 + 0.2 * (torch.rand(60, *SHAPE, generator=generator) - 0.5)
    return x, torch.randint(2, (60,), generator=generator)


def robust_radii(model: Linear, x: Tensor, y: Tensor) -> Tensor:
    """The l-infinity radius that breaks each image, below 0 where it is misclassified."""
    sign = 2 * y - 1
    return (sign * model.value(x) / model.weight.abs().sum()).detach()


@pytest.mark.fast
def test_accuracy_against_the_radius_is_the_distribution_of_the_margins(model, images):
    x, y = images
    exact = robust_radii(model, x, y)
    radii = [0.0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08]
    found = curves.accuracy_against_radius(model, x, y, ThreatModel("linf", 0.1), radii, steps=3)
    expected = [int((exact > radius).sum()) for radius in radii]
    assert len(set(expected)) > 4, "the radii tell images apart"
    assert found["standing"] == expected[: len(found["standing"])]
    assert set(expected[len(found["standing"]) :]) <= {0}
    assert found["radii"] == radii[: len(found["standing"])]
    assert found["accuracy"] == [count / 60 for count in found["standing"]]
    assert model.training, "the model is as it was"


def test_accuracy_against_the_radius_does_not_depend_on_the_batch(model, images):
    threat = ThreatModel("l2", 0.1)
    first, second = (
        curves.accuracy_against_radius(
            model, *images, threat, curves.radii_of(threat), steps=2, batch_size=size
        )
        for size in (60, 7)
    )
    assert first == second


class Fickle(nn.Module):
    """Misclassifies only near ``radius``: a larger ball's attack may miss what a smaller found."""

    def forward(self, x: Tensor) -> Tensor:
        distance = (x - 0.5).abs().amax(dim=(1, 2, 3))
        margin = (distance - 0.05).abs() - 0.02 + 0 * x.sum(dim=(1, 2, 3))
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def test_what_a_smaller_radius_breaks_stays_broken():
    x, y = torch.full((4, *SHAPE), 0.5), torch.zeros(4, dtype=torch.int64)
    threat = ThreatModel("linf", 0.05)
    found = curves.accuracy_against_radius(Fickle(), x, y, threat, [0.0, 0.05, 0.4], until=-1)
    assert found["standing"] == [4, 0, 0]


def test_radii_end_where_nothing_stands_and_where_pixels_do(model, images):
    threat = ThreatModel("linf", 0.25)
    assert max(curves.radii_of(threat)) == 1.0
    found = curves.accuracy_against_radius(model, *images, threat, curves.radii_of(threat))
    assert found["standing"][-1] == 0
    assert found["standing"].count(0) == 1


def test_no_radius_is_a_curve_of_one_point():
    assert curves.radii_of(ThreatModel("linf", 0.0)) == [0.0]


class Climbing(nn.Module):
    """Class 1 where the image's mean rises above ``0.5 + distance``."""

    def __init__(self, distance: float) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, x: Tensor) -> Tensor:
        value = x.mean(dim=(1, 2, 3)) - 0.5 - self.distance
        return torch.stack([-value, value], dim=1)


@pytest.mark.parametrize(("distance", "standing"), [(0.099, 0), (0.101, 5)])
def test_one_step_reaches_the_corner_of_a_linear_model(distance: float, standing: int):
    x, y = torch.full((5, *SHAPE), 0.5), torch.zeros(5, dtype=torch.int64)
    found = curves.accuracy_against_steps(
        Climbing(distance), x, y, ThreatModel("linf", 0.1), steps=[1, 2, 4]
    )
    assert found["natural"] == 5
    assert found["steps"] == [1, 2, 4]
    assert found["standing"] == [standing] * 3


class Scripted(nn.Module):
    """Misclassifies image ``i`` from its ``calls[i]``-th call on, counted from 0."""

    def __init__(self, calls: Tensor) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, x: Tensor) -> Tensor:
        # The first call is the one without an attack.
        wrong = (self.calls < self.count).to(x.dtype)
        self.count += 1
        value = 0.5 - wrong + 0 * x.sum(dim=(1, 2, 3))
        return torch.stack([value, torch.zeros_like(value)], dim=1)


def test_steps_count_the_attack_s_own_forwards():
    """The start is step 0, and the image after ``k`` steps is call ``k``."""
    calls = torch.tensor([0, 1, 2, 3, 5, 6, 9])
    x, y = torch.full((7, *SHAPE), 0.5), torch.zeros(7, dtype=torch.int64)
    found = curves.accuracy_against_steps(
        Scripted(calls), x, y, ThreatModel("linf", 0.1), steps=[6, 1, 2, 5]
    )
    assert found["steps"] == [1, 2, 5, 6]
    assert found["standing"] == [int((calls > step).sum()) for step in found["steps"]]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_surface_of_a_linear_model_is_a_plane(norm: str):
    model, threat = Linear().double(), ThreatModel(norm, 0.05)
    x = torch.full(SHAPE, 0.5, dtype=torch.float64)
    found = curves.loss_surface(model, x, 1, threat, points=11, steps=10, batch_size=17)
    margin = torch.tensor(found["margin"], dtype=torch.float64)
    along = torch.tensor(found["along"], dtype=torch.float64)
    assert margin.shape == (11, 11)
    assert found["length"] <= 0.05 * (1 + 1e-6)
    # No clipping at these pixels, so both differences are constant.
    for differences in (margin.diff(dim=1), margin.diff(dim=0)):
        torch.testing.assert_close(
            differences, differences[:1, :1].expand_as(differences), rtol=1e-4, atol=1e-6
        )
    origin = [row[int((along == 0).nonzero())] for row in found["margin"]]
    across = found["across"]
    assert origin[across.index(0.0)] == pytest.approx(model.value(x[None]).item(), abs=1e-7)
    if norm == "linf":  # the corner takes eps from every entry of the weight
        slope = (margin[0, 1] - margin[0, 0]) / (along[1] - along[0])
        assert float(slope) == pytest.approx(-0.05 * model.weight.abs().sum().item(), rel=1e-5)
    loss = torch.tensor(found["loss"], dtype=torch.float64)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-margin))


def sample(label: int, **values: object) -> dict[str, object]:
    plain = {"label": label, "correct": True, "robust": True, "broken_by": None}
    return {**plain, "predicted_under_attack": None, **values}


def test_classes_are_counted_from_samples_alone():
    broken = {"robust": False, "broken_by": "pgd-1"}
    rows = [
        sample(2),
        sample(0, correct=False, robust=False),
        sample(2, **broken, predicted_under_attack=0),
        sample(2, **broken, predicted_under_attack=5),
        sample(2, **broken, predicted_under_attack=5),
    ]
    first, second = curves.accuracy_by_class(rows, ["cat", "dog"])
    assert (first["label"], first["name"], first["num_examples"]) == (0, "cat", 1)
    assert (first["natural"], first["robust"], first["taken_for"]) == (0, 0, None)
    assert (second["label"], second["name"], second["natural_acc"]) == (2, "2", 1.0)
    assert second["robust_acc"] == 0.25
    assert (second["taken_for"], second["taken_count"]) == ("5", 2)
    assert second["robust_interval"] == list(wilson_interval(1, 4))


def test_everything_is_json(model, images):
    threat = ThreatModel("linf", 0.05)
    found = [
        curves.accuracy_against_radius(model, *images, threat, curves.radii_of(threat), steps=2),
        curves.accuracy_against_steps(model, *images, threat, steps=[1, 2]),
        curves.loss_surface(model, images[0][0], 1, threat, steps=2, points=3),
    ]
    assert json.loads(json.dumps(found)) == found
