"""Inner losses: what an attack maximises. Per sample, never reduced.

Shapes: ``B`` batch, ``K`` classes.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

InnerLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (B, K), y) -> loss (B,)``, larger is better for the attacker, no reduction."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample.

    Args:
        logits: Shape ``(B, K)``, floating point.
        y: Class indices ``(B,)`` int64, or class probabilities ``(B, K)``.

    Returns:
        Shape ``(B,)``, same dtype as ``logits``.
    """
    return F.cross_entropy(logits, y, reduction="none")


INNER_LOSSES: dict[str, InnerLoss] = {"ce": cross_entropy}


def resolve_inner_loss(loss: str | InnerLoss) -> InnerLoss:
    """The inner loss of that name, or the callable itself.

    Raises:
        ValueError: For an unknown name.
    """
    if callable(loss):
        return loss
    if loss not in INNER_LOSSES:
        raise ValueError(f"loss={loss!r} is not one of {', '.join(INNER_LOSSES)}, nor a callable.")
    return INNER_LOSSES[loss]
