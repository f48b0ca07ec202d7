"""Claims about FGSM with prior-guided initialisation: its attack, its prior and its objective."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dat_ds.attacks import InputGradient, SampleGenerator, ThreatModel, build_attack
from dat_ds.attacks.fgsm_pgi import PriorPerturbation, fgsm_pgi
from dat_ds.config import load_config
from dat_ds.errors import ConfigError
from dat_ds.objectives.pgi import Pgi

pytestmark = pytest.mark.fast
THREAT = ThreatModel("linf", 8 / 255)
WEIGHTS = torch.linspace(-1, 1, 12).view(3, 2, 2)


def scorer(x):
    """Two logits, ``w x`` and 0: the gradient of the loss of class 1 is along ``w``."""
    return torch.stack([(x * WEIGHTS).flatten(1).sum(1), x.new_zeros(len(x))], dim=1)


def batch(count: int = 4, slot: int = 0, step: int = 0) -> SimpleNamespace:
    x = 0.4 + 0.2 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    moment = SimpleNamespace(slot=slot, generator=lambda stream: SampleGenerator(0, step))
    return SimpleNamespace(x=x, y=torch.ones(count, dtype=torch.int64), moment=moment, samples=None)


def attacked(strategy: PriorPerturbation, part: SimpleNamespace):
    attack = build_attack({"name": "fgsm_pgi", "threat_model": THREAT})
    return attack, strategy.images(
        part, attack, lambda **carried: attack(scorer, part.x, part.y, **carried)
    )


def test_it_is_one_fgsm_step_from_the_start():
    part = batch()
    start = THREAT.random_start(part.x, SampleGenerator(3, 0))
    found = fgsm_pgi(scorer, part.x, part.y, threat=THREAT, start=start)
    expected = THREAT.project(start + THREAT.eps * WEIGHTS.sign(), part.x)
    torch.testing.assert_close(found, expected)


def test_the_next_batch_starts_where_this_one_ended():
    strategy, first, second = PriorPerturbation(), batch(step=0), batch(step=1)
    attack, found = attacked(strategy, first)
    assert torch.equal(found.start, THREAT.random_start(first.x, SampleGenerator(0, 0)))
    strategy.after_backward(first, found, attack, InputGradient())
    _, later = attacked(strategy, second)
    expected = THREAT.project(second.x + (found.images - first.x), second.x)
    assert torch.equal(later.start, expected)


def test_an_attack_that_is_thrown_away_moves_no_prior_and_slots_are_apart():
    strategy = PriorPerturbation()
    _, found = attacked(strategy, batch())
    assert strategy.state_dict() == {}
    strategy.after_backward(batch(), found, None, InputGradient())
    _, other = attacked(strategy, batch(slot=1))
    assert torch.equal(other.start, THREAT.random_start(batch().x, SampleGenerator(0, 0)))


def test_the_prior_goes_through_a_checkpoint_and_a_smaller_batch():
    strategy, again = PriorPerturbation(), PriorPerturbation()
    attack, found = attacked(strategy, batch(4))
    strategy.after_backward(batch(4), found, attack, InputGradient())
    again.load_state_dict(strategy.state_dict())
    small = batch(2, step=5)
    attack, fewer = attacked(again, small)
    again.after_backward(small, fewer, attack, InputGradient())
    prior = again.state_dict()[0]
    assert len(prior) == 4
    assert torch.equal(prior[2:], strategy.state_dict()[0][2:])
    assert torch.equal(prior[:2], fewer.images - small.x)


def test_the_objective_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    z_adv, z_start = (torch.randn(5, 4, generator=generator) for _ in range(2))
    y = torch.tensor([0, 1, 2, 3, 0])
    terms = Pgi(beta=10.0, label_smoothing=0.4)(z_adv, y, logits_start=z_start)
    expected = F.cross_entropy(z_adv, y, label_smoothing=0.4) + 10 * F.mse_loss(z_adv, z_start)
    torch.testing.assert_close(terms["loss"], expected)


def test_an_attack_that_tells_no_start_is_refused_with_the_objective():
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "dat": {"objective": {"name": "pgi"}, "optimizer": {"name": "adamw"}},
    }
    with pytest.raises(
        ConfigError, match=r"dat\.objective\.name='pgi' compares outputs with .*pgd"
    ):
        load_config(config)
    config["dat"]["attack"] = {"name": "fgsm_pgi"}
    assert load_config(config).dat.attack.tells_start
