"""Claims about the strength of attacks, by radius, steps and restarts, and about their work."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import SampleGenerator, ThreatModel, cross_entropy, fgsm, pgd
from tests.unit.attack_helpers import (
    CLOSED_FORM,
    DEFINED,
    attack_named,
    batch,
    every_attack,
    every_norm,
    linear,
    mid_range,
    model_in_training,
)

pytestmark = pytest.mark.fast


@functools.cache
def blobs() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on three overlapping classes of images."""
    torch.manual_seed(0)
    centres = torch.rand(3, 1, 4, 4)
    y = torch.arange(240) % 3
    x = (centres[y] + 0.15 * torch.randn(240, 1, 4, 4)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def robust(eps: float, steps: int = 20, norm: str = "linf", **options: Any) -> Tensor:
    """Which samples stay correct under PGD."""
    model, x, y = blobs()
    x_adv = pgd(
        model,
        x,
        y,
        threat=ThreatModel(norm, eps),
        steps=steps,
        step_size=2.5 * eps / max(1, steps),
        generator=SampleGenerator(0, 0),
        **options,
    )
    return model(x_adv).argmax(1) == y


@every_norm
def test_robust_accuracy_falls_as_the_ball_grows(norm):
    scale = {"linf": 1, "l2": 3, "l1": 20}[norm]
    radii = [r * scale for r in (0, 0.02, 0.05, 0.1, 0.2, 0.4)]
    accuracies = [robust(eps, norm=norm).double().mean().item() for eps in radii]
    assert accuracies[0] > 0.95, "the model is trained"
    # 240 samples: one of them may go the other way by chance of its start.
    assert all(b <= a + 1 / 240 for a, b in itertools.pairwise(accuracies))
    assert accuracies[-1] < 0.1, "the attack is strong enough to be measured"


def test_robust_accuracy_falls_with_the_number_of_steps():
    accuracies = [robust(0.1, steps).double().mean().item() for steps in (1, 2, 5, 20)]
    assert all(b <= a + 1 / 240 for a, b in itertools.pairwise(accuracies))
    # From a random start one step of 2.5 eps is nearly enough on so small a model.
    start_only = robust(0.1, steps=0).double().mean().item()
    assert accuracies[-1] < start_only - 0.1


def test_restarts_never_help_the_defender_of_any_sample():
    model, x, y = blobs()
    attack = functools.partial(
        pgd, model, x, y, threat=ThreatModel("linf", 0.05), steps=2, step_size=0.02
    )
    once = attack(generator=SampleGenerator(0, 0))
    often = attack(generator=SampleGenerator(0, 0), restarts=5)
    correct_once = model(once).argmax(1) == y
    correct_often = model(often).argmax(1) == y
    assert not (correct_often & ~correct_once).any()
    loss_once = cross_entropy(model(once), y)
    loss_often = cross_entropy(model(often), y)
    same = correct_often == correct_once
    assert (loss_often >= loss_once)[same].all()
    assert (loss_often > loss_once).any(), "later restarts are used"


def test_restarts_prefer_a_misclassified_image_to_one_with_a_larger_loss():
    # An upside-down loss: what a run maximises is the logit of the true class.
    model, x, y = blobs()
    loss = lambda logits, y: logits.gather(1, y[:, None])[:, 0]  # noqa: E731
    attack = functools.partial(
        pgd, model, x, y, threat=ThreatModel("linf", 0.3), steps=0, step_size=0.1, loss=loss
    )
    generator = SampleGenerator(0, 0)
    runs = [attack(generator=generator) for _ in range(4)]
    hits = torch.stack([model(run).argmax(1) != y for run in runs])
    kept = attack(generator=SampleGenerator(0, 0), restarts=4)
    assert torch.equal(model(kept).argmax(1) != y, hits.any(0))
    assert hits.any(0).double().mean() > hits[0].double().mean()


def test_restarts_keep_the_best_run_of_each_sample_with_soft_labels_too():
    model, x, y = blobs()
    soft = F.one_hot(y, 3).float()
    attack = functools.partial(
        pgd, model, x, threat=ThreatModel("linf", 0.05), steps=2, step_size=0.02, restarts=3
    )
    hard_adv = attack(y, generator=SampleGenerator(0, 0))
    assert torch.equal(attack(soft, generator=SampleGenerator(0, 0)), hard_adv)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 1.0)])
def test_a_targeted_attack_brings_every_image_nearer_to_its_target(norm, eps):
    model, x, y = blobs()
    target = (y + 1) % 3
    x_adv = pgd(
        model,
        x,
        target,
        threat=ThreatModel(norm, eps),
        steps=10,
        step_size=eps / 4,
        random_start=False,
        targeted=True,
        restarts=2,
    )
    before, after = cross_entropy(model(x), target), cross_entropy(model(x_adv), target)
    assert (after < before).all()
    assert (model(x_adv).argmax(1) == target).double().mean() > 0.5


def test_a_callable_inner_loss_is_maximised():
    model, (x, y) = linear(3), mid_range()
    x_adv = fgsm(
        model, x, y, threat=ThreatModel("linf", 0.05), loss=lambda logits, y: -logits[:, 2]
    )
    weight = model[1].weight.detach()[2].view(1, 1, 4, 4)
    assert_close(x_adv, x - 0.05 * weight.sign(), **CLOSED_FORM[torch.float64])


def test_a_model_may_be_any_callable():
    model, (x, y) = linear(), mid_range()
    threat = ThreatModel("linf", 0.05)
    assert torch.equal(
        fgsm(lambda t: model(t), x, y, threat=threat), fgsm(model, x, y, threat=threat)
    )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("restarts", "scored"), [(1, 0), (3, 3)])
def test_the_number_of_forwards_is_steps_per_restart_and_one_to_score_each(steps, restarts, scored):
    model, (x, y) = model_in_training(), batch()
    pgd(
        model,
        x,
        y,
        threat=ThreatModel("linf", 0.1),
        steps=steps,
        step_size=0.1,
        restarts=restarts,
    )
    assert model.num_forwards == restarts * steps + scored


@every_attack
def test_the_same_generator_gives_the_same_images_and_another_seed_others(name):
    model, (x, y) = linear(3, torch.float32), batch()
    # Within l2 an attack does not end in the same corner from every start.
    norm = "l2" if (name, "l2") in DEFINED else "linf"
    attack = attack_named(name, norm, random_start=True)
    first = attack(model, x, y, SampleGenerator(0, 1))
    assert torch.equal(attack(model, x, y, SampleGenerator(0, 1)), first)
    assert not torch.equal(attack(model, x, y, SampleGenerator(1, 1)), first)
    seeded = [attack(model, x, y, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("scale", [2.0**-14, 2.0**20])
@pytest.mark.parametrize(("name", "norm"), [case for case in DEFINED if case[0] != "guided"])
def test_no_scale_of_the_logits_hides_a_model_from_an_attack_on_cross_entropy(name, norm, scale):
    # Of two classes the direction is the same at any confidence, so that images are equal bits.
    model, (x, _) = linear(2, torch.float32), mid_range(torch.float32)
    y = model(x).argmax(1)
    attack = attack_named(name, norm, loss="ce", restarts=2)
    plain, scaled = (
        attack(lambda images, s=s: s * model(images), x, y, SampleGenerator(0, 0))
        for s in (1.0, scale)
    )
    assert torch.equal(scaled, plain)
