"""Our Auto-PGD, FAB, Square and ensemble are as strong as AutoAttack's own, on real digits."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from pyautoattack.autoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dat_ds.attacks import (
    SampleGenerator,
    ThreatModel,
    apgd,
    fab,
    parse_evaluation_attack,
    square,
)
from dat_ds.attacks.ensemble import attack_names, stages_of

STEPS = 30
EPS = {"linf": 0.1, "l2": 0.6, "l1": 2.5}
THEIR_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@functools.cache
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN trained for a second, and 300 images it has not seen and classifies correctly."""
    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        batch = torch.arange(step * 64, step * 64 + 64) % 1300
        optimizer.zero_grad()
        noisy = (x[batch] + 0.1 * torch.randn_like(x[batch])).clamp(0, 1)
        F.cross_entropy(model(noisy), y[batch]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    x, y = x[1300:], y[1300:]
    correct = model(x).argmax(1) == y
    return model, x[correct][:300].contiguous(), y[correct][:300]


def robust_acc(x_adv: Tensor) -> float:
    model, _, y = digits()
    return (model(x_adv).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_is_within_a_point_of_autoattacks(norm: str, loss: str) -> None:
    model, x, y = digits()
    ours, theirs = [], []
    for seed in range(3):
        x_adv = apgd(
            model,
            x,
            y,
            threat=ThreatModel(norm, EPS[norm]),
            steps=STEPS,
            loss=loss,
            generator=SampleGenerator(seed, 0),
        )
        ours.append(robust_acc(x_adv))
        attack = APGDAttack(
            model, STEPS, THEIR_NORMS[norm], eps=EPS[norm], seed=seed, loss=loss, device="cpu"
        )
        theirs.append(robust_acc(attack.perturb(x, y)))
    assert 0.1 < sum(theirs) / 3 < 0.9, "strong enough to be measured, not so strong as to hide it"
    # 300 images and 3 starts: a point is 9 of 900 outcomes.
    assert sum(ours) / 3 <= sum(theirs) / 3 + 0.01, (ours, theirs)


def test_targeted_apgd_is_within_a_point_of_autoattacks() -> None:
    model, x, y = digits()
    x, y = x[:100], y[:100]
    x_adv = apgd(
        model,
        x,
        y,
        threat=ThreatModel("linf", EPS["linf"]),
        steps=STEPS,
        loss="dlr-targeted",
        generator=SampleGenerator(0, 0),
    )
    attack = APGDAttack_targeted(model, STEPS, "Linf", eps=EPS["linf"], device="cpu")
    found = attack.perturb(x, y)
    ours, theirs = ((model(images).argmax(1) == y).double().mean() for images in (x_adv, found))
    assert ours <= theirs + 0.01
    assert ours < 0.9


WIDE = {"linf": 1.0, "l2": 8.0, "l1": 64.0}
"""Radii within which every image has a neighbour of another class."""


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targets", [None, 3])
def test_fab_finds_distances_as_small_as_autoattacks(norm: str, targets: int | None) -> None:
    model, x, y = digits()
    x, y = x[:40], y[:40]
    threat = ThreatModel(norm, WIDE[norm])
    attack = FABAttack_PT(
        model, THEIR_NORMS[norm], n_iter=STEPS, eps=WIDE[norm], seed=0, device="cpu", verbose=False
    )
    ours, theirs = [], []
    # Theirs attacks what an earlier target has broken no more: one target at a time.
    for rank in range(targets or 1):
        target = None
        if targets is not None:
            target = model(x).argsort(dim=1, descending=True)[:, rank + 1]
        x_adv = fab(model, x, y, threat=threat, steps=STEPS, targets=target)
        found = their_fab(attack, x, y, rank if targets else None)
        fooled = (model(x_adv).argmax(1) != y) & (model(found).argmax(1) != y)
        assert fooled.double().mean() > 0.9
        ours.append(threat.distance(x_adv, x)[fooled])
        theirs.append(threat.distance(found, x)[fooled])
    ratio = torch.cat(ours) / torch.cat(theirs)
    assert 0.97 < ratio.median() < 1.002
    assert ratio.quantile(0.95) < 1.02


def their_fab(attack: FABAttack_PT, x: Tensor, y: Tensor, rank: int | None) -> Tensor:
    """Images of their FAB, towards the wrong class of one rank where there is one."""
    if rank is None:
        attack.targeted = False
        return attack.perturb(x, y)
    attack.targeted, attack.target_class = True, rank + 2
    found = attack.attack_single_run(x, y, use_rand_start=False, is_targeted=True)
    return found


@pytest.mark.parametrize("norm", EPS)
def test_square_is_as_strong_as_autoattacks(norm: str) -> None:
    model, x, y = digits()
    ours, theirs = [], []
    for seed in range(3):
        x_adv = square(
            model,
            x,
            y,
            threat=ThreatModel(norm, EPS[norm]),
            queries=100,
            generator=SampleGenerator(seed, 0),
        )
        ours.append(robust_acc(x_adv))
        attack = SquareAttack(
            model,
            THEIR_NORMS[norm],
            n_queries=100,
            eps=EPS[norm],
            p_init=0.8,
            seed=seed,
            device="cpu",
            verbose=False,
            resc_schedule=False,
        )
        theirs.append(robust_acc(attack.perturb(x, y)))
    assert 0.1 < sum(theirs) / 3 < 0.95, "strong enough to be measured, not so strong as to hide it"
    assert sum(ours) / 3 <= sum(theirs) / 3 + 0.015, (ours, theirs)


SHORT = {"-100": "-10", "-5000": "-60"}
"""Smaller budgets, the same for both."""


@pytest.mark.parametrize("norm", EPS)
def test_the_ensemble_is_within_half_a_point_of_autoattack(norm: str) -> None:
    model, x, y = digits()
    x, y = x[:200], y[:200]
    threat = ThreatModel(norm, EPS[norm])
    standing = torch.ones(len(x), dtype=torch.bool)
    for name in attack_names(["standard"], threat):
        for long, short in SHORT.items():
            name = name.replace(long, short)
        for stage in stages_of(parse_evaluation_attack(name), threat, 10):
            left = standing.nonzero().flatten()
            source = SampleGenerator(0, 0, indices=left.tolist())
            x_adv = stage.run(model, x[left], y[left], source)
            standing[left] = model(x_adv).argmax(1) == y[left]
    theirs = AutoAttack(model, norm=THEIR_NORMS[norm], eps=EPS[norm], seed=0, version="standard")
    for attack in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        attack.n_iter = 10
    theirs.square.n_queries = 60
    found, _ = theirs.run_standard_evaluation(x, y, batch_size=200)
    ours, expected = standing.double().mean(), (model(found).argmax(1) == y).double().mean()
    assert 0.05 < expected < 0.9
    assert ours <= expected + 0.005
