"""Projected gradient descent and the attacks that are settings of it, as pure functions.

Madry et al., ICLR 2018, arXiv 1706.06083 (PGD); Goodfellow et al., ICLR 2015, arXiv 1412.6572
(FGSM); Wong et al., ICLR 2020, arXiv 2001.03994 (FGSM with a random start); de Jorge et al.,
NeurIPS 2022, arXiv 2202.01299 (N-FGSM); Dong et al., CVPR 2018, arXiv 1710.06081 (momentum);
Zhang et al., ICML 2020, arXiv 2002.11242 (friendly adversarial training); Tramer and Boneh,
NeurIPS 2019, arXiv 1904.13000 (several norms).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, resolve_inner_loss
from dat_ds.attacks.modes import ModelMode, attack_mode
from dat_ds.attacks.noise import Generator, fresh_generator, rand_like
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.threat import ThreatModel

Combine = Literal["worst", "average"]
_REFERENCE_LOSSES = ("kl",)
"""Inner losses that take the model's own distribution at ``x`` instead of labels."""


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float | Tensor,
    loss: str | InnerLoss = "ce",
    momentum: float = 0.0,
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
    where ``restarts > 1``, plus one for ``loss="kl"``. Leaves the model, the global generators and
    ``x`` as they were.

    Args:
        model: Pixels ``(B, C, H, W)`` in ``[threat.lower, threat.upper]`` to logits ``(B, K)``.
        x: Original images, float32.
        y: Labels ``(B,)`` int64, or probabilities ``(B, K)``; with ``targeted`` the classes to be
            reached. Not read by ``loss="kl"``.
        threat: Allowed perturbations.
        steps: Gradient steps, at least 0.
        step_size: Length of a step in pixel units, in the threat model's norm; one for all samples,
            or one for each ``(B,)``.
        loss: What to maximise: a name of :data:`dat_ds.attacks.INNER_LOSSES` or a callable
            ``(logits, y) -> (B,)``. ``"kl"`` moves away from the model's own distribution at ``x``
            (the inner problem of TRADES); its gradient at ``x`` is zero, so start at random.
        momentum: Decay ``mu`` of the accumulated direction
            ``g_{t+1} = mu g_t + grad / ||grad||_1`` (Dong et al., eq. 6); 0 is plain PGD.
        random_start: Start from a uniform draw from the ball instead of from ``x``.
        restarts: Independent runs; the worst image of each sample is kept: a misclassified one
            before a correctly classified one, then the one with the larger loss.
        targeted: Minimise the loss towards ``y`` instead.
        generator: Source of the random starts. None: a fresh, unpredictable one.
        model_mode: Mode of the model's modules during the attack.
        gradient: How input gradients are taken and counted. None: the default way.

    Returns:
        ``x_adv``, detached float32 of the shape of ``x``, inside the threat model.

    Raises:
        ValueError: For counts out of range, an unknown loss, or a targeted ``"kl"``.
    """
    if steps < 0 or restarts < 1:
        raise ValueError(f"steps={steps} must be at least 0 and restarts={restarts} at least 1.")
    if targeted and loss in _REFERENCE_LOSSES:
        raise ValueError(f"loss={loss!r} has no target to reach: use 'ce' with targeted=True.")
    inner = resolve_inner_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    source = fresh_generator(x.device) if generator is None and random_start else generator
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    with attack_mode(model, model_mode):
        y = _inner_target(model, x, y, loss)

        def run() -> Tensor:
            return _ascend(
                model,
                x,
                y,
                threat,
                steps,
                step_size,
                inner,
                momentum,
                random_start,
                targeted,
                source,
                take_gradient,
            )

        return _worst_of(model, [run] * restarts, y, inner, targeted)


def _ascend(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int,
    step_size: float | Tensor,
    loss: InnerLoss,
    momentum: float,
    random_start: bool,
    targeted: bool,
    source: Generator | None,
    take_gradient: InputGradient,
) -> Tensor:
    """One run of :func:`pgd`."""
    project_ = threat.projector(x)
    x_adv = threat.random_start(x, source) if random_start else project_(x.clone())
    average: Tensor | None = None
    for _ in range(steps):
        direction = take_gradient(model, x_adv, y, loss)
        if targeted:
            direction.neg_()
        if momentum:
            direction = _unit_l1(direction)
            average = direction if average is None else average.mul_(momentum).add_(direction)
            direction = average.clone()
        x_adv = project_(_step_(x_adv, threat.steepest(direction, x_adv), step_size))
    return x_adv


def _step_(x_adv: Tensor, direction: Tensor, step_size: float | Tensor) -> Tensor:
    if isinstance(step_size, Tensor):
        return x_adv.addcmul_(direction, per_sample(step_size, x_adv))
    return x_adv.add_(direction, alpha=step_size)


def _unit_l1(gradient: Tensor) -> Tensor:
    norms = gradient.flatten(1).abs().sum(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / per_sample(norms, gradient)


def _inner_target(model: Model, x: Tensor, y: Tensor, loss: str | InnerLoss) -> Tensor:
    """What the inner loss compares logits with: ``y``, or the distribution at ``x`` ``(B, K)``."""
    if loss not in _REFERENCE_LOSSES:
        return y
    with torch.no_grad():
        return model(x).double().softmax(dim=1)


def _worst_of(
    model: Model,
    runs: Sequence[Callable[[], Tensor]],
    y: Tensor,
    loss: InnerLoss,
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
    model: Model, x_adv: Tensor, y: Tensor, loss: InnerLoss, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Whether each sample fools the model, and the loss that ranks samples that tie."""
    logits = model(x_adv).double()
    soft = y.is_floating_point()
    hit = (logits.argmax(1) == (y.argmax(1) if soft else y)) == targeted
    values = loss(logits, y.double() if soft else y)
    return hit, (-values if targeted else values).nan_to_num(nan=float("-inf"))


