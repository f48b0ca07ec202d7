"""Projections of perturbations onto norm balls, per sample.

Shapes: ``B`` batch, ``...`` any trailing shape. All lengths are pixel units in [0, 1].
"""

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``values`` ``(B,)`` as ``(B, 1, ..., 1)``, broadcastable against ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def sample_norms(t: Tensor) -> Tensor:
    """Euclidean norm of each sample.

    Args:
        t: Shape ``(B, ...)``, floating point.

    Returns:
        Shape ``(B, 1, ..., 1)``, broadcastable against ``t``.
    """
    return per_sample(t.flatten(1).norm(dim=1), t)


def project_linf(delta: Tensor, eps: float) -> Tensor:
    """Project each perturbation onto the l-infinity ball: ``clip(delta, -eps, eps)``.

    Args:
        delta: Perturbations in pixel units, shape ``(B, ...)``.
        eps: Radius in pixel units.

    Returns:
        A new tensor like ``delta``; points inside are returned unchanged.
    """
    return delta.clamp(-eps, eps)


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """Project each perturbation onto the l2 ball of radius ``eps``.

    ``argmin_u ||u - delta||_2  s.t.  ||u||_2 <= eps``, independently per sample.

    Args:
        delta: Perturbations in pixel units, shape ``(B, ...)``, floating point.
        eps: Radius in the same units; a full-range pixel has length 1.

    Returns:
        A new tensor like ``delta``. Points inside are returned unchanged; zero stays zero.
    """
    norms = sample_norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)
    return delta * (eps / norms).clamp_max(1.0)


def project_l1(delta: Tensor, eps: float) -> Tensor:
    """Project each perturbation onto the l1 ball of radius ``eps``.

    Args:
        delta: Perturbations in pixel units, shape ``(B, ...)``, floating point.
        eps: Radius in the same units: the sum of absolute pixel changes.

    Returns:
        A new tensor like ``delta``; points inside are returned unchanged.
    """
    infinity = torch.full_like(delta, float("inf"))
    return project_l1_box(delta, eps, -infinity, infinity)


