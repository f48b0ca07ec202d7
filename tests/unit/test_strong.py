"""Claims about the ensemble ``strong``: losses at one spread, nearest classes, cost, masking."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import (
    NORMS,
    SampleGenerator,
    ThreatModel,
    cw_margin,
    parse_evaluation_attack,
)
from dat_ds.attacks.ensemble import ENSEMBLES, Stage, attack_names, stages_of
from dat_ds.attacks.named import run_attack
from dat_ds.attacks.strong import at_one_spread, malt, nearest_classes, probability_margin

pytestmark = pytest.mark.fast

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
SHORT = ("apgd-cw-6", "malt-3", "apgd-pm-4-2", "apgd-square-20")
"""The parts of the ensemble with fewer steps and runs."""
every_norm = pytest.mark.parametrize("norm", NORMS)


def logits(classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, classes, generator=generator, dtype=torch.float64)


Y = torch.tensor([0, 1, 2, 3, 4, 2])


def linear(classes: int) -> nn.Module:
    """Rows of very different lengths, so that the likeliest class is seldom the nearest."""
    torch.manual_seed(2)
    layer = nn.Linear(16, classes)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, classes).unsqueeze(1))
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


def images(size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.4 + 0.2 * torch.rand(size, 1, 4, 4, generator=generator)


def stages(names: tuple[str, ...], threat: ThreatModel, classes: int) -> list[Stage]:
    written = attack_names(names, threat)
    return [s for n in written for s in stages_of(parse_evaluation_attack(n), threat, classes)]


def test_logits_at_one_spread_are_centred_with_a_deviation_of_3():
    z = at_one_spread(logits())
    assert_close(z.mean(1), torch.zeros(6).double(), rtol=0, atol=1e-14)
    assert_close(z.std(1, correction=0), torch.full((6,), 3.0).double())
    assert torch.equal(z.argsort(1), logits().argsort(1))


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1e6, -3.0), (2.0**60, 0.0)])
def test_neither_scale_nor_shift_of_the_logits_changes_a_loss_at_one_spread(scale, shift):
    scaled = scale * (logits() + shift)
    assert_close(at_one_spread(scaled), at_one_spread(logits()), rtol=1e-10, atol=1e-10)
    assert_close(probability_margin(scaled, Y), probability_margin(logits(), Y))


def test_equal_logits_have_a_finite_gradient_at_one_spread():
    z = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(probability_margin(z, Y).sum(), z)
    assert not at_one_spread(z).any()
    assert gradient.isfinite().all()
    assert (gradient.gather(1, Y.unsqueeze(1)) < 0).all()


def test_the_probability_margin_is_its_formula():
    expected = []
    for row, y in zip(logits().tolist(), Y.tolist(), strict=True):
        mean = sum(row) / 5
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / 5)
        odds = [math.exp(3 * (z - mean) / deviation) for z in row]
        p = [o / sum(odds) for o in odds]
        expected.append(max(p[:y] + p[y + 1 :]) - p[y])
    assert_close(probability_margin(logits(), Y), torch.tensor(expected, dtype=torch.float64))


def distances(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Each class's distance ``|z_y - z_t| / ||w_t - w_y||_*`` of a linear model ``(B, K)``."""
    z, weight = model(x), model[1].weight
    gap = z.gather(1, y.unsqueeze(1)) - z
    lengths = torch.linalg.vector_norm(weight[y].unsqueeze(1) - weight, ord=DUAL[norm], dim=2)
    return (gap / lengths).scatter(1, y.unsqueeze(1), math.inf)


@every_norm
def test_the_nearest_classes_of_a_linear_model_are_those_whose_boundaries_are_nearest(norm):
    model, x = linear(6), images()
    y = model(x).argmax(1)
    found = nearest_classes(model, x, y, ThreatModel(norm, 0.1), 3)
    assert torch.equal(found, distances(model, x, y, norm).argsort(1)[:, :3])
    likeliest = model(x).scatter(1, y.unsqueeze(1), -math.inf).argsort(1, descending=True)
    assert not torch.equal(found, likeliest[:, :3])


