"""The momentum iterative method (Dong et al., CVPR 2018, arXiv 1710.06081).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dat_ds.attacks.ascent import AscentOptions
from dat_ds.attacks.attack import IteratedAttack
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.pgd import pgd
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import Trait, at_least, option, step_length

if TYPE_CHECKING:
    from typing_extensions import Unpack


def mim(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 10,
    step_size: StepSize | None = None,
    momentum: float = 1.0,
    random_start: bool = False,
    **options: Unpack[AscentOptions],
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
        momentum=momentum,
        random_start=random_start,
        **options,
    )


@dataclass(frozen=True, kw_only=True)
class Mim(IteratedAttack):
    """PGD along a running average of normalised gradients."""

    name: ClassVar[str] = "mim"
    function = staticmethod(mim)
    cost: ClassVar[str] = "`2K F`"
    paper: ClassVar[str] = "Dong et al., CVPR 2018, arXiv 1710.06081, algorithm 1"
    card: ClassVar[str] = """\
    g_{t+1} = momentum * g_t + grad / ||grad||_1
    x_{t+1} = project(x_t + step_size * steepest(g_{t+1}))

Transfers better between models than PGD; on the model itself it is rarely stronger. `pgd` takes
`momentum` too.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of a step. Default: ``eps/4``."""
    random_start: bool = False
    """Start at a random point of the ball."""
    restarts: int = at_least(1, 1, traits={Trait.LOOKS_AT_CLASSES: lambda v: v > 1})
    """Independent runs; the worst image of each sample is kept, a misclassified one first."""
    targeted: bool = option(False, is_key=False)
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""
    momentum: float = at_least(0, 1.0)
    """Decay of the accumulated direction."""
