"""Perturbed weights for one forward and backward: AWP and SAM, under every ZeRO stage.

Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884 (AWP); Foret et al., ICLR 2021, arXiv 2010.01412
(SAM).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dat_ds.attacks.modes import preserved_buffers, preserved_rng

Name = Literal["awp", "sam"]
Scope = Literal["global", "local"]


@dataclass(frozen=True)
class WeightPerturbation:
    """The perturbation ``v`` of the weights ``w`` that ascends the outer loss.

    With ``g`` the gradient of the loss at ``w``:

    - ``awp``: ``v_l = radius * ||w_l|| / ||g_l|| * g_l`` for each weight ``l`` of two or more
      dimensions (Wu et al., eq. 8 and 10, one step);
    - ``sam``: ``v = radius * g / ||g||`` over all parameters together (Foret et al., eq. 2).

    Args:
        name: ``"awp"`` or ``"sam"``.
        radius: AWP's gamma or SAM's rho, at least 0.
        scope: ``"global"`` takes the mean gradient over ranks, at one all-reduce, so that results
            do not depend on the number of ranks; ``"local"`` takes each rank's own (Foret et al.,
            sec. 4.1, m-sharpness).
    """

    name: Name
    radius: float
    scope: Scope = "global"

    @contextlib.contextmanager
    def applied(
        self, module: nn.Module, loss: Callable[[], Tensor], *, scale: float = 1.0
    ) -> Iterator[None]:
        """Perturb the parameters of ``module`` until exit, then restore them bit for bit.

        Costs one forward and backward of ``loss``, and a copy of the weights. Whatever buffers and
        random numbers the pass uses, the next one finds them as this one did. Where any rank's
        gradient is not finite, nothing is perturbed.

        Args:
            module: Parameters must be whole; those that need no gradient stay as they are.
            loss: Computes this rank's share of the outer loss, a mean over ranks, from ``module``
                in training mode.
            scale: Factor on the loss against underflow in float16; it drops out.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        device = parameters[0].device
        with preserved_rng(device), preserved_buffers(module), torch.enable_grad():
            gradients = torch.autograd.grad(loss() * scale, parameters, allow_unused=True)
        flat = _average(parameters, gradients, all_ranks=self.scope == "global")
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, v in zip(parameters, self._directions(parameters, flat), strict=True):
                p.data.add_(v)
        try:
            yield
        finally:
            for p, value in zip(parameters, saved, strict=True):
                p.data.copy_(value)

    def _directions(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> list[Tensor]:
        """``v`` of each parameter, in its dtype, from all gradients in float32."""
        finite = flat.isfinite().all()
        flat = torch.where(finite, flat, torch.zeros_like(flat))
        parts = torch.split(flat, [p.numel() for p in parameters])
        gradients = [g.view_as(p) for g, p in zip(parts, parameters, strict=True)]
        tiny = torch.finfo(torch.float32).tiny
        if self.name == "sam":
            factor = self.radius / flat.norm().clamp_min(tiny)
            return [(factor * g).to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        directions = []
        for g, p in zip(gradients, parameters, strict=True):
            if p.ndim < 2:
                directions.append(torch.zeros_like(p))
                continue
            length = self.radius * p.detach().float().norm()
            directions.append((length / g.norm().clamp_min(tiny) * g).to(p.dtype))
        return directions


def _average(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], *, all_ranks: bool
) -> Tensor:
    """All gradients in one float32 vector, averaged over ranks in one all-reduce."""
    flat = torch.cat(
        [
            torch.zeros(p.numel(), device=p.device) if g is None else g.flatten().float()
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )
    if all_ranks and dist.get_world_size() > 1:
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    return flat
