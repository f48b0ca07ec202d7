"""Short attacks that take no gradient, and a surrogate to transfer from.

Deliberately independent of the attacks under evaluation. They are not a measure of robustness:
where one of them succeeds though the white-box attack failed, the white-box attack was misled.

Shapes: ``B`` images, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_ds.attacks import Generator, ThreatModel, cw_margin, rand_like
from dat_ds.attacks.noise import randn_like
from dat_ds.attacks.projections import per_sample

Logits = Callable[[Tensor], Tensor]
_FIRST_SIDE, _LAST_SIDE = 0.6, 0.1  # of the square, as shares of the image's side
_PAIRS = 16  # of antithetic draws for one estimated gradient
_SURROGATE_IMAGES, _SURROGATE_STEPS = 1024, 150


def random_search(
    logits: Logits, x: Tensor, y: Tensor, threat: ThreatModel, queries: int, generator: Generator
) -> Tensor:
    """Images of the smallest margin that random changes of square patches find.

    Begins with a random image of the ball; each query changes a square of it and is kept where the
    margin falls. In the spirit of Square (Andriushchenko et al., ECCV 2020, arXiv 1912.00049).

    Args:
        logits: Images to logits.
        x: Images.
        y: Classes ``(B,)``.
        threat: Allowed perturbations.
        queries: Forwards of each image.
        generator: Source of randomness.
    """
    best = threat.random_start(x, generator)
    if threat.norm == "linf":
        columns = rand_like(x[:, :, :1], generator).sub_(0.5).sign_()
        best = threat.project(x + threat.eps * columns, x)
    value = cw_margin(logits(best), y)
    height, width = x.shape[2:]
    for query in range(queries - 1):
        share = _FIRST_SIDE * (_LAST_SIDE / _FIRST_SIDE) ** (query / max(queries - 2, 1))
        side = max(1, round(share * min(height, width)))
        corner = rand_like(x.flatten(1)[:, :2], generator)
        top = (corner[:, 0] * (height - side + 1)).long()
        left = (corner[:, 1] * (width - side + 1)).long()
        row = torch.arange(height, device=x.device)
        column = torch.arange(width, device=x.device)
        in_rows = (row >= top[:, None]) & (row < top[:, None] + side)
        in_columns = (column >= left[:, None]) & (column < left[:, None] + side)
        patch = (in_rows[:, None, :, None] & in_columns[:, None, None, :]).to(x.dtype)
        if threat.norm == "linf":
            sign = rand_like(x[:, :, :1, :1], generator).sub_(0.5).sign_()
            moved = torch.where(patch > 0, x + threat.eps * sign, best)
        else:
            noise = randn_like(x[:, :, :1, :1], generator) * patch
            size = threat.distance(noise, torch.zeros_like(noise)).clamp_min(1e-12)
            moved = best + noise * per_sample(threat.eps / size, x)
        moved = threat.project(moved, x)
        found = cw_margin(logits(moved), y)
        better = found > value
        best = torch.where(per_sample(better, x), moved, best)
        value = torch.where(better, found, value)
    return best


def estimated_ascent(
    logits: Logits, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, generator: Generator
) -> Tensor:
    """PGD on the margin with a gradient estimated from differences between random images.

    Antithetic Gaussian draws (Ilyas et al., ICML 2018, arXiv 1804.08598), as wide as the ball: what
    is piecewise constant has a slope at that scale.

    Args:
        logits: Images to logits.
        x: Images.
        y: Classes ``(B,)``.
        threat: Allowed perturbations.
        steps: Steps of ``2.5 eps / steps``, each of 32 forwards of each image.
        generator: Source of randomness.
    """
    width = threat.eps / {"linf": 2, "l2": math.sqrt(x[0].numel()), "l1": x[0].numel()}[threat.norm]
    width = max(width, 1e-3)
    x_adv, average = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        estimate = torch.zeros_like(x)
        for _ in range(_PAIRS):
            noise = randn_like(x, generator)
            ahead = cw_margin(logits(x_adv + width * noise), y)
            behind = cw_margin(logits(x_adv - width * noise), y)
            estimate += noise * per_sample((ahead - behind).to(x.dtype), x)
        size = estimate.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        average = average + estimate / per_sample(size, x)  # early estimates stay useful
        step = threat.steepest(average.clone(), x_adv) * (2.5 * threat.eps / steps)
        x_adv = threat.project(x_adv + step, x)
    return x_adv


def surrogate_of(logits: Logits, x: Tensor, threat: ThreatModel, generator: Generator) -> nn.Module:
    """A small convolutional network that learned a model's logits at and around ``x``.

    Args:
        logits: The model.
        x: Images to query it at, with noise as wide as the ball.
        threat: Pixel range, and the width of the noise.
        generator: Source of randomness, of its weights too.
    """
    copies = max(1, _SURROGATE_IMAGES // len(x))
    starts = [x, *(threat.random_start(x, generator) for _ in range(copies - 1))]
    images = torch.cat(starts)
    targets = logits(images).to(x.dtype)
    # Its scale must not matter: temperature is among the faults.
    targets = (targets - targets.mean(dim=1, keepdim=True)) / targets.std().clamp_min(1e-12)
    network = _small_network(x.shape[1], targets.shape[1]).to(x.device, x.dtype)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            draw = randn_like(parameter.detach().flatten()[None], generator)
            parameter.data.copy_(draw.view_as(parameter) * math.sqrt(2 / fan_in))
        else:
            parameter.data.zero_()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    batch = min(128, len(images))
    for step in range(_SURROGATE_STEPS):
        rows = torch.arange(step * batch, (step + 1) * batch, device=x.device) * 7 % len(images)
        with torch.enable_grad():
            loss = F.mse_loss(network(images[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
    return network.requires_grad_(False)


def _small_network(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, classes),
    )
