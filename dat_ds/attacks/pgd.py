"""Projected gradient descent (Madry et al., ICLR 2018, arXiv 1706.06083).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.attacks.ascent import REFERENCE_LOSSES, Ascent, inner_target, worst_of
from dat_ds.attacks.attack import IteratedAttack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import Trait, at_least, option, step_length


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 10,
    step_size: StepSize | None = None,
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
            or one for each ``(B,)``; also as text, ``"2/255"`` or ``"eps/4"``. None: eps / 4.
        loss: Inner loss to maximise: a name of :data:`dat_ds.attacks.INNER_LOSSES` or a callable
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
    if targeted and loss in REFERENCE_LOSSES:
        raise ValueError(f"loss={loss!r} has no target to reach: use 'ce' with targeted=True.")
    inner = ascent_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    source = fresh_generator(x.device) if generator is None and random_start else generator
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        y = inner_target(model, x, y, loss)

        ascent = Ascent(
            threat=threat,
            steps=steps,
            step_size=threat.step(step_size, Pgd.step_share),
            loss=inner,
            momentum=momentum,
            random_start=random_start,
            targeted=targeted,
        )

        def run() -> Tensor:
            return ascent.run(model, x, y, source, take_gradient)

        return worst_of(model, [run] * restarts, y, loss, targeted)


@dataclass(frozen=True, kw_only=True)
class Pgd(IteratedAttack):
    """Projected gradient ascent on the inner loss, from a random start."""

    name: ClassVar[str] = "pgd"
    function = staticmethod(pgd)
    cost: ClassVar[str] = "`2K F`"
    paper: ClassVar[str] = "Madry et al., ICLR 2018, arXiv 1706.06083"
    card: ClassVar[str] = """\
    x_{t+1} = project(x_t + step_size * steepest(grad loss(model(x_t), y)))

10 steps of `eps / 4` from a random start. Each restart costs one more forward. Weak when
`steps * step_size < eps` (the attack cannot reach the boundary of the ball) and on models that mask
gradients; neither raises an error. A high `attack_zero_share` in the metrics means that a large
share of the input-gradient entries was exactly zero.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of a step. Default: ``eps/4``."""
    random_start: bool = True
    """Start at a random point of the ball."""
    restarts: int = at_least(1, 1, traits={Trait.LOOKS_AT_CLASSES: lambda v: v > 1})
    """Independent runs; the worst image of each sample is kept, a misclassified one first."""
    targeted: bool = option(False, is_key=False)
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""
    momentum: float = at_least(0, 0.0)
    """Decay of the accumulated direction; 0 is plain PGD."""
