"""When an Adam-like variance has settled, so that it may be frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class VarianceStability:
    """The rule by which 1-bit Adam ends its warm-up, measured.

    The variance is stable once ``r_t = |v_t|_1 / |v_(t - D)|_1`` has come close to 1, with
    ``D = 1 / (1 - beta2)`` the steps that it averages over (Tang et al., ICML 2021, section 7.1,
    arXiv 2102.02888: ``r_t >= 0.96`` once the learning rate has stopped rising). Norms are of the
    bias-corrected variance, and a rise counts as a fall does: ``min(r_t, 1 / r_t)``.

    Norms stay on the device; only a look, every ``D / 10`` steps, waits for it.

    Args:
        beta2: Decay of the variance.
        threshold: Ratio from which on it counts as stable, in (0, 1].
    """

    def __init__(self, beta2: float, threshold: float) -> None:
        self.lag = max(1, round(1 / (1 - beta2)))
        self.threshold = threshold
        self.num_steps = 0
        self._norms: Tensor | None = None
        self._rate = 0.0
        self._rate_rises = True

    def observe(self, norm: Tensor, rate: float) -> None:
        """Take in one step.

        Args:
            norm: Sum of the bias-corrected variance after it, 0-dim.
            rate: Its learning rate.
        """
        if self._norms is None:
            # One more than the lag: the present norm, and the one that many steps ago.
            self._norms = torch.zeros(self.lag + 1, device=norm.device)
        self._norms[self.num_steps % len(self._norms)] = norm
        self._rate_rises, self._rate = rate > self._rate, rate
        self.num_steps += 1

    @property
    def looks(self) -> bool:
        """Whether the rule looks at the norms after this step."""
        is_due = self.num_steps % max(1, self.lag // 10) == 0
        return is_due and self.num_steps > self.lag and not self._rate_rises

    def ratio(self) -> float | None:
        """``min(r_t, 1 / r_t)``, waiting for the device.

        Over half of the steps so far where there were not as many as the lag; None before the
        second step, or where a norm is zero or not finite.
        """
        lag = self.lag if self.num_steps > self.lag else self.num_steps // 2
        if lag == 0 or self._norms is None:
            return None
        places = torch.tensor([self.num_steps - 1, self.num_steps - 1 - lag]) % len(self._norms)
        now, before = self._norms[places.to(self._norms.device)].tolist()
        if not 0 < now < float("inf") or not 0 < before < float("inf"):
            return None
        return float(min(now / before, before / now))

    def state_dict(self) -> dict[str, Any]:
        """State for :meth:`load_state_dict`."""
        return {
            "num_steps": self.num_steps,
            "norms": self._norms,
            "rate": self._rate,
            "rate_rises": self._rate_rises,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state_dict`."""
        self.num_steps, self._rate = state["num_steps"], state["rate"]
        self._rate_rises = state["rate_rises"]
        norms = state["norms"]
        self._norms = None if norms is None else norms.to(device)
