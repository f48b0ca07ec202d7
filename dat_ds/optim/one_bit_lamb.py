"""1-bit LAMB: LAMB whose momentum is averaged with one bit an entry once its variance is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dat_ds.method import above, at_least, fraction, positive_share
from dat_ds.optim.compressed import FlatParameters, Scale, kept, norms
from dat_ds.optim.method import OptimizerMethod, betas_option, default_of
from dat_ds.optim.one_bit_adam import FreezingOptimizer


class OneBitLamb(FreezingOptimizer):
    """1-bit LAMB (Li et al., HiPC 2022, Algorithm 1, arXiv 2104.06069).

    ``freeze_step`` steps of LAMB, with ``u = m / (sqrt(v) + eps) + weight_decay p`` and, in every
    layer, ``c = clamp(|p| / |u|, min_coeff, max_coeff)`` (1 where a norm is zero, and throughout of
    what is not adapted)::

        p <- p - lr c u,        a <- coeff_beta a + (1 - coeff_beta) c

    Then, with ``v`` and ``a`` frozen, the momentum is averaged as in 1-bit Adam. One that is not
    preconditioned is multiplied by ``s = (mean root mean square of layers) / (its own)`` on the
    way, layer by layer, so that layers can share scales. The gradient that the new momentum implies
    keeps a fresh variance ``w``, and ``c = a r`` with the layer's

        r = max sqrt(v) / sqrt(w)    within [factor_min, factor_max], and within
                                     ``factor_threshold`` of the step before, relatively

    Options are those of DeepSpeed up to 0.19.6, which ignored ``bias_correction``: pass False to
    follow it, with ``adapt_vectors=True``, ``preconditioned=False``, ``block_size=0`` and
    ``scale="rms"``. As in DeepSpeed, ``weight_decay`` draws ``r`` towards 1 by its share in
    ``|u|``.

    Args:
        params: Parameters or groups; every tensor is a layer.
        lr: Learning rate.
        freeze_step: See :class:`~dat_ds.optim.one_bit_adam.FreezingOptimizer`.
        betas: Decays of momentum and variance.
        eps: Added to the root of the variance.
        weight_decay: Part of ``u``.
        max_coeff: Largest ``c`` of the warm-up.
        min_coeff: Smallest ``c`` of the warm-up.
        coeff_beta: Decay of the average ``a``.
        factor_max: Largest ``r``.
        factor_min: Smallest ``r``.
        factor_threshold: Relative change of ``r`` per step.
        adapt_vectors: Give vectors (biases, normalisation weights) ratios too, as DeepSpeed does.
        bias_correction: See :class:`~dat_ds.optim.compressed.CompressedOptimizer`.
        preconditioned: Divide momentum by the root of the variance before it is encoded.
        block_size: Entries that share a scale; 0: one scale for all.
        scale: Statistic of a block's magnitudes that serves as its scale: ``"mean"`` or ``"rms"``.
        stability_threshold: See :class:`~dat_ds.optim.one_bit_adam.FreezingOptimizer`.
    """

    _saved = (*FreezingOptimizer._saved, "_layers")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        freeze_step: int | None = None,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        adapt_vectors: bool = False,
        bias_correction: bool = True,
        preconditioned: bool = True,
        block_size: int = 1024,
        scale: Scale = "mean",
        stability_threshold: float = 0.96,
    ) -> None:
        if not 0 <= min_coeff <= max_coeff:
            raise ValueError(f"min_coeff={min_coeff} must lie in [0, max_coeff={max_coeff}].")
        if not 0 < factor_min <= factor_max:
            raise ValueError(f"factor_min={factor_min} must lie in (0, factor_max={factor_max}].")
        if not 0 <= coeff_beta < 1:
            raise ValueError(f"coeff_beta={coeff_beta} must lie in [0, 1).")
        if factor_threshold < 0:
            raise ValueError(f"factor_threshold={factor_threshold} must be at least 0.")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            freeze_step=freeze_step,
            stability_threshold=stability_threshold,
            bias_correction=bias_correction,
            preconditioned=preconditioned,
            block_size=block_size,
            scale=scale,
        )
        self._coeff_bounds = (min_coeff, max_coeff)
        self._coeff_beta = coeff_beta
        self._factor_bounds = (factor_min, factor_max)
        self._factor_threshold, self._adapt_vectors = factor_threshold, adapt_vectors
        self._layers: dict[str, Tensor] = {}

    @property
    def trust_ratios(self) -> Tensor:
        """``c`` of every layer in the last step, ``(layers,)``, in the order of the parameters."""
        return self._layers["coeff"]

    def _make_buffers(self, flat: FlatParameters) -> dict[str, Tensor]:
        ones = flat.zeros().new_ones(len(flat.params))
        adapts = ones.new_tensor([self._adapt_vectors or p.ndim > 1 for p in flat.params]) > 0
        average = (~adapts).float()
        self._layers = {"adapts": adapts, "coeff": ones, "average": average, "factor": ones.clone()}
        return super()._make_buffers(flat)

    def _update(self, flat: FlatParameters, gradient: Tensor) -> None:
        usable = self._usable(gradient, everywhere=self.is_frozen)
        momentum = self._buffers["momentum"]
        before = momentum.clone() if self.is_frozen else None
        self._take_in(flat, gradient, usable)
        if before is not None:
            self._average_layers(flat, momentum)
            self._refresh_variance(flat, momentum, before, usable)
        self._precondition(flat, out=gradient)
        directions = self._work_views
        length = norms(directions) if self.is_frozen else None
        self._add_decay(flat)
        if length is None:
            coeff = self._warm_up_coeff(flat, directions, usable)
        else:
            coeff = self._frozen_coeff(flat, length, norms(directions), usable)
        self._layers["coeff"] = coeff
        torch._foreach_mul_(directions, list((coeff * usable).unbind()))
        self._move(flat)
        self._maybe_freeze(flat)

    def _warm_up_coeff(
        self, flat: FlatParameters, directions: list[Tensor], usable: Tensor
    ) -> Tensor:
        """LAMB's trust ratios ``(layers,)``, folded into their average."""
        weights, lengths = norms(flat.params).float(), norms(directions)
        has_ratio = (weights > 0) & (lengths > 0) & self._layers["adapts"]
        ratio = (weights / lengths).clamp_(*self._coeff_bounds)
        average = self._layers["average"]
        beta = kept(self._coeff_beta, usable)
        average.copy_(torch.where(has_ratio, torch.lerp(ratio, average, beta), average))
        return torch.where(has_ratio, ratio, 1.0)

    def _frozen_coeff(
        self, flat: FlatParameters, length: Tensor, decayed: Tensor, usable: Tensor
    ) -> Tensor:
        """Their average, times ``r``, ``(layers,)``.

        Args:
            flat: The layout.
            length: Norms of ``m / (sqrt(v) + eps)``.
            decayed: Norms of ``u``.
            usable: Whether the step takes place.
        """
        share = torch.where(decayed > 0, length / decayed, 1.0).clamp_(max=1.0)
        largest = self._layers["largest"]
        factor = (largest * share + (1 - share)).clamp_(*self._factor_bounds)
        last, threshold = self._layers["factor"], self._factor_threshold
        factor = torch.clamp(factor, last * (1 - threshold), last * (1 + threshold))
        last.copy_(torch.where((usable > 0) & self._layers["adapts"], factor, last))
        return self._layers["average"] * last

    def _average_layers(self, flat: FlatParameters, momentum: Tensor) -> None:
        """Average over ranks, layers brought to one size where the momentum itself is sent."""
        if self.preconditioned:
            self._average_frozen(momentum)
            return
        views, scaling = flat.views(momentum), list(self._layers["scaling"].unbind())
        torch._foreach_mul_(views, scaling)
        self._average_frozen(momentum)
        torch._foreach_div_(views, scaling)

    def _refresh_variance(
        self, flat: FlatParameters, momentum: Tensor, before: Tensor, usable: Tensor
    ) -> None:
        """Fold in the gradient that the new momentum implies; note ``max sqrt(v) / sqrt(w)``.

        Args:
            flat: The layout.
            momentum: The new one.
            before: The old one; overwritten, so that nothing else of this size is made.
            usable: Whether the step takes place.
        """
        fresh, frozen = self._buffers["fresh_variance"], self._buffers["denominator"]
        for part, group in zip(flat.parts, self.param_groups, strict=True):
            beta1, beta2 = group["betas"]
            work = before[part]
            torch.sub(momentum[part], work, alpha=beta1, out=work).mul_(usable / (1 - beta1))
            fresh[part].mul_(kept(beta2, usable)).addcmul_(work, work, value=1 - beta2)
            _, of_variance = self._corrections(group, self.num_steps)
            torch.div(fresh[part], of_variance, out=work).sqrt_().add_(group["eps"])
            torch.div(frozen[part], work, out=work)
        self._mask(before)
        self._layers["largest"] = torch.stack(torch._foreach_max(flat.views(before)))

    def _freeze(self, flat: FlatParameters, ratio: float | None, chosen_by: str) -> None:
        self._buffers["fresh_variance"] = self._buffers["variance"].clone()
        momentum = flat.views(self._buffers["momentum"])
        sizes = torch.tensor([max(1, m.numel()) for m in momentum], device=self._work.device)
        scales = norms(momentum) / sizes.sqrt()
        # (A layer without any momentum stays as it is.)
        scales_layers = (scales > 0) & (not self.preconditioned)
        self._layers["scaling"] = torch.where(scales_layers, scales.mean() / scales, 1.0)
        super()._freeze(flat, ratio, chosen_by)


