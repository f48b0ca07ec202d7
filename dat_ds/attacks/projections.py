"""Projections of perturbations onto norm balls, per sample.

Shapes: ``B`` batch, ``...`` any trailing shape. All lengths are pixel units in [0, 1].
"""

import torch
from torch import Tensor


def sample_norms(t: Tensor) -> Tensor:
    """Euclidean norm of each sample.

    Args:
        t: Shape ``(B, ...)``, floating point.

    Returns:
        Shape ``(B, 1, ..., 1)``, broadcastable against ``t``.
    """
    norms: Tensor = t.flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (t.ndim - 1))


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
