"""LARS: the direction of SGD with layer-wise trust ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.method import above, at_least, fraction
from dat_ds.optim.layerwise import ParameterGroups
from dat_ds.optim.method import default_of
from dat_ds.optim.trust_ratio import TrustRatioMethod, TrustRatioOptimizer, check_options

Scaled = Literal["gradient", "momentum"]


class Lars(TrustRatioOptimizer):
    """LARS (You et al. 2017, arXiv 1708.03888), and DAT's LALR on momentum SGD.

    With ``g`` the gradient, ``d_l = g_l + weight_decay * theta_l`` and
    ``tau(z) = min(max(z, lower), upper)``, LARS scales the gradient (eq. 6 and Algorithm 1)::

        r_l = trust_coefficient * tau(||theta_l||) / (||g_l|| + weight_decay * ||theta_l|| + eps)
        b_l <- momentum * b_l + r_l * d_l;  theta_l <- theta_l - lr * b_l

    and with ``scaled="momentum"`` it is the rule of Zhang et al., UAI 2022, arXiv 2206.06257::

        b_l <- momentum * b_l + d_l;  u_l = b_l
        theta_l <- theta_l - lr * trust_coefficient * tau(||theta_l||) / (||u_l|| + eps) * u_l

    Nesterov's momentum takes ``momentum * b_l`` plus the last summand of ``b_l`` in the place of
    ``b_l``. Where ``tau(||theta_l||)`` or the other norm is 0, the ratio is 1.

    Args:
        params: Tensors or groups of them; a group with ``"adapt": False`` has the ratio 1.
        lr: Learning rate.
        weight_decay: L2 penalty; default: the paper's.
        momentum: Of the buffer ``b``; 0 keeps none.
        nesterov: Nesterov's momentum.
        trust_coefficient: Length of a layer's step relative to its weights', at a rate of 1.
        eps: Added to the norm in the denominator.
        lower: Lower bound ``c_l`` of the weights' norm.
        upper: Upper bound ``c_u``; None: no bound.
        scaled: Vector that the ratio scales and whose norm it has: the gradient, or the momentum.

    Raises:
        ValueError: For a value out of range.
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float = 1.0,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        lower: float = 0.0,
        upper: float | None = None,
        scaled: Scaled = "gradient",
    ) -> None:
        """See the class."""
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "lower": lower,
            "upper": upper,
            "scaled": scaled,
        }
        check_options(options)
        super().__init__(params, options)

    def _directions(
        self, group: dict[str, Any], params: list[Tensor]
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        gradients = [p.grad for p in params if p.grad is not None]
        directions = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        if group["scaled"] == "gradient":
            return gradients, directions
        directions = self._with_momentum(group, params, directions)
        return directions, directions

    def _ratio(
        self, group: dict[str, Any], bounded: Tensor, weight_norms: Tensor, norms: Tensor
    ) -> Tensor:
        if group["scaled"] == "gradient":
            norms = norms + group["weight_decay"] * weight_norms
        return bounded.mul(group["trust_coefficient"]).div(norms + group["eps"])

    def _move(self, group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
        if group["scaled"] == "gradient":
            directions = self._with_momentum(group, params, directions)
        torch._foreach_add_(params, directions, alpha=-float(group["lr"]))

    def _with_momentum(
        self, group: dict[str, Any], params: list[Tensor], summands: list[Tensor]
    ) -> list[Tensor]:
        """Fold ``summands`` into the momentum buffers; new tensors, or ``summands`` themselves."""
        momentum = group["momentum"]
        if not momentum:
            return summands
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, summands)
        if group["nesterov"]:
            torch._foreach_add_(summands, buffers, alpha=momentum)
            return summands
        torch._foreach_copy_(summands, buffers)
        return summands


@dataclass(frozen=True, kw_only=True)
class LarsMethod(TrustRatioMethod):
    """SGD's direction with layer-wise trust ratios, and DAT's LALR on it."""

    name: ClassVar[str] = "lars"
    paper: ClassVar[str] = (
        "You et al. 2017, arXiv 1708.03888; Zhang et al., UAI 2022, arXiv 2206.06257"
    )
    scaling: ClassVar[str | None] = "linear"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "modern": {},
        "paper": {
            "adapt_vectors": True,
            "scaled": "momentum",
            "trust_coefficient": 1.0,
            "upper": 10.0,
            "lr": 0.01,
        },
    }

    lr: float = above(0, default_of(Lars, "lr"))
    """Learning rate. With the preset ``paper``: 0.01."""
    weight_decay: float = at_least(0, default_of(Lars, "weight_decay"))
    """Weight decay of every parameter with at least two dimensions."""
    momentum: float = fraction(default_of(Lars, "momentum"))
    """Decay of the average of directions."""
    nesterov: bool = default_of(Lars, "nesterov")
    """Nesterov's momentum."""
    trust_coefficient: float = above(0, default_of(Lars, "trust_coefficient"))
    """Factor of the trust ratio. With the preset ``paper``: 1."""
    eps: float = above(0, default_of(Lars, "eps"))
    """Added to the direction's norm."""
    lower: float = at_least(0, default_of(Lars, "lower"))
    """Lower bound of the weights' norm in the trust ratio."""
    upper: float | None = above(0, default_of(Lars, "upper"))
    """Upper bound of the weights' norm in the trust ratio. Default: none; with the preset
    ``paper``: 10."""
    scaled: Scaled = default_of(Lars, "scaled")
    """Quantity that the trust ratio scales. The preset ``paper`` uses ``momentum``."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """:class:`Lars`."""
        return Lars(params, **self.arguments())
