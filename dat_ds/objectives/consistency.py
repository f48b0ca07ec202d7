"""Objectives that tie adversarial to natural predictions: TRADES, MART, ALP and HAT.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.objectives.base import Objective, accurate, average, cross_entropy, kl_divergence


@dataclass(frozen=True, kw_only=True)
class Trades(Objective):
    """``CE(f(x), y) + beta * KL(softmax f(x) || softmax f(x_adv))``.

    Zhang et al., ICML 2019, arXiv 1901.08573, eq. 5, with the divergence as in its sec. 5 and the
    ``beta`` of its table 5 (1 / lambda = 6). The second term needs no label: with unlabelled
    samples it is the stability training of Carmon et al., NeurIPS 2019, arXiv 1905.13736, eq. 4,
    and UAT-OT of Alayrac et al., NeurIPS 2019, arXiv 1905.13725.

    Args:
        beta: Weight of the divergence, at least 0.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
    """

    name: ClassVar[str] = "trades"
    default_attack_loss: ClassVar[str] = "kl"
    uses_unlabelled: ClassVar[bool] = True
    beta: float = 6.0
    label_smoothing: float = 0.0

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, ``natural_loss`` and ``consistency_loss`` (without ``beta``)."""
        z, z_adv = self._needed(logits), accurate(logits_adv)
        natural = average(cross_entropy(z, y, self.label_smoothing), weights)
        consistency = average(kl_divergence(z, z_adv), weights)
        return {
            "loss": natural + self.beta * consistency,
            "natural_loss": natural.detach(),
            "consistency_loss": consistency.detach(),
        }


@dataclass(frozen=True, kw_only=True)
class Mart(Objective):
    """``BCE(f(x_adv), y) + beta * KL(p || p_adv) * (1 - p_y)``, with ``p = softmax f(x)``.

    Wang et al., ICLR 2020, openreview rklOg6EFwS, eq. 11 and algorithm 1, where
    ``BCE = -log p_adv,y - log(1 - max_{k != y} p_adv,k)``.

    Args:
        beta: Weight of the second term, at least 0; the paper's lambda of 5.
    """

    name: ClassVar[str] = "mart"
    beta: float = 5.0

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, ``robust_loss`` (the BCE) and ``consistency_loss`` (without ``beta``)."""
        if y.is_floating_point():
            raise ValueError("objective 'mart' needs class indices, not probabilities: use 'at'.")
        z, z_adv = self._needed(logits), accurate(logits_adv)
        labelled = y >= 0
        index = y.clamp_min(0).unsqueeze(1)
        log_p_adv = z_adv.log_softmax(dim=1)
        runner_up = z_adv.scatter(1, index, float("-inf")).argmax(dim=1, keepdim=True)
        # log(1 - p_k) from the other classes' logits: 1 - p_k itself rounds to 0.
        log_rest = z_adv.scatter(1, runner_up, float("-inf")).logsumexp(dim=1)
        boosted = -log_p_adv.gather(1, index).squeeze(1) - log_rest + z_adv.logsumexp(dim=1)
        robust = average(boosted.where(labelled, 0.0), weights)
        missing = 1 - z.softmax(dim=1).gather(1, index).squeeze(1)
        consistency = average((kl_divergence(z, z_adv) * missing).where(labelled, 0.0), weights)
        return {
            "loss": robust + self.beta * consistency,
            "robust_loss": robust.detach(),
            "consistency_loss": consistency.detach(),
        }


@dataclass(frozen=True, kw_only=True)
class Alp(Objective):
    """``(CE(f(x), y) + CE(f(x_adv), y)) / 2 + beta * ||f(x) - f(x_adv)||_2^2 / K``.

    Adversarial logit pairing: Kannan, Kurakin and Goodfellow 2018, arXiv 1803.06373, sec. 3.1, with
    the squared error averaged over classes. Pairing alone is known to break under strong attacks
    (Engstrom et al. 2018, arXiv 1807.10272); here it is added to adversarial training.

    Args:
        beta: Weight of the pairing, at least 0; the paper's lambda of 0.5.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
    """

    name: ClassVar[str] = "alp"
    beta: float = 0.5
    label_smoothing: float = 0.0

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, ``natural_loss``, ``robust_loss`` and ``consistency_loss`` (no ``beta``)."""
        z, z_adv = self._needed(logits), accurate(logits_adv)
        natural = average(cross_entropy(z, y, self.label_smoothing), weights)
        robust = average(cross_entropy(z_adv, y, self.label_smoothing), weights)
        pairing = average((z - z_adv).square().mean(dim=1), weights)
        return {
            "loss": 0.5 * (natural + robust) + self.beta * pairing,
            "natural_loss": natural.detach(),
            "robust_loss": robust.detach(),
            "consistency_loss": pairing.detach(),
        }


@dataclass(frozen=True, kw_only=True)
class Hat(Objective):
    """``CE(f(x), y) + beta * KL(p || p_adv) + gamma * CE(f(x_helper), y_helper)``.

    Helper-based adversarial training: Rade and Moosavi-Dezfooli, ICLR 2022, openreview BuD2LmNaU3a,
    eq. 5. Helper images lie beyond the adversarial ones and carry the label that a naturally
    trained model gives those, which keeps the margin from growing further than robustness needs.

    Args:
        beta: Weight of the divergence, at least 0.
        gamma: Weight of the helper term, at least 0.
        label_smoothing: Probability mass spread over all classes, in [0, 1); of the natural term.
    """

    name: ClassVar[str] = "hat"
    default_attack_loss: ClassVar[str] = "kl"
    uses_unlabelled: ClassVar[bool] = True
    needs_helper_logits: ClassVar[bool] = True
    beta: float = 2.5
    gamma: float = 0.5
    label_smoothing: float = 0.0

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, ``natural_loss``, ``consistency_loss`` and ``helper_loss`` (no weights)."""
        z, z_adv = self._needed(logits), accurate(logits_adv)
        z_helper = self._needed(logits_helper, "the helper images")
        if y_helper is None:
            raise ValueError("objective 'hat' needs labels of the helper images.")
        natural = average(cross_entropy(z, y, self.label_smoothing), weights)
        consistency = average(kl_divergence(z, z_adv), weights)
        helper = average(cross_entropy(z_helper, y_helper), weights)
        return {
            "loss": natural + self.beta * consistency + self.gamma * helper,
            "natural_loss": natural.detach(),
            "consistency_loss": consistency.detach(),
            "helper_loss": helper.detach(),
        }


def helper_images(x: Tensor, x_adv: Tensor, lower: float = 0.0, upper: float = 1.0) -> Tensor:
    """HAT's helper images: ``x + 2 (x_adv - x)``, clipped to the pixel range.

    Args:
        x: Natural images, pixel units.
        x_adv: Adversarial images of the same shape.
        lower: Smallest pixel value.
        upper: Largest pixel value.
    """
    return torch.lerp(x, x_adv, 2.0).clamp_(lower, upper)
