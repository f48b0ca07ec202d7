"""Claims about guided adversarial training: its attack and its objective, against closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dat_ds.attacks import SampleGenerator, ThreatModel
from dat_ds.attacks.guided import distance, guided
from dat_ds.objectives.gat import Gat

pytestmark = pytest.mark.fast
THREAT = ThreatModel("linf", 8 / 255)


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).double()


@pytest.mark.parametrize("guide", ["l2", "nuclear"])
def test_the_step_is_along_the_sign_of_the_guided_losses_gradient(guide):
    model = linear()
    x = 0.3 + 0.4 * torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 3, 0])

    def in_double(images):
        return model(images.double())

    x_adv = guided(
        in_double,
        x,
        y,
        threat=THREAT,
        guide=guide,
        guide_weight=3.0,
        generator=SampleGenerator(0, 0),
    )
    sign = torch.where(THREAT.random_start(x, SampleGenerator(0, 0)) > x, 1.0, -1.0)
    noisy = (x + 0.5 * THREAT.eps * sign).double().requires_grad_()
    z, clean = model(noisy), model(x.double()).detach()
    away = (
        (z.softmax(1) - clean.softmax(1)).square().sum()
        if guide == "l2"
        else torch.linalg.matrix_norm(z - clean, "nuc")
    )
    loss = F.cross_entropy(z, y, reduction="sum") + 3.0 * away
    (gradient,) = torch.autograd.grad(loss, noisy)
    expected = THREAT.project((noisy.detach() + THREAT.eps * gradient.sign()).float(), x)
    torch.testing.assert_close(x_adv, expected, atol=1e-6, rtol=0)


def test_the_nuclear_guide_sums_to_the_batchs_norm():
    z, clean = torch.randn(6, 4), torch.randn(6, 4)
    total = distance(z, clean, "nuclear").sum()
    torch.testing.assert_close(total, torch.linalg.matrix_norm(z - clean, "nuc"))


def test_without_weight_it_is_fgsm_from_bernoulli_noise():
    model = linear().float()
    x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    x_adv = guided(model, x, y, threat=THREAT, guide_weight=0.0, generator=SampleGenerator(0, 0))
    assert float((x_adv - x).abs().max()) <= THREAT.eps + 1e-6
    assert float((x_adv - x).abs().min()) >= 0


def test_the_objective_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    z, z_adv = (torch.randn(5, 4, generator=generator) for _ in range(2))
    y = torch.tensor([0, 1, 2, 3, 0])
    terms = Gat(beta=10.0)(z_adv, y, z)
    distance_ = (z.softmax(1) - z_adv.softmax(1)).square().sum(1).mean()
    torch.testing.assert_close(terms["loss"], F.cross_entropy(z, y) + 10 * distance_)
    torch.testing.assert_close(terms["consistency_loss"], distance_)


def test_unlabelled_images_count_in_the_distance_alone():
    z, z_adv = torch.randn(2, 4), torch.randn(2, 4)
    terms = Gat()(z_adv, torch.tensor([1, -1]), z)
    torch.testing.assert_close(terms["natural_loss"], F.cross_entropy(z[:1], torch.tensor([1])) / 2)
