"""Perturbed weights for one forward and backward: AWP and SAM, under every ZeRO stage.

Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884 (AWP); Foret et al., ICLR 2021, arXiv 2010.01412
(SAM).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dat_ds.attacks.modes import preserved_buffers, preserved_rng
from dat_ds.errors import ConfigError
from dat_ds.ranks import Ranks
from dat_ds.zero3 import gathered_bytes

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
        self, module: nn.Module, loss: Callable[[], Tensor], ranks: Ranks, *, scale: float = 1.0
    ) -> Iterator[None]:
        """Perturb the parameters of ``module`` until exit, then restore them bit for bit.

        Costs one forward and backward of ``loss``, and a copy of the weights. Whatever buffers and
        random numbers the pass uses, the next one finds them as this one did. Where any rank's
        gradient is not finite, nothing is perturbed.

        Args:
            module: Parameters must be whole; those that need no gradient stay as they are.
            loss: Computes this rank's share of the outer loss, a mean over ranks, from ``module``
                in training mode.
            ranks: The processes of the run.
            scale: Factor on the loss against underflow in float16; it drops out.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        device = parameters[0].device
        with preserved_rng(device), preserved_buffers(module), torch.enable_grad():
            gradients = torch.autograd.grad(loss() * scale, parameters, allow_unused=True)
        flat = _average(parameters, gradients, ranks.count if self.scope == "global" else 1)
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, v in zip(parameters, self._directions(parameters, flat), strict=True):
                p.data.add_(v)
        # Of a forward within one autocast, the next one would find the weights as they were.
        torch.clear_autocast_cache()
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
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], num_ranks: int
) -> Tensor:
    """All gradients in one float32 vector, averaged over several ranks in one all-reduce."""
    flat = torch.cat(
        [
            torch.zeros(p.numel(), device=p.device) if g is None else g.flatten().float()
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )
    if num_ranks > 1:
        dist.all_reduce(flat)
        flat /= num_ranks
    return flat


def weight_perturbation(
    name: Name | Literal["none"], radius: float | None, scope: Scope
) -> WeightPerturbation | None:
    """A perturbation by the resolved settings of a run; None for ``"none"``."""
    if name == "none":
        return None
    assert radius is not None
    return WeightPerturbation(name, radius, scope)


def refuse_sharded(module: nn.Module) -> None:
    """Refuse to perturb weights that are never on the device at once.

    Raises:
        ConfigError: With the memory that they take.
    """
    needed = gathered_bytes(module) / 2**30
    raise ConfigError(
        "dat.weight_perturbation under ZeRO-3 needs all parameters on the device at once, "
        f"{needed:.2f} GiB: write dat.engine.resident_parameters_gib={math.ceil(needed)}."
    )


class PerturbedWeights:
    """Applies a perturbation before an outer forward, until its loss has gone backward.

    Args:
        perturbation: Perturbation to apply; None leaves weights alone.
        module: The bare model.
        ranks: The processes of the run.
        start: Share of the run after which weights are perturbed.
        whole: Gives a context in which a forward leaves all parameters on the device, whole.

    Attributes:
        are_moved: Whether weights are perturbed now.
    """

    def __init__(
        self,
        perturbation: WeightPerturbation | None,
        module: nn.Module,
        ranks: Ranks,
        *,
        start: float,
        whole: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._perturbation = perturbation
        self._module = module
        self._ranks = ranks
        self._start = start
        self._whole = whole
        self._applied = contextlib.ExitStack()
        self.are_moved = False

    def applies(self, progress: float) -> bool:
        """Whether weights are perturbed at a point of the run, ``progress`` in [0, 1]."""
        return self._perturbation is not None and progress >= self._start

    def apply(self, loss: Callable[[], Tensor], scale: float) -> None:
        """Move the weights up ``loss``; see :meth:`WeightPerturbation.applied`."""
        assert self._perturbation is not None
        with self.restored_on_error():
            self._applied.enter_context(self._whole())
            self._applied.enter_context(
                self._perturbation.applied(self._module, loss, self._ranks, scale=scale)
            )
            self.are_moved = True

    def restore(self) -> None:
        """Bring the weights back, bit for bit, if they are moved."""
        self._applied.close()
        self.are_moved = False

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Bring the weights back if the block breaks off."""
        try:
            yield
        except BaseException:
            self.restore()
            raise
