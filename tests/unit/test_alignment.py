"""Claims about gradient alignment: its value, and its gradient against a second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import SampleGenerator, ThreatModel
from dat_ds.objectives.grad_align import alignment_probes
from tests.distributed import tiny

pytestmark = pytest.mark.fast

THREAT = ThreatModel("linf", 0.02)
Y = torch.tensor([0, 1, 2, 1])


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    return net.double()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 1, 4, 4, generator=generator, dtype=torch.float64)


def cosine_by_second_derivatives(model: nn.Module, x: Tensor) -> Tensor:
    """The regulariser from its definition, differentiable in the weights."""
    near = THREAT.random_start(x, SampleGenerator(0, 0))
    gradients = []
    for point in (x, near):
        leaf = point.clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), Y, reduction="sum")
        gradients.append(torch.autograd.grad(loss, leaf, create_graph=True)[0].flatten(1))
    return 1 - F.cosine_similarity(*gradients, dim=1)


def test_the_penalty_is_one_minus_the_cosine_and_has_its_gradient():
    model, x = smooth_net(), images()
    expected = cosine_by_second_derivatives(model, x).mean()
    probes = alignment_probes(model, x, Y, threat=THREAT, generator=SampleGenerator(0, 0))
    penalty = probes.penalty(model(probes.images), Y)
    assert_close(penalty, expected, rtol=1e-10, atol=1e-12)
    exact = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    ours = torch.autograd.grad(penalty, list(model.parameters()))
    # The last bias does not enter the first gradient's definition but through the softmax.
    for a, b in zip(ours, exact, strict=True):
        assert b is not None
        assert_close(a, b, rtol=0, atol=2e-3 * float(b.abs().max()))  # h^2 with h of 0.1 ||eta||


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_model_of_two_classes_is_aligned(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).to(dtype)
    probes = alignment_probes(model, images().to(dtype), Y % 2, threat=THREAT)
    assert_close(probes.misalignment, torch.zeros(4, dtype=dtype), rtol=0, atol=1e-6)
    assert probes.weights.isfinite().all()
    assert probes.images.isfinite().all()


def test_a_flat_model_has_finite_probes_and_no_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    nn.init.zeros_(model[1].weight)
    probes = alignment_probes(model, images(), Y, threat=THREAT)
    gradients = torch.autograd.grad(
        probes.penalty(model(probes.images), Y), list(model.parameters())
    )
    assert probes.images.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_the_engine_probes_the_ball_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    import dat_ds
    from dat_ds.minmax import inner

    seen: list[float] = []

    def probed(*args: Any, threat: ThreatModel, **options: Any) -> Any:
        seen.append(threat.eps)
        return alignment_probes(*args, threat=threat, **options)

    monkeypatch.setattr(inner, "alignment_probes", probed)
    sections = {
        "threat_model": {"eps": 0.1},
        "attack": {"name": "fgsm", "eps_warmup": 0.5},
        "objective": {"grad_align": 0.2},
        "schedule": {"name": "constant", "max_steps": 4},
    }
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=tiny.config(0, dat=sections))
    for _ in range(4):
        engine.backward(engine(*tiny.images(4)))
        engine.step()
    engine.close()
    assert seen == pytest.approx([0, 0.05, 0.1, 0.1])