def test_with_few_classes_every_wrong_one_is_near_and_of_many_the_20_likeliest_are_asked():
    threat = ThreatModel("linf", 0.1)
    for classes, expected in ((2, 1), (4, 3), (30, 9)):
        model, x = linear(classes), images()
        y = model(x).argmax(1)
        found = nearest_classes(model, x, y, threat, 9)
        assert found.shape == (len(x), expected)
        assert (found != y.unsqueeze(1)).all()
        order = model(x).argsort(1, descending=True)
        assert (found.unsqueeze(2) == order[:, None, :21]).any(2).all()


def test_malt_reaches_the_nearest_class_where_the_ball_holds_no_other():
    model, x = linear(6), images()
    y = model(x).argmax(1)
    nearest = distances(model, x, y, "linf").sort(1)
    for i in range(len(x)):
        eps = float(nearest.values[i, :2].mean())
        if eps > 0.4:  # the pixel range would cut the ball
            continue
        x_adv = malt(
            model,
            x[i : i + 1],
            y[i : i + 1],
            threat=ThreatModel("linf", eps),
            steps=20,
            num_targets=1,
            generator=SampleGenerator(0, 0),
        )
        assert model(x_adv).argmax(1).item() == nearest.indices[i, 0]


class Counted(nn.Module):
    """Counts forwards and input-gradient backwards of a model, an image each."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        z = self.model(x)
        if z.requires_grad:
            z.register_hook(self._count)
        return z

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


def run(stage: Stage, model: Any, x: Tensor, y: Tensor) -> Tensor:
    return stage.run(model, x, y, SampleGenerator(0, 0, stream=stage.label))


STANDARD = 201 + 1810 + 9 * 100 * 3 + 5000
"""Passes of APGD-CE, APGD-T, FAB-T (an iteration: two forwards and a backward) and Square."""


def test_a_standing_sample_costs_at_most_a_third_of_the_passes_of_the_standard_ensemble():
    threat, x = ThreatModel("linf", 1e-6), images(1)
    passes = {}
    for name in attack_names(["strong"], threat):
        counted = Counted(linear(10))
        for stage in stages((name,), threat, 10):
            run(stage, counted, x, counted.model(x).argmax(1))
        passes[name] = counted.forwards + counted.backwards
    assert sum(passes.values()) <= STANDARD / 3
    ranking, scoring = 3 * (2 + 9), 2 + 6
    assert passes["apgd-cw-10"] == 21
    assert passes["apgd-square-2000"] == 41 + 2000
    assert passes["malt-20"] == ranking + 9 * 41 + scoring


def test_targets_are_split_over_stages_by_how_many_classes_there_are():
    labels = {
        classes: [stage.label for stage in stages(("malt-5",), ThreatModel("linf", 0.1), classes)]
        for classes in (2, 3, 10, 1000)
    }
    assert labels == {
        2: ["malt-5 target 1"],
        3: ["malt-5 target 1", "malt-5 target 2"],
        10: ["malt-5 target 1", "malt-5 targets 2 to 3", "malt-5 targets 4 to 9"],
        1000: ["malt-5 target 1", "malt-5 targets 2 to 3", "malt-5 targets 4 to 9"],
    }


@every_norm
def test_what_becomes_of_a_sample_does_not_depend_on_the_others(norm):
    threat, model, x = (
        ThreatModel(norm, {"linf": 0.05, "l2": 0.2, "l1": 0.5}[norm]),
        linear(5),
        images(),
    )
    model = model.double()
    f = lambda images: model(images.double())  # noqa: E731  # in float64, batches round alike
    y = f(x).argmax(1)
    alone = torch.tensor([5, 2])
    for stage in stages(SHORT, threat, 5):
        together = run(stage, f, x, y)
        source = SampleGenerator(0, 0, indices=alone.tolist(), stream=stage.label)
        apart = stage.run(f, x[alone], y[alone], source)
        assert_close(apart, together[alone], rtol=0, atol=1e-6)


def test_a_search_goes_on_from_where_the_gradient_led():
    threat, model, x = ThreatModel("linf", 0.05), linear(5), images()
    y = model(x).argmax(1)
    climbed, searched = (
        parse_evaluation_attack(name) for name in ("apgd-cw-20", "apgd-square-300")
    )
    # The slope of a linear model is the same everywhere: the climb finds the best corner.
    runs = [run_attack(model, x, y, threat, a, SampleGenerator(0, 0)) for a in (climbed, searched)]
    assert_close(cw_margin(model(runs[1]), y), cw_margin(model(runs[0]), y), rtol=0, atol=1e-5)


def test_a_search_finds_what_a_rounded_model_hides_from_the_gradient():
    threat, plain, x = ThreatModel("linf", 0.3), linear(5), images()

    def model(images: Tensor) -> Tensor:
        return plain((images * 20).round() / 20 + 0 * images)

    y = model(x).argmax(1)
    left = {}
    for name in ("apgd-cw-20", "apgd-square-500"):
        attack = parse_evaluation_attack(name)
        x_adv = run_attack(model, x, y, threat, attack, SampleGenerator(0, 0))
        left[name] = int((model(x_adv).argmax(1) == y).sum())
    assert left["apgd-square-500"] < left["apgd-cw-20"]


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """PGD on the float32 cross-entropy of the batch, as it is usually written."""
    x_adv = x.clone()
    for _ in range(20):
        leaf = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        x_adv = torch.clamp(x_adv + eps / 4 * gradient.sign(), x - eps, x + eps)
    return x_adv


def curved() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 6)
    ).requires_grad_(False)


def test_a_scale_of_the_logits_does_not_hide_from_parts_of_strong_what_it_hides_from_plain_pgd():
    model, x, eps = curved(), images(), 0.15
    y = model(x).argmax(1)
    threat = ThreatModel("linf", eps)
    masked = lambda images: 1e6 * model(images)  # noqa: E731
    assert torch.equal(masked(plain_pgd(masked, x, y, eps)).argmax(1), y)
    broken = {}
    for scale in (1e-4, 1.0, 1e4, 1e6):
        standing = torch.ones(len(x), dtype=torch.bool)
        for stage in stages(SHORT, threat, 6):
            x_adv = run(stage, lambda images, s=scale: s * model(images), x, y)
            assert (threat.distance(x_adv, x) <= eps + 1e-6).all()
            standing &= model(x_adv).argmax(1) == y
        broken[scale] = (~standing).tolist()
    assert sum(broken[1.0]) > len(x) // 2
    assert all(found == broken[1.0] for found in broken.values())


@pytest.mark.parametrize("name", ["apgd-cw-3-2", "apgd-pm-3", "malt-3-2", "square-60"])
def test_a_part_of_strong_is_an_evaluation_attack_by_its_own_name(name):
    model, x = curved(), images()
    y, threat = model(x).argmax(1), ThreatModel("linf", 0.1)
    x_adv = run_attack(model, x, y, threat, parse_evaluation_attack(name), SampleGenerator(0, 0))
    assert (cw_margin(model(x_adv), y) > cw_margin(model(x), y)).all()


@every_norm
def test_strong_is_made_of_evaluation_attacks_in_every_norm(norm):
    names = attack_names(["strong"], ThreatModel(norm, 0.1))
    assert names == list(ENSEMBLES["strong"](ThreatModel(norm, 0.1)))
    parts = {parse_evaluation_attack(name).method for name in names}
    kinds = {parse_evaluation_attack(name).method for name in SHORT}
    assert parts >= (kinds - {"apgd-pm"} | {"apgd-ce-l1", "apgd-t-l1"} if norm == "l1" else kinds)
