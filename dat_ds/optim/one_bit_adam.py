"""1-bit Adam: Adam whose momentum is averaged with one bit an entry once its variance is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.method import above, at_least, positive_share
from dat_ds.optim.compressed import CompressedOptimizer, FlatParameters, Scale, kept
from dat_ds.optim.method import OptimizerMethod, betas_option, default_of
from dat_ds.optim.stability import VarianceStability


class FreezingOptimizer(CompressedOptimizer):
    """An Adam-like optimizer with a warm-up, in which it is not compressed, and one freeze.

    Args:
        freeze_step: Number of warm-up steps, after which the variance is frozen; None leaves it to
            :class:`VarianceStability`.
        stability_threshold: Its threshold. A variance that moved more at ``freeze_step`` is warned
            of.
    """

    _saved = (*CompressedOptimizer._saved, "_stability_state")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        freeze_step: int | None,
        stability_threshold: float,
        **options: Any,
    ) -> None:
        super().__init__(params, defaults, **options)
        if freeze_step is not None and freeze_step < 1:
            raise ValueError(f"freeze_step={freeze_step} must be at least 1, or None.")
        if not 0 < stability_threshold <= 1:
            raise ValueError(f"stability_threshold={stability_threshold} must lie in (0, 1].")
        self.freeze_step = freeze_step
        self._stability = VarianceStability(defaults["betas"][1], stability_threshold)

    @property
    def earliest_freeze(self) -> int:
        """As in the base class; the rule needs norms as old as its lag."""
        return self._stability.lag + 1 if self.freeze_step is None else self.freeze_step

    @property
    def _stability_state(self) -> dict[str, Any]:
        return self._stability.state_dict()

    @_stability_state.setter
    def _stability_state(self, state: dict[str, Any]) -> None:
        self._stability.load_state_dict(state, self._work.device)

    def _make_buffers(self, flat: FlatParameters) -> dict[str, Tensor]:
        return {"momentum": flat.zeros(), "variance": flat.zeros()}

    def _take_in(self, flat: FlatParameters, gradient: Tensor, usable: Tensor) -> None:
        """Fold the gradient into the momentum and, in the warm-up, into the variance."""
        for part, group in zip(flat.parts, self.param_groups, strict=True):
            beta1, beta2 = group["betas"]
            momentum, new = self._buffers["momentum"][part], gradient[part]
            momentum.mul_(kept(beta1, usable)).add_(new, alpha=1 - beta1)
            if not self.is_frozen:
                variance = self._buffers["variance"][part]
                variance.mul_(kept(beta2, usable)).addcmul_(new, new, value=1 - beta2)

    def _precondition(self, flat: FlatParameters, out: Tensor) -> None:
        """``out <- m / (sqrt(v) + eps)``, bias-corrected."""
        momentum = self._buffers["momentum"]
        for part, group in zip(flat.parts, self.param_groups, strict=True):
            of_momentum, of_variance = self._corrections(group, self.num_steps)
            if self.is_frozen:
                denominator = self._buffers["denominator"][part]
            else:
                variance = self._buffers["variance"][part]
                denominator = (variance / of_variance).sqrt_().add_(group["eps"])
            torch.div(momentum[part], denominator, out=out[part])
            if of_momentum != 1:
                out[part].div_(of_momentum)

    def _maybe_freeze(self, flat: FlatParameters) -> None:
        """End the warm-up where it is due, on all ranks together."""
        if self.is_frozen:
            return
        group, rule = self.param_groups[0], self._stability
        correction = 1 - group["betas"][1] ** self.num_steps
        rule.observe(self._buffers["variance"].sum() / correction, group["lr"])
        if self.freeze_step is not None:
            if self.num_steps >= self.freeze_step:
                self._freeze(flat, rule.ratio(), "freeze_step")
        elif rule.looks:
            ratio = rule.ratio()
            if self._all_agree(ratio is not None and ratio >= rule.threshold):
                self._freeze(flat, ratio, "rule")

    def _all_agree(self, decision: bool) -> bool:
        if self._count_ranks() == 1:
            return decision
        flag = self._work.new_tensor(float(decision))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _freeze(self, flat: FlatParameters, ratio: float | None, chosen_by: str) -> None:
        self._freeze_variance(flat, self.num_steps)
        event = {"step": self.num_steps, "event": "variance_frozen"}
        self.events.append({**event, "stability": ratio, "chosen_by": chosen_by})
        words = "not measured" if ratio is None else f"{ratio:.3f}"
        self._say(
            "%s: variance frozen after step %d (by %s; stability %s, threshold %g). From now on "
            "momentum travels with one bit an entry.",
            type(self).__name__,
            self.num_steps,
            chosen_by,
            words,
            self._stability.threshold,
        )
        if ratio is None or ratio < self._stability.threshold:
            self._warn(
                "The variance still moves (stability %s below %g): freeze_step=%d may be too "
                "early. A larger one, or null to let the rule choose, is safer.",
                words,
                self._stability.threshold,
                self.num_steps,
            )


class OneBitAdam(FreezingOptimizer):
    """1-bit Adam (Tang et al., ICML 2021, Algorithm 1, arXiv 2102.02888).

    ``freeze_step`` steps of Adam with decoupled weight decay; then, with ``v`` frozen::

        m <- beta1 m + (1 - beta1) g_i        (this rank's gradient)
        m <- mean over ranks of 1-bit(m), with error feedback on both sides
        p <- p - lr (m / (sqrt(v) + eps) + weight_decay p)

    Options are those of DeepSpeed up to 0.19.6, which ignored ``bias_correction``: pass False to
    follow it, with ``preconditioned=False``, ``block_size=0`` and ``scale="rms"``.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        freeze_step: See :class:`FreezingOptimizer`.
        betas: Decays of momentum and variance.
        eps: Added to the root of the variance.
        weight_decay: Decoupled.
        bias_correction: See :class:`~dat_ds.optim.compressed.CompressedOptimizer`.
        preconditioned: Divide momentum by the root of the variance before it is encoded.
        block_size: Entries that share a scale; 0: one scale for all.
        scale: Statistic of a block's magnitudes that serves as its scale: ``"mean"`` or ``"rms"``.
        stability_threshold: See :class:`FreezingOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        freeze_step: int | None = None,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        preconditioned: bool = True,
        block_size: int = 1024,
        scale: Scale = "mean",
        stability_threshold: float = 0.96,
    ) -> None:
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

    def _update(self, flat: FlatParameters, gradient: Tensor) -> None:
        usable = self._usable(gradient, everywhere=self.is_frozen)
        self._take_in(flat, gradient, usable)
        if self.is_frozen:
            self._average_frozen(self._buffers["momentum"])
        self._precondition(flat, out=gradient)
        self._add_decay(flat)
        gradient.mul_(usable)
        self._move(flat)
        self._maybe_freeze(flat)


@dataclass(frozen=True, kw_only=True)
class OneBitAdamMethod(OptimizerMethod):
    """Adam whose momentum travels as signs once its variance is frozen."""

    name: ClassVar[str] = "one_bit_adam"
    paper: ClassVar[str] = "Tang et al., ICML 2021, arXiv 2102.02888"
    scaling: ClassVar[str | None] = "sqrt"
    compresses: ClassVar[bool] = True

    lr: float = above(0, default_of(OneBitAdam, "lr"))
    """Learning rate."""
    weight_decay: float = at_least(0, default_of(OneBitAdam, "weight_decay"))
    """Weight decay of every parameter with at least two dimensions."""
    betas: list[float] = betas_option(default_of(OneBitAdam, "betas"))
    """Decays of the two moments."""
    eps: float = above(0, default_of(OneBitAdam, "eps"))
    """Added to the root of the second moment."""
    bias_correction: bool = default_of(OneBitAdam, "bias_correction")
    """Correct the moments for their start at zero."""
    preconditioned: bool = default_of(OneBitAdam, "preconditioned")
    """Compress the momentum divided by the root of the variance. False is what the papers and
    DeepSpeed do, and diverges where variances differ much."""
    block_size: int = at_least(0, default_of(OneBitAdam, "block_size"))
    """Entries that share a scale; 0 is one for all, as in DeepSpeed."""
    scale: Scale = default_of(OneBitAdam, "scale")
    """Statistic of the magnitudes that serves as scale; DeepSpeed: ``rms``."""
    freeze_step: int | None = at_least(1, default_of(OneBitAdam, "freeze_step"))
    """Steps of the warm-up, which is not compressed. Default: until the variance is stable,
    measured every ``1 / (1 - beta2) / 10`` steps."""
    stability_threshold: float = positive_share(default_of(OneBitAdam, "stability_threshold"))
    """Ratio of the variance's norms, ``1 / (1 - beta2)`` steps apart, from which on it counts as
    stable."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """:class:`OneBitAdam`."""
        return OneBitAdam(params, **self.arguments())
