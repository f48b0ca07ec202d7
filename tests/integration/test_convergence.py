"""The min-max problem of the convergence check has the answers it is judged by."""

from __future__ import annotations

import pytest
import torch

from dat_ds.bench.convergence import Problem, _run
from dat_ds.processes import on_ranks

EPS, RATE, STEPS = 0.5, 0.06, 160


def test_its_stationarity_is_the_gradient_of_the_worst_case() -> None:
    problem = Problem()
    theta = (problem.stationary + 0.05 * torch.randn(problem.stationary.shape)).double()
    theta.requires_grad_()
    distances = (theta - problem.images.double()).flatten(1).norm(dim=1)
    ((distances + EPS).square() / 2).mean().backward()
    assert problem.stationarity(theta.detach()) == pytest.approx(float(theta.grad.square().sum()))
    assert problem.stationarity(problem.stationary) < 1e-10
    # A small step away, the gradient is the curvature times the step.
    step = 1e-3 * torch.randn(problem.stationary.shape)
    expected = problem.curvature**2 * float(step.square().sum())
    assert problem.stationarity(problem.stationary + step) == pytest.approx(expected, rel=0.02)


def test_the_attack_attains_the_worst_case() -> None:
    problem = Problem()
    x, theta = problem.images[:8], problem.stationary + 0.05
    away = (x - theta) / (x - theta).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert bool(((x + EPS * away >= 0) & (x + EPS * away <= 1)).all()), "no pixel is clipped"


def test_the_engine_ends_on_the_predicted_floor_with_a_codec() -> None:
    sgd = {"name": "sgd", "momentum": 0.0, "lr": RATE}
    found = on_ranks(_run, 2, sgd, "natural", STEPS)
    problem = Problem()
    plain, floor = (problem.floor(RATE, 2, codec) for codec in (None, "natural"))
    assert floor > 1.1 * plain, "the codec's noise shows"
    assert found[0] > 100 * floor
    tail = found[STEPS // 2 :]
    assert sum(tail) / len(tail) == pytest.approx(floor, rel=0.15)
