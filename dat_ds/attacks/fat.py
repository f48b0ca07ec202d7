"""Friendly adversarial training's early-stopped PGD (Zhang et al., ICML 2020, arXiv 2002.11242).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.attacks.ascent import inner_target, step_
from dat_ds.attacks.attack import IteratedAttack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss, misclassified, true_classes
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import Trait, at_least, step_length


def fat(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 10,
    step_size: StepSize | None = None,
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
        model: Pixels ``(B, C, H, W)`` to logits ``(B, K)``, as in :func:`pgd`.
        x: Original images ``(B, C, H, W)``, as in :func:`pgd`.
        y: Class indices ``(B,)``, or probabilities ``(B, K)``.
        threat: Allowed perturbations.
        steps: Largest number of gradient steps.
        step_size: As in :func:`pgd`.
        extra_steps: The paper's ``tau``: steps a sample still takes while it is misclassified.
        loss: Name or callable, as in :func:`pgd`.
        random_start: As in :func:`pgd`.
        generator: As in :func:`pgd`.
        model_mode: As in :func:`pgd`.
        gradient: As in :func:`pgd`.

    Returns:
        ``x_adv`` as in :func:`pgd`.
    """
    inner = ascent_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    size = threat.step(step_size, Fat.step_share)
    with admitted(
        model, x, y, threat=threat, loss=loss, model_mode=model_mode, reads_labels=True
    ) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        project_ = threat.projector(x)
        classes, target = true_classes(y, loss), inner_target(model, x, y, loss)
        x_adv = threat.random_start(x, generator) if random_start else project_(x.clone())
        left = torch.full((len(x),), extra_steps, device=x.device)
        moves = torch.ones_like(left, dtype=torch.bool)
        for _ in range(steps):
            direction, _, logits = take_gradient.with_values(model, x_adv, target, inner)
            wrong = misclassified(logits, classes)
            moves &= ~(wrong & (left == 0))
            left -= (wrong & moves).long()
            if not take_gradient.agree(moves.any()):
                break
            direction = threat.steepest(direction, x_adv).mul_(per_sample(moves, x))
            x_adv = project_(step_(x_adv, direction, size))
        return x_adv


@dataclass(frozen=True, kw_only=True)
class Fat(IteratedAttack):
    """PGD in which each sample stops soon after it is misclassified."""

    name: ClassVar[str] = "fat"
    function = staticmethod(fat)
    cost: ClassVar[str] = "at most `2K F`"
    paper: ClassVar[str] = "Zhang et al., ICML 2020, arXiv 2002.11242, algorithm 1"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.LOOKS_AT_CLASSES, Trait.NEEDS_LABELS, Trait.ASKS_THE_HOST}
    )
    card: ClassVar[str] = """\
A sample stands still `extra_steps` (the paper's tau) steps after it is first misclassified. The
attack ends when the samples of all ranks stand still, decided together at one host synchronisation
a step. Cheaper and kinder to clean accuracy; weaker under strong attacks at small tau.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of a step. Default: ``eps/4``."""
    random_start: bool = True
    """Start at a random point of the ball."""
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""
    extra_steps: int = at_least(0, 0)
    """Steps a sample still takes once it is misclassified."""
