"""Parts of the ensemble ``strong``: losses of logits at one spread, and targets by distance.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dat_ds.attacks.apgd import apgd
from dat_ds.attacks.ascent import worst_of
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import cw_margin, targeted_margin, towards
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.square import square
from dat_ds.attacks.targets import likeliest_wrong
from dat_ds.attacks.threat import ThreatModel

STRONG = ("apgd-cw-10", "malt-20", "apgd-cw-20-8", "apgd-pm-100-2", "apgd-square-2000")
"""Attacks of the ensemble, in order, in l-infinity and l2."""
STRONG_L1 = ("apgd-cw-10", "malt-20", "apgd-ce-l1-100-3", "apgd-t-l1-50", "apgd-square-1500")
"""The same in l1, where what helps is to begin in larger balls."""
MALT_GROUPS = ((1, 1), (2, 3), (4, 9))
"""First and last target class of each stage of ``malt``, the nearest class being 1."""

_SPREAD = 3.0  # of the logits of a network trained with cross-entropy, roughly
_CANDIDATES = 20
_CLIMB = 20  # steps of Auto-PGD before a search
_SEARCH_SHARE = 0.1  # of the pixels: larger squares would undo what the gradient found


def at_one_spread(logits: Tensor) -> Tensor:
    """Logits centred and scaled to a standard deviation of 3 over the classes, per sample.

    Args:
        logits: Shape ``(B, K)``, floating point.

    Returns:
        The same for ``a * logits + b`` with any ``a > 0``; zero where all classes are equal.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    deviation = length / math.sqrt(logits.shape[1])
    return _SPREAD * centred / deviation.where(deviation > 0, 1.0)


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """``max_{k != y} p_k - p_y`` with ``p`` the softmax of logits at one spread.

    The loss of the probability margin attack (Xie et al., CVPR 2025, arXiv 2411.15210), made
    blind to the scale of the logits by :func:`at_one_spread`.

    Args:
        logits: Shape ``(B, K)``.
        y: Class indices ``(B,)`` int64.

    Returns:
        Shape ``(B,)``, in [-1, 1]; positive where misclassified.
    """
    return cw_margin(at_one_spread(logits).softmax(dim=1), y)


def nearest_classes(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    count: int,
    gradient: InputGradient | None = None,
) -> Tensor:
    """Wrong classes by the distance to their decision boundary of the model linearised at ``x``.

    ``(z_y - z_t) / ||grad (z_t - z_y)||_*`` in the dual norm of the threat model: Melamed et al.,
    NeurIPS 2024, arXiv 2407.02240, sec. 3, there for l-infinity. Asked of the 20 likeliest.

    Cost: two forwards, and an input-gradient backward for each class that is asked.

    Args:
        model: Pixels to logits, frozen.
        x: Images ``(B, C, H, W)``, float32.
        y: Class indices ``(B,)`` int64.
        threat: Its norm.
        count: How many, at least 1.
        gradient: How input gradients are taken and counted.

    Returns:
        Class indices ``(B, min(count, K - 1))``, nearest first.
    """
    take_gradient = InputGradient() if gradient is None else gradient
    asked = likeliest_wrong(model, x, y, max(count, _CANDIDATES))
    distances = []
    for margin, slope in take_gradient.of_margins(model, x, y, asked):
        length = torch.linalg.vector_norm(slope.flatten(1), ord=threat.dual_order, dim=1)
        distances.append(-margin / length.clamp_min(torch.finfo(slope.dtype).tiny))
    order = torch.stack(distances, dim=1).argsort(dim=1, stable=True)
    return asked.gather(1, order)[:, :count]


def malt(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    first_target: int = 0,
    num_targets: int = 9,
    restarts: int = 1,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Auto-PGD towards the wrong classes whose boundaries are nearest, on the margin to each.

    ``z_t - z_y`` is maximised from a random start, one class after the other in the order of
    :func:`nearest_classes`.

    Args:
        model: As in :func:`dat_ds.attacks.apgd`, and so are ``x``, ``y``, ``threat``, ``steps``,
            ``generator``, ``model_mode`` and ``gradient``.
        x: Original images, float32.
        y: Class indices ``(B,)`` int64.
        threat: Allowed perturbations.
        steps: Gradient steps towards each class, at least 1.
        first_target: Place of the first class in that order; 0 is the nearest.
        num_targets: How many classes from there on; fewer where there are fewer, at least 1.
        restarts: Runs towards each class.
        generator: Source of the random starts.
        model_mode: Mode of the model's modules.
        gradient: How input gradients are taken and counted.

    Returns:
        ``x_adv`` as in :func:`dat_ds.attacks.apgd`: for each image the worst over the classes.
    """
    with admitted(model, x, y, threat=threat, loss="cw", model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        targets = nearest_classes(model, x, y, threat, first_target + num_targets, gradient)
        # With fewer classes than that, the last one again.
        first = min(first_target, targets.shape[1] - 1)

        def run(target: Tensor) -> Tensor:
            return apgd(
                model,
                x,
                y,
                threat=threat,
                steps=steps,
                restarts=restarts,
                loss=towards(targeted_margin, target),
                generator=generator,
                model_mode=model_mode,
                gradient=gradient,
            )

        runs = [lambda target=t: run(target) for t in targets[:, first:].unbind(dim=1)]
        return worst_of(model, runs, y, "cw")


def apgd_square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    queries: int,
    restarts: int = 1,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Random search from where the gradient leads: Auto-PGD on the margin, then Square.

    Each run takes 20 steps of :func:`dat_ds.attacks.apgd` from a random start, and searches on from
    its best point with squares of a tenth of the pixels and less. Where gradients are masked in
    part, that point is nearer to the boundary than Square's own start.

    Cost: ``restarts`` times 21 forwards, 20 input-gradient backwards and ``queries`` forwards.

    Args:
        model: As in :func:`dat_ds.attacks.square`, and so are ``x``, ``y``, ``threat``,
            ``queries``, ``generator`` and ``model_mode``.
        x: Original images, float32.
        y: Class indices ``(B,)`` int64.
        threat: Allowed perturbations.
        queries: Forwards of a search, at least 1; the first is of the climb's best point.
        restarts: Independent runs.
        generator: Source of the random starts and squares.
        model_mode: Mode of the model's modules.
        gradient: How input gradients are taken and counted.

    Returns:
        ``x_adv`` as in :func:`dat_ds.attacks.square`.
    """

    def run() -> Tensor:
        climbed = apgd(
            model,
            x,
            y,
            threat=threat,
            steps=_CLIMB,
            loss="cw",
            generator=generator,
            model_mode=model_mode,
            gradient=gradient,
        )
        return square(
            model,
            x,
            y,
            threat=threat,
            queries=queries,
            first_share=_SEARCH_SHARE,
            start=climbed,
            generator=generator,
            model_mode=model_mode,
        )

    with admitted(model, x, y, threat=threat, loss="cw", model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        return worst_of(model, [run] * restarts, y, "cw")
