"""0/1 Adam: Adam with a variance that is measured ever more rarely, and local steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dat_ds.method import above, at_least
from dat_ds.optim.compressed import CompressedOptimizer, FlatParameters, Scale, kept
from dat_ds.optim.method import OptimizerMethod, betas_option, default_of


class ZeroOneAdam(CompressedOptimizer):
    """0/1 Adam (Lu et al., ICLR 2023, Algorithm 1, arXiv 2202.06009).

    Up to ``var_freeze_step``, the variance is measured in every ``var_interval``-th step, from a
    gradient averaged in full precision; the interval starts at 1 and doubles after every
    ``var_update_scaler`` measurements. The gradients of the other steps are averaged with one bit
    an entry.

    After it the variance is frozen, and ranks step by themselves::

        m <- beta1 m + (1 - beta1) g_i,    p <- p - lr (m / d + weight_decay p),    u <- u + lr m

    with ``d = sqrt(v) + eps``. In every ``local_interval``-th step they agree again, from the
    weights ``p'`` of the last time, and all hold the same, bit for bit::

        u <- mean over ranks of 1-bit(u),    m <- u / (sum of lr),    p <- decayed p' - u / d

    That interval starts at 1 and doubles every ``local_step_scaler`` steps, up to
    ``local_step_clipper``. Between two agreements replicas differ.

    A local step is not a collective: a rank whose gradient is not finite leaves the gradient out
    and goes on along its momentum. In the steps up to ``var_freeze_step`` all ranks skip together.

    Options are those of DeepSpeed up to 0.19.6, which ignored ``bias_correction``: pass False to
    follow it, with ``preconditioned=False``, ``block_size=0`` and ``scale="rms"``. It adds the
    decay to ``u``, and with it to the momentum; here the decay stays apart.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decays of momentum and variance.
        eps: Added to the root of the variance.
        weight_decay: Decoupled.
        var_freeze_step: Last step that may measure the variance; the end of the learning rate's
            warm-up is usual.
        var_update_scaler: The paper's kappa.
        local_step_scaler: Steps between two doublings of the local interval.
        local_step_clipper: The paper's H, its largest value.
        bias_correction: See :class:`~dat_ds.optim.compressed.CompressedOptimizer`; of the variance,
            by the number of its measurements.
        preconditioned: Divide momentum by the root of the variance before it is encoded.
        block_size: Entries that share a scale; 0: one scale for all.
        scale: Statistic of a block's magnitudes that serves as its scale: ``"mean"`` or ``"rms"``.
    """

    steps_locally = True
    _saved = (
        *CompressedOptimizer._saved,
        "_var_interval",
        "_var_counter",
        "_num_measurements",
        "_local_interval",
        "_local_counter",
        "_steps_apart",
        "_rate_sums",
        "_decays",
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        bias_correction: bool = True,
        preconditioned: bool = True,
        block_size: int = 1024,
        scale: Scale = "mean",
    ) -> None:
        counts = {
            "var_freeze_step": var_freeze_step,
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            bias_correction=bias_correction,
            preconditioned=preconditioned,
            block_size=block_size,
            scale=scale,
        )
        self.var_freeze_step = var_freeze_step
        self._var_update_scaler = var_update_scaler
        self._local_step_scaler = local_step_scaler
        self._local_step_clipper = local_step_clipper
        self._var_interval, self._var_counter, self._num_measurements = 1, 0, 0
        self._local_interval, self._local_counter = 1, 0
        self._steps_apart = 0
        self._rate_sums = [0.0 for _ in self.param_groups]
        self._decays = [1.0 for _ in self.param_groups]

    @property
    def needs_averaged_gradients(self) -> bool:
        """As in the base class: only in the steps that measure the variance."""
        return not self.is_frozen and (self.num_steps + 1) % self._var_interval == 0

    @property
    def earliest_freeze(self) -> int:
        """As in the base class."""
        return self.var_freeze_step

    @property
    def replicas_agree(self) -> bool:
        """As in the base class: not after a local step."""
        return self._steps_apart == 0 or self._count_ranks() == 1

    def _make_buffers(self, flat: FlatParameters) -> dict[str, Tensor]:
        return {"momentum": flat.zeros(), "variance": flat.zeros()}

    def _update(self, flat: FlatParameters, gradient: Tensor) -> None:
        if self.is_frozen:
            self._step_apart(flat, gradient)
        else:
            self._step_together(flat, gradient)

    # ---- while the variance is measured

    def _step_together(self, flat: FlatParameters, gradient: Tensor) -> None:
        measures = self.num_steps % self._var_interval == 0
        usable = self._usable(gradient, everywhere=not measures)
        momentum, variance = self._buffers["momentum"], self._buffers["variance"]
        if measures:
            for part, group in zip(flat.parts, self.param_groups, strict=True):
                beta2, new = group["betas"][1], gradient[part]
                variance[part].mul_(kept(beta2, usable)).addcmul_(new, new, value=1 - beta2)
            self._num_measurements += 1
        denominator = torch.empty_like(variance)
        for part, group in zip(flat.parts, self.param_groups, strict=True):
            _, of_variance = self._corrections(group, self._num_measurements)
            torch.div(variance[part], of_variance, out=denominator[part])
            denominator[part].sqrt_().add_(group["eps"])
        if not measures:
            no_variance = variance == 0  # as _mask does
            self._average(gradient.masked_fill_(no_variance, 0.0), denominator)
            gradient.masked_fill_(no_variance, 0.0)
        for part, group in zip(flat.parts, self.param_groups, strict=True):
            beta1, new = group["betas"][0], gradient[part]
            momentum[part].mul_(kept(beta1, usable)).add_(new, alpha=1 - beta1)
            of_momentum, _ = self._corrections(group, self._num_measurements)
            torch.div(momentum[part], denominator[part].mul_(of_momentum), out=new)
        self._add_decay(flat)
        gradient.mul_(usable)
        self._move(flat)
        if measures:
            self._var_counter += 1
            if self._var_counter == self._var_update_scaler:
                self._var_counter, self._var_interval = 0, 2 * self._var_interval
        if self.num_steps >= self.var_freeze_step:
            self._freeze(flat)

    def _freeze(self, flat: FlatParameters) -> None:
        self._freeze_variance(flat, self._num_measurements)
        self._buffers["moved"] = flat.zeros()
        self._buffers["anchor"] = anchor = flat.zeros()
        torch._foreach_copy_(flat.views(anchor), flat.params)
        # What was lost so far is of gradients; from now on, of weights times their denominator.
        self._exchange = None
        self.events.append({"step": self.num_steps, "event": "variance_frozen"})
        self._say(
            "0/1 Adam: variance frozen after step %d (%d measurements). From now on ranks step by "
            "themselves and agree every 1 to %d steps.",
            self.num_steps,
            self._num_measurements,
            self._local_step_clipper,
        )

    # ---- local steps

    def _step_apart(self, flat: FlatParameters, gradient: Tensor) -> None:
        usable = self._usable(gradient, everywhere=False)
        momentum, moved = self._buffers["momentum"], self._buffers["moved"]
        for i, (part, group) in enumerate(zip(flat.parts, self.param_groups, strict=True)):
            beta1, new = group["betas"][0], gradient[part]
            momentum[part].mul_(kept(beta1, usable)).add_(new, alpha=1 - beta1)
            of_momentum, _ = self._corrections(group, self._num_measurements)
            torch.div(momentum[part], of_momentum, out=new)
            moved[part].add_(new, alpha=group["lr"])
            self._rate_sums[i] += group["lr"] / of_momentum
            self._decays[i] *= 1 - group["lr"] * group["weight_decay"]
        self._mask(gradient)
        gradient.div_(self._buffers["denominator"])
        self._add_decay(flat)
        self._move(flat)
        self._steps_apart += 1
        # (A rate of zero moved nothing that they could agree on.)
        if self.num_steps % self._local_interval == 0 and all(self._rate_sums):
            self._agree(flat)
        self._local_counter += 1
        if self._local_counter == self._local_step_scaler:
            self._local_counter = 0
            self._local_interval = min(self._local_step_clipper, 2 * self._local_interval)

    def _agree(self, flat: FlatParameters) -> None:
        """Make momentum and weights the same on all ranks; a collective."""
        moved, anchor = self._buffers["moved"], self._buffers["anchor"]
        self._average_frozen(moved)
        for i, part in enumerate(flat.parts):
            torch.div(moved[part], self._rate_sums[i], out=self._buffers["momentum"][part])
            anchor[part].mul_(self._decays[i])
        anchor.addcdiv_(moved, self._buffers["denominator"], value=-1)
        torch._foreach_copy_(flat.params, flat.views(anchor))
        moved.zero_()
        self._steps_apart = 0
        self._rate_sums = [0.0 for _ in self.param_groups]
        self._decays = [1.0 for _ in self.param_groups]

    # ---- state

    def rank_state_dict(self) -> dict[str, Any]:
        """Compression errors and, between two agreements, this rank's momentum and weights."""
        own = {}
        if not self.replicas_agree:
            own = {name: self._buffers[name] for name in ("momentum", "moved")}
            flat = self._built()
            own["weights"] = torch.cat([p.detach().float().reshape(-1) for p in flat.params])
        return {**super().rank_state_dict(), "own": {k: v.cpu() for k, v in own.items()}}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`rank_state_dict`.

        Of another number of ranks, all start from rank 0's weights and momentum.
        """
        super().load_rank_state_dict(state)
        if not state["own"] or state["ranks"] != self._count_ranks():
            return
        flat = self._built()
        for name in ("momentum", "moved"):
            self._buffers[name].copy_(state["own"][name])
        weights = state["own"]["weights"].to(self._work.device)
        torch._foreach_copy_(flat.params, flat.views(weights))


@dataclass(frozen=True, kw_only=True)
class ZeroOneAdamMethod(OptimizerMethod):
    """Adam that ranks agree on more and more seldom, in signs."""

    name: ClassVar[str] = "zero_one_adam"
    paper: ClassVar[str] = "Lu et al., ICLR 2023, arXiv 2202.06009"
    scaling: ClassVar[str | None] = "sqrt"
    compresses: ClassVar[bool] = True

    lr: float = above(0, default_of(ZeroOneAdam, "lr"))
    """Learning rate."""
    weight_decay: float = at_least(0, default_of(ZeroOneAdam, "weight_decay"))
    """Weight decay of every parameter with at least two dimensions."""
    betas: list[float] = betas_option(default_of(ZeroOneAdam, "betas"))
    """Decays of the two moments."""
    eps: float = above(0, default_of(ZeroOneAdam, "eps"))
    """Added to the root of the second moment."""
    bias_correction: bool = default_of(ZeroOneAdam, "bias_correction")
    """Correct the moments for their start at zero."""
    preconditioned: bool = default_of(ZeroOneAdam, "preconditioned")
    """Compress the momentum divided by the root of the variance. False is what the papers and
    DeepSpeed do, and diverges where variances differ much."""
    block_size: int = at_least(0, default_of(ZeroOneAdam, "block_size"))
    """Entries that share a scale; 0 is one for all, as in DeepSpeed."""
    scale: Scale = default_of(ZeroOneAdam, "scale")
    """Statistic of the magnitudes that serves as scale; DeepSpeed: ``rms``."""
    var_freeze_step: int = at_least(1, default_of(ZeroOneAdam, "var_freeze_step"))
    """Last step that may measure the variance."""
    var_update_scaler: int = at_least(1, default_of(ZeroOneAdam, "var_update_scaler"))
    """Measurements after which their interval doubles."""
    local_step_scaler: int = at_least(1, default_of(ZeroOneAdam, "local_step_scaler"))
    """Steps after which the interval of agreement doubles."""
    local_step_clipper: int = at_least(1, default_of(ZeroOneAdam, "local_step_clipper"))
    """Largest interval of agreement."""

    def optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """:class:`ZeroOneAdam`."""
        return ZeroOneAdam(params, **self.arguments())
