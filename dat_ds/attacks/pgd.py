"""Projected gradient descent and the fast gradient sign method, as pure functions.

Madry et al., ICLR 2018, arXiv 1706.06083 (PGD); Goodfellow et al., ICLR 2015, arXiv 1412.6572
(FGSM); Wong et al., ICLR 2020, arXiv 2001.03994 (FGSM with a random start).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

import torch
from torch import Tensor

from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, resolve_inner_loss
from dat_ds.attacks.modes import ModelMode, attack_mode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.threat import ThreatModel


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    loss: str | InnerLoss = "ce",
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Projected gradient ascent on the inner loss.

    ``x_{t+1} = project(x_t + step_size * steepest(grad loss(model(x_t), y)))``.

    Cost: ``restarts * steps`` forwards and input-gradient backwards, plus one forward per restart
    where ``restarts > 1``. Leaves the model, the global generators and ``x`` as they were.

    Args:
        model: Pixels ``(B, C, H, W)`` in ``[threat.lower, threat.upper]`` to logits ``(B, K)``.
        x: Original images, float32.
        y: Labels ``(B,)`` int64, or probabilities ``(B, K)``; with ``targeted`` the classes to be
            reached.
        threat: Allowed perturbations.
        steps: Number of gradient steps; 0 gives the start.
        step_size: Length of one step in the threat model's norm, pixel units.
        loss: ``"ce"`` or a callable ``(logits, y) -> (B,)``.
        random_start: Start from a uniform draw from the ball instead of from ``x``.
        restarts: Independent runs; the worst image of each sample is kept: a misclassified one
            before a correctly classified one, then the one with the larger loss.
        targeted: Minimise the loss towards ``y`` instead.
        generator: Source of the random starts. None: a fresh, unpredictable one.
        model_mode: Mode of the model's modules during the attack.
        gradient: How input gradients are taken and counted. None: the default way.

    Returns:
        ``x_adv``, detached float32 of the shape of ``x``, inside the threat model.
    """
    if steps < 0 or restarts < 1:
        raise ValueError(f"steps={steps} must be at least 0 and restarts={restarts} at least 1.")
    inner = resolve_inner_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    source = fresh_generator(x.device) if generator is None and random_start else generator
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    project_ = threat.projector(x)
    signed_step = -step_size if targeted else step_size

    def run() -> Tensor:
        x_adv = threat.random_start(x, source) if random_start else project_(x.clone())
        for _ in range(steps):
            direction = threat.steepest(take_gradient(model, x_adv, y, inner))
            x_adv = project_(x_adv.add_(direction, alpha=signed_step))
        return x_adv

    with attack_mode(model, model_mode):
        best = run()
        if restarts == 1:
            return best
        best_score = _score(model, best, y, inner, targeted)
        for _ in range(restarts - 1):
            x_adv = run()
            score = _score(model, x_adv, y, inner, targeted)
            better = (score[0] > best_score[0]) | (
                (score[0] == best_score[0]) & (score[1] > best_score[1])
            )
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv, best)
            best_score = (
                torch.where(better, score[0], best_score[0]),
                torch.where(better, score[1], best_score[1]),
            )
    return best


@torch.no_grad()
def _score(
    model: Model, x_adv: Tensor, y: Tensor, loss: InnerLoss, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Whether each sample fools the model, and the loss that ranks samples that tie."""
    logits = model(x_adv).double()
    soft = y.is_floating_point()
    hit = (logits.argmax(1) == (y.argmax(1) if soft else y)) == targeted
    values = loss(logits, y.double() if soft else y)
    return hit, (-values if targeted else values).nan_to_num(nan=float("-inf"))


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: float | None = None,
    loss: str | InnerLoss = "ce",
    random_start: bool = False,
    restarts: int = 1,
    targeted: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Fast gradient sign method: :func:`pgd` with one step.

    Args:
        model: As in :func:`pgd`.
        x: As in :func:`pgd`.
        y: As in :func:`pgd`.
        threat: As in :func:`pgd`.
        step_size: Length of the step. None: :func:`fgsm_step_size`.
        loss: As in :func:`pgd`.
        random_start: Start from a uniform draw from the ball (FGSM-RS).
        restarts: As in :func:`pgd`.
        targeted: As in :func:`pgd`.
        generator: As in :func:`pgd`.
        model_mode: As in :func:`pgd`.
        gradient: As in :func:`pgd`.

    Returns:
        ``x_adv`` as in :func:`pgd`.
    """
    return pgd(
        model,
        x,
        y,
        threat=threat,
        steps=1,
        step_size=fgsm_step_size(threat, random_start) if step_size is None else step_size,
        loss=loss,
        random_start=random_start,
        restarts=restarts,
        targeted=targeted,
        generator=generator,
        model_mode=model_mode,
        gradient=gradient,
    )


def fgsm_step_size(threat: ThreatModel, random_start: bool) -> float:
    """``eps`` from the image itself; ``1.25 eps`` from a random start (Wong et al., sec. 4)."""
    return threat.eps * (1.25 if random_start else 1.0)
