"""FGSM: one step of projected gradient ascent.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dat_ds.attacks.ascent import AscentOptions
from dat_ds.attacks.attack import Attack
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.pgd import pgd
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import Trait, at_least, option, step_length

if TYPE_CHECKING:
    from typing_extensions import Unpack


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: StepSize | None = None,
    random_start: bool = False,
    **options: Unpack[AscentOptions],
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., ICLR 2015): :func:`pgd` with one step.

    Arguments and result are those of :func:`pgd`; ``step_size=None`` is :func:`fgsm_step_size`.

    Raises:
        ValueError: As :func:`pgd`, and for the l1 norm, which has no sign step.
    """
    if threat.norm == "l1":
        raise ValueError("fgsm takes a sign step, which norm 'l1' has not: use 'pgd' or 'apgd'.")
    size = fgsm_step_size(threat, random_start) if step_size is None else step_size
    return pgd(
        model, x, y, threat=threat, steps=1, step_size=size, random_start=random_start, **options
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
    step_size: StepSize | None = None,
    **options: Unpack[AscentOptions],
) -> Tensor:
    """FGSM from a random start (Wong et al., ICLR 2020): :func:`fgsm` with ``random_start``."""
    return fgsm(model, x, y, threat=threat, step_size=step_size, random_start=True, **options)


@dataclass(frozen=True, kw_only=True)
class Fgsm(Attack):
    """One step of the length of eps along the sign of the gradient."""

    name: ClassVar[str] = "fgsm"
    function = staticmethod(fgsm)
    cost: ClassVar[str] = "`2 F`"
    paper: ClassVar[str] = "Goodfellow et al., ICLR 2015, arXiv 1412.6572"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    norm_reason: ClassVar[str] = ", which has no sign step"
    card: ClassVar[str] = """\
    x_adv = project(x_0 + step_size * steepest(grad loss(model(x_0), y)))

`x_0 = x`, `step_size = eps`. Collapses in long training at large `eps` (catastrophic overfitting):
accuracy under the attack itself rises while robust accuracy falls to 0. `dat.guard` watches for
that and is on by default for it.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of the step. Default: eps, and 1.25 eps from a random start."""
    random_start: bool = False
    """Start at a random point of the ball."""
    restarts: int = at_least(1, 1, traits={Trait.LOOKS_AT_CLASSES: lambda v: v > 1})
    """Independent runs; the worst image of each sample is kept, a misclassified one first."""
    targeted: bool = option(False, is_key=False)
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""

    @property
    def default_step_share(self) -> float:
        """1, and 1.25 from a random start."""
        return fgsm_step_size(ThreatModel("linf", 1.0), self.starts_at_random)


@dataclass(frozen=True, kw_only=True)
class FgsmRs(Attack):
    """FGSM from a draw from the ball, with a step of 1.25 eps."""

    name: ClassVar[str] = "fgsm_rs"
    function = staticmethod(fgsm_rs)
    cost: ClassVar[str] = "`2 F`"
    paper: ClassVar[str] = "Wong et al., ICLR 2020, arXiv 2001.03994"
    norms: ClassVar[tuple[str, ...]] = Fgsm.norms
    always_random: ClassVar[bool] = True
    norm_reason: ClassVar[str] = Fgsm.norm_reason
    step_share: ClassVar[float] = 1.25
    card: ClassVar[str] = """\
`x_0` uniform in the ball, `step_size = 1.25 eps`; otherwise as `fgsm`, and it collapses like it, if
later. The start is clipped to the pixel range; the authors' code clips after the step alone, which
leaves more of the noise where many pixels lie at an end of the range, as on MNIST.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of the step. Default: 1.25 eps."""
    restarts: int = at_least(1, 1, traits={Trait.LOOKS_AT_CLASSES: lambda v: v > 1})
    """Independent runs; the worst image of each sample is kept, a misclassified one first."""
    targeted: bool = option(False, is_key=False)
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""
