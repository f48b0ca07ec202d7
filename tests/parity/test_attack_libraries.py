"""Claim: our PGD and FGSM are those of foolbox and torchattacks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import ThreatModel, fgsm, pgd

# The libraries take the gradient of a float32 mean loss and we of a float64 one; projections are
# written in another order. Both move a pixel by a few 2^-24 per step.
CLOSE = {"rtol": 0, "atol": 1e-5}

CASES = [
    ("linf", 8 / 255, 2 / 255, 10),
    ("linf", 0.1, 0.03, 5),
    ("l2", 0.5, 0.1, 10),
    ("l2", 0.2, 0.15, 5),
]
every_case = pytest.mark.parametrize(("norm", "eps", "step_size", "steps"), CASES)


@functools.cache
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth trained convolutional network and images with pixels at both ends of the range."""
    torch.manual_seed(0)
    y = torch.arange(64) % 4
    x = (torch.rand(4, 3, 6, 6)[y] + 0.2 * torch.randn(64, 3, 6, 6)).clamp(0, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def mean_loss(x_adv: Tensor) -> float:
    model, _, y = problem()
    with torch.no_grad():
        return F.cross_entropy(model(x_adv), y).item()


def ours(norm: str, eps: float, step_size: float, steps: int, **options: object) -> Tensor:
    return pgd(
        *problem(),
        threat=ThreatModel(norm, eps),
        steps=steps,
        step_size=step_size,
        **{"random_start": False, **options},
    )


def assert_same_attack(x_adv: Tensor, reference: Tensor) -> None:
    assert mean_loss(reference) > mean_loss(problem()[1]) + 0.05, "the attack does something"
    assert_close(x_adv, reference, **CLOSE)
    assert mean_loss(x_adv) == pytest.approx(mean_loss(reference), abs=1e-5)


@every_case
def test_pgd_from_the_image_equals_foolbox(norm, eps, step_size, steps):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = problem()
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm](
        abs_stepsize=step_size, steps=steps, random_start=False
    )
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    # ``run`` rather than ``__call__``, which gives back x where the attack does not succeed.
    reference = attack.run(network, x, foolbox.criteria.Misclassification(y), epsilon=eps)
    assert_same_attack(ours(norm, eps, step_size, steps), reference)


@every_case
def test_targeted_pgd_from_the_image_equals_foolbox(norm, eps, step_size, steps):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = problem()
    target = (y + 1) % 4
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm](
        abs_stepsize=step_size, steps=steps, random_start=False
    )
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.TargetedMisclassification(target)
    reference = attack.run(network, x, criterion, epsilon=eps)
    x_adv = pgd(
        model,
        x,
        target,
        threat=ThreatModel(norm, eps),
        steps=steps,
        step_size=step_size,
        random_start=False,
        targeted=True,
    )
    assert_same_attack(x_adv, reference)


@every_case
def test_pgd_from_the_image_equals_torchattacks(norm, eps, step_size, steps):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = problem()
    attack = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm](
        model, eps=eps, alpha=step_size, steps=steps, random_start=False
    )
    assert_same_attack(ours(norm, eps, step_size, steps), attack(x, y))


@pytest.mark.parametrize("eps", [2 / 255, 0.05])
def test_fgsm_equals_foolbox_and_torchattacks(eps):
    foolbox = pytest.importorskip("foolbox")
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = problem()
    x_adv = fgsm(model, x, y, threat=ThreatModel("linf", eps))
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(y)
    reference = foolbox.attacks.FGSM().run(network, x, criterion, epsilon=eps)
    assert_close(x_adv, reference, **CLOSE)
    assert_close(x_adv, torchattacks.FGSM(model, eps=eps)(x, y), **CLOSE)


class OurStart:
    """Stands in for a library's random start, so that both begin at the same point."""

    def __init__(self, norm: str, eps: float) -> None:
        self.threat = ThreatModel(norm, eps)

    def draw(self) -> Tensor:
        return self.threat.random_start(problem()[1], torch.Generator().manual_seed(11))


@every_case
def test_pgd_from_the_same_random_start_equals_foolbox(norm, eps, step_size, steps, monkeypatch):
    foolbox = pytest.importorskip("foolbox")
    eagerpy = pytest.importorskip("eagerpy")
    model, x, y = problem()
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    start = OurStart(norm, eps)
    monkeypatch.setattr(kind, "get_random_start", lambda *_: eagerpy.astensor(start.draw()))
    attack = kind(abs_stepsize=step_size, steps=steps, random_start=True)
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    reference = attack.run(network, x, foolbox.criteria.Misclassification(y), epsilon=eps)
    generator = torch.Generator().manual_seed(11)
    x_adv = ours(norm, eps, step_size, steps, random_start=True, generator=generator)
    assert_same_attack(x_adv, reference)


def mean_and_error(losses: list[float]) -> tuple[float, float]:
    values = torch.tensor(losses, dtype=torch.float64)
    return values.mean().item(), values.std().item() / math.sqrt(len(losses))


def assert_same_mean(attack: Callable[[], Tensor], reference: Callable[[], Tensor]) -> None:
    """Mean losses over 20 random starts differ by less than four standard errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the libraries draw from the global generator
        mine, my_error = mean_and_error([mean_loss(attack()) for _ in range(20)])
        theirs, their_error = mean_and_error([mean_loss(reference()) for _ in range(20)])
    assert my_error > 0, "the starts are random"
    assert abs(mine - theirs) < 4 * math.hypot(my_error, their_error)


# One step, so that the start still shows in the result.
def test_random_linf_starts_give_the_mean_loss_of_foolbox():
    # Its l2 start is uniform in the ball; ours, like torchattacks', has a uniform length.
    foolbox = pytest.importorskip("foolbox")
    model, x, y = problem()
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=1, random_start=True)
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(y)
    generator = torch.Generator().manual_seed(0)
    assert_same_mean(
        lambda: ours("linf", 0.1, 0.03, 1, random_start=True, generator=generator),
        lambda: attack.run(network, x, criterion, epsilon=0.1),
    )


@pytest.mark.parametrize(("norm", "eps", "step_size"), [("linf", 0.1, 0.03), ("l2", 0.5, 0.1)])
def test_random_starts_give_the_mean_loss_of_torchattacks(norm, eps, step_size):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = problem()
    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    attack = kind(model, eps=eps, alpha=step_size, steps=1, random_start=True)
    generator = torch.Generator().manual_seed(0)
    assert_same_mean(
        lambda: ours(norm, eps, step_size, 1, random_start=True, generator=generator),
        lambda: attack(x, y),
    )
