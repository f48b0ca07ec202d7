"""LAMB: Adam's direction with layer-wise trust ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dat_ds.method import above, at_least
from dat_ds.optim.layerwise import ParameterGroups
from dat_ds.optim.method import betas_option, default_of
from dat_ds.optim.trust_ratio import TrustRatioMethod, TrustRatioOptimizer, check_options


class Lamb(TrustRatioOptimizer):
    """LAMB (You et al., ICLR 2020, Algorithm 2, arXiv 1904.00962), and DAT's LALR on it.

    With Adam's moments ``m`` and ``v`` of the gradient::

        u_l = m_l / (sqrt(v_l) + eps) + weight_decay * theta_l
        theta_l <- theta_l - lr * tau(||theta_l||) / ||u_l|| * u_l
        tau(z) = min(max(z, lower), upper)

    which is the rule of Zhang et al., UAI 2022, arXiv 2206.06257. Where ``tau(||theta_l||)`` or
    ``||u_l||`` is 0, the ratio is 1. Moments have the dtype of their tensor, norms are float32 of
    float64 sums; one step counter per tensor. Gradients are never clipped here.

    Args:
        params: Tensors or groups of them; a group with ``"adapt": False`` has the ratio 1.
        lr: Learning rate: a layer's step relative to the length of its weights. Default: LAMB's for
            ResNet-50 on ImageNet at a batch of 512.
        weight_decay: Part of the direction, as in LAMB; default: LAMB's for BERT.
        betas: Decay of ``m`` and of ``v``.
        eps: Added to ``sqrt(v)``.
        bias_correction: Divide ``m`` by ``1 - beta_1^t`` and ``v`` by ``1 - beta_2^t``.
        lower: Lower bound ``c_l`` of the weights' norm.
        upper: Upper bound ``c_u``; None: no bound.

    Raises:
        ValueError: For a value out of range.
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float = 0.005,
        weight_decay: float = 0.01,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        bias_correction: bool = True,
        lower: float = 0.0,
        upper: float | None = None,
    ) -> None:
        """See the class."""
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "bias_correction": bias_correction,
            "lower": lower,
            "upper": upper,
        }
        check_options(options)
        super().__init__(params, options)

    def _directions(
        self, group: dict[str, Any], params: list[Tensor]
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
        gradients = [p.grad for p in params if p.grad is not None]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with both corrections moved to the scalars.
        corrected = group["bias_correction"]
        steps = [state["step"] for state in states]
        roots = [(1 - beta2**t) ** 0.5 if corrected else 1.0 for t in steps]
        factors = [
            r / (1 - beta1**t) if corrected else 1.0 for t, r in zip(steps, roots, strict=True)
        ]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, [group["eps"] * root for root in roots])
        directions = list(torch._foreach_mul(params, group["weight_decay"]))
        torch._foreach_addcdiv_(directions, first, denominators, factors)
        return directions, directions

    def _ratio(
        self, group: dict[str, Any], bounded: Tensor, weight_norms: Tensor, norms: Tensor
    ) -> Tensor:
        return bounded / norms

    def _move(self, group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
        torch._foreach_add_(params, directions, alpha=-float(group["lr"]))


@dataclass(frozen=True, kw_only=True)
class LambMethod(TrustRatioMethod):
    """Adam's direction with layer-wise trust ratios, and DAT's LALR on it."""

    name: ClassVar[str] = "lamb"
    paper: ClassVar[str] = (
        "You et al., ICLR 2020, arXiv 1904.00962; Zhang et al., UAI 2022, arXiv 2206.06257"
    )
    scaling: ClassVar[str | None] = "sqrt"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "modern": {},
        "paper": {"adapt_vectors": True, "bias_correction": False, "upper": 10.0},
    }

    lr: float = above(0, default_of(Lamb, "lr"))
    """A layer's step relative to the length of its weights."""
    weight_decay: float = at_least(0, default_of(Lamb, "weight_decay"))
    """Weight decay, as a term of the direction, of every parameter with at least two dimensions."""
    betas: list[float] = betas_option(default_of(Lamb, "betas"))
    """Decays of the two moments."""
    eps: float = above(0, default_of(Lamb, "eps"))
    """Added to the root of the second moment."""
    bias_correction: bool = default_of(Lamb, "bias_correction")
    """Divide the moments by what their start at zero leaves out. Of ``paper`` false."""
    lower: float = at_least(0, default_of(Lamb, "lower"))
    """Lower bound of the weights' norm in the trust ratio."""
    upper: float | None = above(0, default_of(Lamb, "upper"))
    """Upper bound of the weights' norm in the trust ratio. Default: none; with the preset
    ``paper``: 10."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """:class:`Lamb`."""
        return Lamb(params, **self.arguments())
