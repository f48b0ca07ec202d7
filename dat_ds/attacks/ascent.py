"""One run of projected gradient ascent, and the worst of several.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss, misclassified, true_classes
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.threat import ThreatModel

REFERENCE_LOSSES = ("kl",)
"""Inner losses that take the model's own distribution at ``x`` instead of labels."""


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Settings of projected gradient ascent; see :func:`dat_ds.attacks.pgd`.

    Args:
        threat: Allowed perturbations.
        steps: Gradient steps, at least 0.
        step_size: Length of a step in pixel units, for all samples or for each ``(B,)``.
        loss: Inner loss.
        momentum: Decay of the accumulated direction; 0 for none.
        random_start: Start from a draw from the ball instead of from the image.
        targeted: Minimise the loss instead.
    """

    threat: ThreatModel
    steps: int
    step_size: float | Tensor
    loss: InnerLoss
    momentum: float = 0.0
    random_start: bool = True
    targeted: bool = False

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        source: Generator | None,
        take_gradient: InputGradient,
    ) -> Tensor:
        """Adversarial images of one run.

        Args:
            model: Frozen, in the mode of the attack.
            x: Images ``(B, C, H, W)``, float32, not modified.
            y: Targets of the inner loss.
            source: Of the random start.
            take_gradient: Takes and counts input gradients.
        """
        threat = self.threat
        project_ = threat.projector(x)
        x_adv = threat.random_start(x, source) if self.random_start else project_(x.clone())
        average: Tensor | None = None
        for _ in range(self.steps):
            direction = take_gradient(model, x_adv, y, self.loss)
            if self.targeted:
                direction.neg_()
            if self.momentum:
                direction = _unit_l1(direction)
                average = (
                    direction if average is None else average.mul_(self.momentum).add_(direction)
                )
                direction = average.clone()
            x_adv = project_(step_(x_adv, threat.steepest(direction, x_adv), self.step_size))
        return x_adv


class AscentOptions(TypedDict, total=False):
    """Keyword arguments that attacks made of :func:`dat_ds.attacks.pgd` hand on to it."""

    loss: str | InnerLoss
    restarts: int
    targeted: bool
    generator: Generator | None
    model_mode: ModelMode
    gradient: InputGradient | None


def step_(x_adv: Tensor, direction: Tensor, step_size: float | Tensor) -> Tensor:
    """``x_adv + step_size * direction``, in place; the size is one number or ``(B,)``."""
    if isinstance(step_size, Tensor):
        return x_adv.addcmul_(direction, per_sample(step_size, x_adv))
    return x_adv.add_(direction, alpha=step_size)


def _unit_l1(gradient: Tensor) -> Tensor:
    norms = gradient.flatten(1).abs().sum(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / per_sample(norms, gradient)


def inner_target(model: Model, x: Tensor, y: Tensor, loss: str | InnerLoss) -> Tensor:
    """Target of the inner loss: ``y``, or the predicted distribution at ``x`` ``(B, K)``."""
    if loss not in REFERENCE_LOSSES:
        return y
    with torch.no_grad():
        return model(x).double().softmax(dim=1)


def worst_of(
    model: Model,
    runs: Sequence[Callable[[], Tensor]],
    y: Tensor,
    loss: str | InnerLoss,
    targeted: bool = False,
) -> Tensor:
    """The worst image of each sample over ``runs``: one that fools the model, then larger loss."""
    best = runs[0]()
    if len(runs) == 1:
        return best
    best_score = _score(model, best, y, loss, targeted)
    for run in runs[1:]:
        x_adv = run()
        score = _score(model, x_adv, y, loss, targeted)
        better = (score[0] > best_score[0]) | (
            (score[0] == best_score[0]) & (score[1] > best_score[1])
        )
        best = torch.where(per_sample(better, best), x_adv, best)
        best_score = (
            torch.where(better, score[0], best_score[0]),
            torch.where(better, score[1], best_score[1]),
        )
    return best


@torch.no_grad()
def _score(
    model: Model, x_adv: Tensor, y: Tensor, loss: str | InnerLoss, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Whether each sample fools the model, and the loss that ranks samples that tie."""
    logits = model(x_adv).double()
    hit = misclassified(logits, true_classes(y, loss)) != targeted
    values = ascent_loss(loss)(logits, y.double() if y.is_floating_point() else y)
    return hit, (-values if targeted else values).nan_to_num(nan=float("-inf"))
