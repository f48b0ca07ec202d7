"""Classes that targeted attacks lead to.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

import torch
from torch import Tensor

from dat_ds.attacks.gradient import Model


@torch.no_grad()
def likeliest_wrong(model: Model, x: Tensor, y: Tensor, count: int) -> Tensor:
    """The likeliest wrong classes at ``x``, likeliest first; one forward.

    Args:
        model: Pixels to logits ``(B, K)``.
        x: Images ``(B, C, H, W)``.
        y: Class indices ``(B,)`` int64.
        count: How many, at least 1.

    Returns:
        Class indices ``(B, min(count, K - 1))``.
    """
    logits = model(x)
    wrong = logits.scatter(1, y.unsqueeze(1), float("-inf"))
    return wrong.argsort(dim=1, descending=True)[:, : min(count, logits.shape[1] - 1)]
