"""N-FGSM: one step from noise (de Jorge et al., NeurIPS 2022, arXiv 2202.01181).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dat_ds.attacks.ascent import inner_target, step_
from dat_ds.attacks.attack import Attack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator, rand_like
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import at_least, step_length


def n_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: StepSize | None = None,
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
        model: Pixels ``(B, C, H, W)`` to logits ``(B, K)``, as in :func:`pgd`.
        x: Original images ``(B, C, H, W)``, as in :func:`pgd`.
        y: Labels ``(B,)`` or probabilities ``(B, K)``, as in :func:`pgd`.
        threat: l-infinity only.
        step_size: Pixel units, as in :func:`pgd`. None: eps, as in the paper.
        noise_scale: Half width of the noise in units of eps; the paper's ``k`` is 2.
        loss: Name or callable, as in :func:`pgd`.
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
    inner = ascent_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    source = fresh_generator(x.device) if generator is None else generator
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        width = noise_scale * threat.eps
        noisy = rand_like(x, source).mul_(2 * width).sub_(width).add_(x)
        y = inner_target(model, x, y, loss)
        direction = threat.steepest(take_gradient(model, noisy, y, inner))
    size = threat.step(step_size, NFgsm.step_share)
    return step_(noisy, direction, size).clamp_(threat.lower, threat.upper)


@dataclass(frozen=True, kw_only=True)
class NFgsm(Attack):
    """One step from wide noise, not projected onto the ball."""

    name: ClassVar[str] = "n_fgsm"
    function = staticmethod(n_fgsm)
    cost: ClassVar[str] = "`2 F`"
    paper: ClassVar[str] = "de Jorge et al., NeurIPS 2022, arXiv 2202.01181, algorithm 1"
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    always_random: ClassVar[bool] = True
    step_share: ClassVar[float] = 1.0
    card: ClassVar[str] = """\
    x_adv = clip(x + noise + eps * sign(grad loss(model(x + noise), y))),  noise ~ U(-2 eps, 2 eps)

Collapses far later than FGSM. Not projected: the training images lie up to `3 eps` away, so clean
accuracy pays. A training attack only; never evaluate with it.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of the step. Default: eps."""
    noise_scale: float = at_least(0, 2.0)
    """Half width of the noise in units of eps."""
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""