@dataclass(frozen=True, kw_only=True)
class OneBitLambMethod(OptimizerMethod):
    """LAMB whose momentum travels as signs once its variance is frozen."""

    name: ClassVar[str] = "one_bit_lamb"
    paper: ClassVar[str] = "Li et al., HiPC 2022, arXiv 2104.06069"
    scaling: ClassVar[str | None] = "sqrt"
    compresses: ClassVar[bool] = True

    lr: float = above(0, default_of(OneBitLamb, "lr"))
    """Learning rate."""
    weight_decay: float = at_least(0, default_of(OneBitLamb, "weight_decay"))
    """Weight decay of every parameter with at least two dimensions."""
    betas: list[float] = betas_option(default_of(OneBitLamb, "betas"))
    """Decays of the two moments."""
    eps: float = above(0, default_of(OneBitLamb, "eps"))
    """Added to the root of the second moment."""
    bias_correction: bool = default_of(OneBitLamb, "bias_correction")
    """Correct the moments for their start at zero."""
    preconditioned: bool = default_of(OneBitLamb, "preconditioned")
    """Compress the momentum divided by the root of the variance. False is what the papers and
    DeepSpeed do, and diverges where variances differ much."""
    block_size: int = at_least(0, default_of(OneBitLamb, "block_size"))
    """Entries that share a scale; 0 is one for all, as in DeepSpeed."""
    scale: Scale = default_of(OneBitLamb, "scale")
    """Statistic of the magnitudes that serves as scale; DeepSpeed: ``rms``."""
    freeze_step: int | None = at_least(1, default_of(OneBitLamb, "freeze_step"))
    """Steps of the warm-up, which is not compressed. Default: until the variance is stable,
    measured every ``1 / (1 - beta2) / 10`` steps."""
    stability_threshold: float = positive_share(default_of(OneBitLamb, "stability_threshold"))
    """Ratio of the variance's norms, ``1 / (1 - beta2)`` steps apart, from which on it counts as
    stable."""
    max_coeff: float = above(0, default_of(OneBitLamb, "max_coeff"))
    """Largest trust ratio of the warm-up."""
    min_coeff: float = at_least(0, default_of(OneBitLamb, "min_coeff"))
    """Smallest trust ratio of the warm-up."""
    coeff_beta: float = fraction(default_of(OneBitLamb, "coeff_beta"))
    """Decay of the average of the trust ratios, which is frozen with the variance."""
    factor_max: float = above(0, default_of(OneBitLamb, "factor_max"))
    """Largest factor on the frozen ratios."""
    factor_min: float = above(0, default_of(OneBitLamb, "factor_min"))
    """Smallest trust ratio of the warm-up."""
    factor_threshold: float = at_least(0, default_of(OneBitLamb, "factor_threshold"))
    """Largest relative change of that factor per step."""
    adapt_vectors: bool = default_of(OneBitLamb, "adapt_vectors")
    """Give vectors a trust ratio too."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """:class:`OneBitLamb`."""
        return OneBitLamb(params, **self.arguments())