def mim(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float | Tensor,
    loss: str | InnerLoss = "ce",
    momentum: float = 1.0,
    random_start: bool = False,
    restarts: int = 1,
    targeted: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Momentum iterative method (Dong et al., CVPR 2018, algorithm 1): :func:`pgd` with momentum.

    Arguments and result are those of :func:`pgd`; the defaults ``momentum=1.0`` and
    ``random_start=False`` are the paper's.
    """
    return pgd(
        model,
        x,
        y,
        threat=threat,
        steps=steps,
        step_size=step_size,
        loss=loss,
        momentum=momentum,
        random_start=random_start,
        restarts=restarts,
        targeted=targeted,
        generator=generator,
        model_mode=model_mode,
        gradient=gradient,
    )


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: float | Tensor | None = None,
    loss: str | InnerLoss = "ce",
    random_start: bool = False,
    restarts: int = 1,
    targeted: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Fast gradient sign method: :func:`pgd` with one step.

    Arguments and result are those of :func:`pgd`; ``step_size=None`` is :func:`fgsm_step_size`.

    Raises:
        ValueError: As :func:`pgd`, and for the l1 norm, which has no sign step.
    """
    _refuse_l1("fgsm", threat)
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


def fgsm_rs(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: float | Tensor | None = None,
    loss: str | InnerLoss = "ce",
    restarts: int = 1,
    targeted: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """FGSM from a random start (Wong et al., ICLR 2020): :func:`fgsm` with ``random_start``."""
    return fgsm(
        model,
        x,
        y,
        threat=threat,
        step_size=step_size,
        loss=loss,
        random_start=True,
        restarts=restarts,
        targeted=targeted,
        generator=generator,
        model_mode=model_mode,
        gradient=gradient,
    )


def n_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: float | Tensor | None = None,
    noise_scale: float = 2.0,
    loss: str | InnerLoss = "ce",
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """N-FGSM (de Jorge et al., NeurIPS 2022, algorithm 1): one step from noise, not projected.

    ``x_adv = x + noise + step_size * sign(grad)``, with ``noise`` uniform in
    ``[-noise_scale eps, noise_scale eps]``. The result leaves the ball, up to
    ``noise_scale * eps + step_size`` from ``x``; that is what keeps single-step training from
    collapsing, and why it is a training attack only.

    Args:
        model: As in :func:`pgd`.
        x: As in :func:`pgd`.
        y: As in :func:`pgd`.
        threat: l-infinity only.
        step_size: As in :func:`pgd`. None: eps, as in the paper.
        noise_scale: Half width of the noise in units of eps; the paper's ``k`` is 2.
        loss: As in :func:`pgd`.
        generator: As in :func:`pgd`.
        model_mode: As in :func:`pgd`.
        gradient: As in :func:`pgd`.

    Returns:
        ``x_adv``, float32 of the shape of ``x``, within the pixel range only.

    Raises:
        ValueError: For another norm than l-infinity.
    """
    if threat.norm != "linf":
        raise ValueError(f"n_fgsm is defined for norm 'linf', not {threat.norm!r}: use 'pgd'.")
    inner = resolve_inner_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    source = fresh_generator(x.device) if generator is None else generator
    width = noise_scale * threat.eps
    noisy = rand_like(x, source).mul_(2 * width).sub_(width).add_(x)
    with attack_mode(model, model_mode):
        y = _inner_target(model, x, y, loss)
        direction = threat.steepest(take_gradient(model, noisy, y, inner))
    size = threat.eps if step_size is None else step_size
    return _step_(noisy, direction, size).clamp_(threat.lower, threat.upper)


def fat(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float | Tensor,
    extra_steps: int = 0,
    loss: str | InnerLoss = "ce",
    random_start: bool = True,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Friendly adversarial training's PGD: each sample stops soon after it is misclassified.

    Early-stopped PGD-K-tau of Zhang et al., ICML 2020, algorithm 1. A sample stands still
    ``extra_steps`` steps after its first misclassification; the attack ends as soon as all samples
    of all ranks stand still, which is decided together through ``gradient.agree`` (one host
    synchronisation a step).

    Cost: at most ``steps`` forwards and input-gradient backwards.

    Args:
        model: As in :func:`pgd`.
        x: As in :func:`pgd`.
        y: Class indices ``(B,)``, or probabilities ``(B, K)``.
        threat: Allowed perturbations.
        steps: Largest number of gradient steps.
        step_size: As in :func:`pgd`.
        extra_steps: The paper's ``tau``: steps a sample still takes while it is misclassified.
        loss: As in :func:`pgd`.
        random_start: As in :func:`pgd`.
        generator: As in :func:`pgd`.
        model_mode: As in :func:`pgd`.
        gradient: As in :func:`pgd`.

    Returns:
        ``x_adv`` as in :func:`pgd`.
    """
    inner = resolve_inner_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    project_ = threat.projector(x)
    classes = y.argmax(dim=1) if y.is_floating_point() else y
    with attack_mode(model, model_mode):
        y = _inner_target(model, x, y, loss)
        x_adv = threat.random_start(x, generator) if random_start else project_(x.clone())
        left = torch.full_like(classes, extra_steps)
        moves = torch.ones_like(classes, dtype=torch.bool)
        for _ in range(steps):
            direction, _, logits = take_gradient.with_values(model, x_adv, y, inner)
            wrong = logits.argmax(dim=1) != classes
            moves &= ~(wrong & (left == 0))
            left -= (wrong & moves).long()
            if not take_gradient.agree(moves.any()):
                break
            direction = threat.steepest(direction, x_adv).mul_(per_sample(moves, x))
            x_adv = project_(_step_(x_adv, direction, step_size))
    return x_adv


def multi_norm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    other_norms: Mapping[str, float],
    combine: Combine = "worst",
    loss: str | InnerLoss = "ce",
    random_start: bool = True,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """:func:`pgd` within several norm balls (Tramer and Boneh, NeurIPS 2019, sec. 2).

    Cost: that of one :func:`pgd` per norm, plus one forward per norm for ``"worst"``.

    Args:
        model: As in :func:`pgd`.
        x: As in :func:`pgd`.
        y: As in :func:`pgd`.
        threat: First ball.
        steps: Gradient steps in each ball.
        step_size: Length of a step in the first ball; other balls take the same share of their eps.
        other_norms: Radius in pixel units of each further ball, by norm.
        combine: ``"worst"`` keeps each sample's worst image over the balls (max strategy),
            ``"average"`` returns all of them, ball after ball (average strategy).
        loss: As in :func:`pgd`.
        random_start: As in :func:`pgd`.
        generator: As in :func:`pgd`.
        model_mode: As in :func:`pgd`.
        gradient: As in :func:`pgd`.

    Returns:
        ``x_adv`` as in :func:`pgd`; of shape ``((1 + len(other_norms)) * B, C, H, W)`` for
        ``"average"``.

    Raises:
        ValueError: For an unknown norm or way to combine.
    """
    if combine not in ("worst", "average"):
        raise ValueError(f"combine={combine!r} is not one of worst, average.")
    inner = resolve_inner_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    share = step_size / threat.eps if threat.eps else 0.0
    threats = [threat, *(threat_like(threat, norm, eps) for norm, eps in other_norms.items())]
    source = fresh_generator(x.device) if generator is None and random_start else generator
    x = x.detach()
    with attack_mode(model, model_mode):
        y = _inner_target(model, x, y, loss)

        def run_in(ball: ThreatModel) -> Callable[[], Tensor]:
            return lambda: pgd(
                model,
                x,
                y,
                threat=ball,
                steps=steps,
                step_size=share * ball.eps,
                loss=inner,
                random_start=random_start,
                generator=source,
                gradient=take_gradient,
                model_mode=model_mode,
            )

        runs = [run_in(ball) for ball in threats]
        if combine == "average" or len(x) == 0:
            return torch.cat([run() for run in runs])
        return _worst_of(model, runs, y, inner)


def threat_like(threat: ThreatModel, norm: str, eps: float) -> ThreatModel:
    """A ball of another norm and radius within the same pixel range."""
    return replace(threat, norm=norm, eps=eps)  # type: ignore[arg-type]  # checked by ThreatModel


def _refuse_l1(name: str, threat: ThreatModel) -> None:
    if threat.norm == "l1":
        raise ValueError(f"{name} takes a sign step, which norm 'l1' has not: use 'pgd' or 'apgd'.")
