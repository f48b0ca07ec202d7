"""Claims about nuclear-norm adversarial training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dat_ds.objectives.nuat import Nuat

pytestmark = pytest.mark.fast


def logits(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, z_adv = (torch.randn(rows, 4, generator=generator) for _ in range(2))
    return z, z_adv


def test_the_objective_is_its_formula():
    z, z_adv = logits()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    terms = Nuat(beta=4.5)(z_adv, y, z)
    norm = torch.linalg.matrix_norm(z_adv - z, "nuc") / 6
    torch.testing.assert_close(terms["loss"], F.cross_entropy(z, y) + 4.5 * norm)


def test_of_one_image_it_is_the_length_of_the_difference():
    z, z_adv = logits(1)
    terms = Nuat()(z_adv, torch.tensor([2]), z)
    torch.testing.assert_close(terms["consistency_loss"], (z_adv - z).norm())


def test_rows_of_other_ranks_make_one_matrix():
    z, z_adv = logits()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    whole = Nuat()(z_adv, y, z)["consistency_loss"]

    def gather(rows, classes):
        return (z_adv - z)[3:], y[3:]

    half = Nuat()(z_adv[:3], y[:3], z[:3], gather=gather)["consistency_loss"]
    torch.testing.assert_close(half, whole)


def test_the_gradient_is_that_of_the_singular_vectors():
    z, z_adv = logits()
    z_adv.requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    (gradient,) = torch.autograd.grad(Nuat(beta=1.0)(z_adv, y, z)["loss"], z_adv)
    u, _, vh = torch.linalg.svd((z_adv - z).detach(), full_matrices=False)
    torch.testing.assert_close(gradient, u @ vh / 6, atol=1e-5, rtol=1e-4)


def test_equal_outputs_have_no_norm_and_a_finite_gradient():
    z, _ = logits()
    z_adv = z.clone().requires_grad_()
    loss = Nuat()(z_adv, torch.zeros(6, dtype=torch.int64), z)["loss"]
    (gradient,) = torch.autograd.grad(loss, z_adv)
    assert gradient.isfinite().all()