def project_l1_box(delta: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
    """Project each perturbation onto the intersection of the l1 ball and a box around 0.

    Exact: ``u_i = sign(d_i) min(max(|d_i| - lam, 0), b_i)`` with ``b_i`` the box's bound on that
    side, where ``lam >= 0`` solves the piecewise linear ``sum_i |u_i| = eps`` (Croce and Hein,
    ICML 2021, arXiv 2103.01208, prop. 2.1).

    Args:
        delta: Perturbations in pixel units, shape ``(B, ...)``, floating point.
        eps: Radius of the l1 ball.
        low: Smallest value of each entry, at most 0; same shape.
        high: Largest value of each entry, at least 0; same shape.

    Returns:
        A new tensor like ``delta``; points inside are returned unchanged.
    """
    boxed = torch.maximum(torch.minimum(delta, high), low)
    magnitude = delta.abs().flatten(1).double()
    bound = torch.where(delta >= 0, high, -low).flatten(1).double()
    # From large lam to small, the norm grows at the rate of the number of entries between 0 and
    # their bound: an entry joins at lam = |d_i| and leaves at lam = |d_i| - b_i.
    breakpoints = torch.cat([magnitude, (magnitude - bound).clamp_min(0)], dim=1)
    joins = torch.ones_like(magnitude)
    lam, order = breakpoints.sort(dim=1, descending=True)
    rate = torch.cat([joins, -joins], dim=1).gather(1, order).cumsum(dim=1)
    norm_at = torch.zeros_like(lam)
    norm_at[:, 1:] = (rate[:, :-1] * (lam[:, :-1] - lam[:, 1:])).cumsum(dim=1)
    # The last breakpoint at which the norm is still within eps; lam lies between it and the next.
    last = ((norm_at <= eps).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    slope = rate.gather(1, last).clamp_min(1)
    shrink = lam.gather(1, last) - (eps - norm_at.gather(1, last)) / slope
    size = torch.minimum((magnitude - shrink.clamp_min(0)).clamp_min(0), bound)
    shrunk = (size.to(delta.dtype).view_as(delta)).copysign(delta)
    inside = boxed.flatten(1).abs().sum(dim=1, dtype=torch.float64) <= eps
    return torch.where(per_sample(inside, delta), boxed, shrunk)


def step_to_plane(weight: Tensor, rise: Tensor, low: Tensor, high: Tensor, norm: str) -> Tensor:
    """Shortest perturbation inside a box that reaches a hyperplane, per sample.

    ``argmin_u ||u||_p  s.t.  <weight, u> = rise, low <= u <= high``, exact (Croce and Hein, ICML
    2020, arXiv 1907.02044, eq. 4). With ``a = |weight|`` and the room ``m`` of each entry in the
    direction that helps, ``|u_i|`` is ``min(lam, m_i)`` for l-infinity and ``min(lam a_i, m_i)``
    for l2; for l1 entries take all of their room in descending order of ``a``.

    Args:
        weight: Normals of the hyperplanes ``(B, ...)``, floating point.
        rise: By how much ``<weight, u>`` has to differ from 0: ``(B,)``, or ``(P, B)`` for ``P``
            points to start from with the same normal.
        low: Smallest value of each entry, at most 0: ``(B, ...)`` or ``(P, B, ...)``.
        high: Largest value of each entry, at least 0; same shape.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.

    Returns:
        A new tensor like ``low``; the corner of the box nearest to the hyperplane where that misses
        the box.
    """
    normal = weight.flatten(1)
    points = (*rise.shape, normal.shape[-1])
    rise = rise.double().unsqueeze(-1)
    towards = normal * rise.sign().to(normal.dtype)
    room = torch.where(towards >= 0, high.reshape(points), -low.reshape(points))
    gain = normal.abs()
    if norm == "l1":
        size = _fill_in_order(gain, rise.abs(), room)
    else:
        size = _fill_alike(gain, rise.abs(), room, gain if norm == "l2" else torch.ones_like(gain))
    return size.mul_(towards.sign_()).view_as(low)


def _fill_alike(gain: Tensor, rise: Tensor, room: Tensor, pace: Tensor) -> Tensor:
    """``min(lam pace, room)`` with ``sum(gain min(lam pace, room)) = rise``; else ``room``.

    The sum is concave in ``lam``, so that Newton's method from 0 never oversteps; entries that have
    used up their room stay so, and when no more do, ``lam`` is exact.
    """
    full, rate = gain * room, gain * pace
    is_full = room <= 0
    while True:
        # Products are many times as fast on a CPU as masked fills.
        is_free = is_full.logical_not().to(gain.dtype)
        rest = rise - (full * (1 - is_free)).sum(dim=-1, keepdim=True, dtype=torch.float64)
        slope = (rate * is_free).sum(dim=-1, keepdim=True, dtype=torch.float64)
        lam = rest / slope.clamp_min(torch.finfo(torch.float64).tiny)
        lam = lam.clamp(0, torch.finfo(gain.dtype).max).to(gain.dtype)  # finite: entries may be 0
        size = lam * pace
        now_full = (room <= size).logical_or_(is_full)
        if torch.equal(now_full, is_full):
            return torch.where(is_full, room, size)
        is_full = now_full


def _fill_in_order(gain: Tensor, rise: Tensor, room: Tensor) -> Tensor:
    """All room of the entries with the largest gains, and part of that of the next one."""
    gain, order = gain.sort(dim=-1, descending=True)
    order = order.expand_as(room)
    room = room.gather(-1, order)
    full = (gain * room).double()
    rest = full.cumsum(dim=-1).sub_(full).neg_().add_(rise)
    size = rest.div_(gain.clamp_min(torch.finfo(gain.dtype).tiny)).clamp_min_(0).to(gain.dtype)
    return torch.zeros_like(room).scatter_(-1, order, torch.minimum(size, room))
