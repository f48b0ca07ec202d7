"""Claims about ZeroGrad, on a linear scorer whose gradient is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dat_ds.attacks import SampleGenerator, ThreatModel
from dat_ds.attacks.zero_grad import quantile, zero_grad

pytestmark = pytest.mark.fast
THREAT = ThreatModel("linf", 8 / 255)


def scorer(weights: Tensor):
    """Two logits, ``w x`` and 0: the gradient of the loss of class 1 is along ``w``."""
    return lambda x: torch.stack([(x * weights).flatten(1).sum(1), x.new_zeros(len(x))], dim=1)


def test_pixels_with_large_gradients_reach_the_border_and_the_others_keep_their_start():
    weights = torch.linspace(-1, 1, 16).view(1, 4, 4)
    x = torch.full((3, 1, 4, 4), 0.5)
    y = torch.ones(3, dtype=torch.int64)
    x_adv = zero_grad(scorer(weights), x, y, threat=THREAT, generator=SampleGenerator(0, 0))
    start = THREAT.random_start(x, SampleGenerator(0, 0))
    moves = weights.abs() >= torch.quantile(weights.abs().flatten(), 0.35)
    expected = torch.where(moves, x + THREAT.eps * weights.sign(), start)
    torch.testing.assert_close(x_adv, expected, atol=1e-7, rtol=0)


def test_nothing_zeroed_is_fgsm_from_a_random_start():
    from dat_ds.attacks import fgsm_rs

    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(4, 3, 5, 5, generator=generator), torch.tensor([0, 1, 0, 1])
    model = scorer(torch.randn(3, 5, 5, generator=generator))
    ours = zero_grad(
        model, x, y, threat=THREAT, zeroed=0.0, generator=SampleGenerator(1, 2), step_size=0.04
    )
    theirs = fgsm_rs(model, x, y, threat=THREAT, generator=SampleGenerator(1, 2), step_size=0.04)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("share", [0.0, 0.35, 0.5, 1.0])
def test_the_quantile_is_torchs(share):
    values = torch.rand(5, 3, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        quantile(values, share), torch.quantile(values.flatten(1), share, dim=1)
    )


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="zero_grad is defined for norm 'linf'"):
        zero_grad(
            scorer(torch.ones(1)),
            torch.rand(1, 1, 1, 1),
            torch.zeros(1),
            threat=ThreatModel("l2", 1),
        )
