"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

Croce and Hein, ICML 2020, arXiv 2003.01690, algorithm 1 (l-infinity, l2); Croce and Hein, ICML
2021, arXiv 2103.01208, algorithm 1 (l1).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dat_ds.attacks.attack import IteratedAttack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import (
    InnerLoss,
    ascent_loss,
    misclassified,
    targeted_dlr,
    towards,
    true_classes,
)
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.targets import likeliest_wrong
from dat_ds.attacks.threat import ThreatModel, sparse_sign
from dat_ds.method import Trait, at_least

_MOMENTUM = 0.75  # alpha
_RHO = 0.75
_FIRST_CHECK, _CHECK_DECREASE, _SHORTEST_CHECK = 0.22, 0.03, 0.06  # as shares of the steps
_L1_CHECK = 0.04  # as a share of the steps
_EARLY_SHARE = 0.3  # of the steps, in each of a shrinking ball's larger radii
_L1_FIRST_SHARE = 0.2  # of the pixels
_L1_SPARSER, _L1_SHRINK, _L1_SMALLEST_STEP = 0.95, 1.5, 0.1


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 100,
    loss: str | InnerLoss = "ce",
    restarts: int = 1,
    num_targets: int = 9,
    random_start: bool = True,
    shrinking_ball: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """Auto-PGD: momentum, and steps that halve where a sample's loss stops rising.

    Cost: ``restarts`` times ``steps`` forwards and input-gradient backwards and one forward; with
    ``loss="dlr-targeted"`` that for each target, and one forward; with ``shrinking_ball`` two
    forwards more for each run. Leaves the model, the global generators and ``x`` as they were. The
    number of forwards does not depend on the data.

    Args:
        model: Pixels ``(B, C, H, W)`` in ``[threat.lower, threat.upper]`` to logits ``(B, K)``.
        x: Original images, float32.
        y: Class indices ``(B,)`` int64; probabilities ``(B, K)`` for losses that take them.
        threat: Allowed perturbations.
        steps: Gradient steps of a run, at least 1; 100 as in AutoAttack. 2 is the training
            attack of Singh et al., NeurIPS 2023, arXiv 2303.01870.
        loss: Inner loss to maximise: a name of :data:`dat_ds.attacks.INNER_LOSSES` but ``"kl"``, a
            callable ``(logits, y) -> (B,)``, or ``"dlr-targeted"``, which runs towards each of the
            likeliest wrong classes.
        restarts: Independent runs.
        num_targets: Wrong classes that ``"dlr-targeted"`` tries, at most ``K - 1`` of them.
        random_start: Start from a uniform draw from the ball instead of from ``x``.
        shrinking_ball: l1 only: each run spends 30 % of its steps in the ball of radius ``3 eps``,
            30 % in that of ``2 eps`` and the rest in that of ``eps``, each time from the projection
            of the point of largest loss so far (Croce and Hein, ICML 2021, arXiv 2103.01208, sec.
            3.3). Iterates of the larger balls are not results.
        generator: Source of the random starts. None: a fresh, unpredictable one.
        model_mode: Mode of the model's modules during the attack.
        gradient: How input gradients are taken and counted. None: the default way.

    Returns:
        ``x_adv``, detached float32 of the shape of ``x``, inside the threat model: of all iterates
        of all runs, a misclassified one before a correctly classified one, then the one with the
        largest loss.

    Raises:
        ValueError: For counts out of range, an unsuitable loss, or a shrinking ball of another norm
            than l1.
    """
    if steps < 1 or restarts < 1 or num_targets < 1:
        raise ValueError(
            f"steps={steps}, restarts={restarts} and num_targets={num_targets} must be at least 1."
        )
    if loss == "kl":
        raise ValueError("apgd does not take loss 'kl': use 'ce', or pgd.")
    if shrinking_ball and threat.norm != "l1":
        raise ValueError(f"shrinking_ball is for l1, not {threat.norm}: leave it out.")
    is_targeted = loss == "dlr-targeted"
    losses = [] if is_targeted else [ascent_loss(loss)]
    take_gradient = InputGradient() if gradient is None else gradient
    source = fresh_generator(x.device) if generator is None and random_start else generator
    best: _Best | None = None
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        if is_targeted:
            targets = likeliest_wrong(model, x, y, num_targets).unbind(dim=1)
            losses = [towards(targeted_dlr, target) for target in targets]
        classes = true_classes(y, loss)
        for inner in losses * restarts:
            phases = _phases(threat, steps) if shrinking_ball else [(threat, steps)]
            largest, _ = phases[0]
            start = largest.random_start(x, source) if random_start else threat.project(x, x)
            for ball, length in phases:
                # Inside already, a start of the first phase stays as it is, bit for bit.
                start = start if ball is largest else ball.project(start, x)
                run, start = _run(model, x, y, classes, start, ball, length, inner, take_gradient)
            # Losses towards different targets do not compare; misclassified ones come first.
            best = run if best is None else best.or_if_better(run)
    assert best is not None
    return best.x_adv


@dataclass
class _Best:
    """The best iterate of each sample so far: misclassified first, then the largest loss."""

    x_adv: Tensor
    fools: Tensor
    value: Tensor

    def or_if_better(self, other: "_Best") -> "_Best":
        better = (other.fools & ~self.fools) | (
            (other.fools == self.fools) & (other.value > self.value)
        )
        return _Best(
            torch.where(per_sample(better, self.x_adv), other.x_adv, self.x_adv),
            self.fools | other.fools,
            torch.where(better, other.value, self.value),
        )


def _phases(threat: ThreatModel, steps: int) -> list[tuple[ThreatModel, int]]:
    """Balls and steps of a run in a shrinking ball, without phases of no step."""
    early = round(_EARLY_SHARE * steps)
    lengths = (early, early, steps - 2 * early)
    balls = (dataclasses.replace(threat, eps=factor * threat.eps) for factor in (3, 2, 1))
    return [(ball, length) for ball, length in zip(balls, lengths, strict=True) if length]


def _run(
    model: Model,
    x: Tensor,
    y: Tensor,
    classes: Tensor | None,
    x_adv: Tensor,
    threat: ThreatModel,
    steps: int,
    loss: InnerLoss,
    take_gradient: InputGradient,
) -> tuple[_Best, Tensor]:
    """One run from ``x_adv``, and its point of largest loss.

    The plan of checks depends on ``steps`` alone.
    """
    gradient, value, logits = take_gradient.with_values(model, x_adv, y, loss)
    best = _Best(x_adv, misclassified(logits, classes), value)
    # The step-size rule follows the point of largest loss, misclassified or not.
    top, top_gradient, top_value = x_adv, gradient, value
    rule = (_SparsityRule if threat.norm == "l1" else _HalvingRule)(threat, steps, x, value)
    before = x_adv
    for step in range(steps):
        proposal = rule.move(x_adv, before, gradient, is_first=step == 0)
        before, x_adv = x_adv, proposal
        if step < steps - 1:
            gradient, value, logits = take_gradient.with_values(model, x_adv, y, loss)
        else:
            with torch.no_grad():
                logits = model(x_adv)
                value = loss(logits.double(), y.double() if y.is_floating_point() else y)
        best = best.or_if_better(_Best(x_adv, misclassified(logits, classes), value))
        rises = value > top_value
        top = torch.where(per_sample(rises, x), x_adv, top)
        top_gradient = torch.where(per_sample(rises, x), gradient, top_gradient)
        top_value = torch.where(rises, value, top_value)
        returns = rule.check(value, top, top_value)
        if returns is not None:
            x_adv = torch.where(per_sample(returns, x), top, x_adv)
            gradient = torch.where(per_sample(returns, x), top_gradient, gradient)
    return best, top


class _HalvingRule:
    """l-infinity and l2: halve a sample's step where its loss rose too seldom, or no higher."""

    def __init__(self, threat: ThreatModel, steps: int, x: Tensor, value: Tensor) -> None:
        self._threat, self._project_ = threat, threat.projector(x)
        self._step = torch.full_like(value, 2 * threat.eps, dtype=x.dtype)
        self._period = max(int(_FIRST_CHECK * steps), 1)
        self._decrease = max(int(_CHECK_DECREASE * steps), 1)
        self._shortest = max(int(_SHORTEST_CHECK * steps), 1)
        self._since = 0
        self._rises = torch.zeros_like(value)
        self._last_value, self._last_top = value, value
        self._halved = torch.ones_like(value, dtype=torch.bool)

    def move(self, x_adv: Tensor, before: Tensor, gradient: Tensor, is_first: bool) -> Tensor:
        """The next iterate: a projected step, and momentum after the first."""
        direction = self._threat.steepest(gradient.clone())
        target = self._project_(x_adv + direction * per_sample(self._step, x_adv))
        if is_first:
            return target
        mixed = x_adv + _MOMENTUM * (target - x_adv) + (1 - _MOMENTUM) * (x_adv - before)
        return self._project_(mixed)

    def check(self, value: Tensor, top: Tensor, top_value: Tensor) -> Tensor | None:
        """At a checkpoint, the samples that go back to their best point with half the step."""
        self._rises = self._rises + (value > self._last_value)
        self._last_value = value
        self._since += 1
        if self._since < self._period:
            return None
        seldom = self._rises <= _RHO * self._period
        stuck = ~self._halved & (self._last_top >= top_value)
        halves = seldom | stuck
        self._step = torch.where(halves, self._step / 2, self._step)
        self._halved, self._last_top = halves, top_value
        self._rises, self._since = torch.zeros_like(value), 0
        self._period = max(self._period - self._decrease, self._shortest)
        return halves


class _SparsityRule:
    """l1: steps along few pixels, whose number follows that of the best perturbation."""

    def __init__(self, threat: ThreatModel, steps: int, x: Tensor, value: Tensor) -> None:
        self._x, self._eps, self._project_ = x, threat.eps, threat.projector(x)
        self._step = torch.full_like(value, threat.eps, dtype=x.dtype)
        self._numel = x[:1].numel()
        self._share = torch.full_like(self._step, _L1_FIRST_SHARE)
        self._num_changed = torch.full_like(self._step, self._numel)
        self._period, self._since = max(int(_L1_CHECK * steps), 1), 0

    def move(self, x_adv: Tensor, before: Tensor, gradient: Tensor, is_first: bool) -> Tensor:
        """The next iterate: a projected sparse step."""
        direction = sparse_sign(gradient, self._share)
        return self._project_(x_adv + direction * per_sample(self._step, x_adv))

    def check(self, value: Tensor, top: Tensor, top_value: Tensor) -> Tensor | None:
        """At a checkpoint, the samples that became sparser and restart from their best point."""
        self._since += 1
        if self._since < self._period:
            return None
        self._since = 0
        num_changed = (top != self._x).flatten(1).sum(dim=1).to(self._step.dtype)
        sparser = num_changed < _L1_SPARSER * self._num_changed
        self._share = num_changed / self._numel / _L1_SHRINK
        smaller = (self._step / _L1_SHRINK).clamp_min(self._eps * _L1_SMALLEST_STEP)
        self._step = torch.where(sparser, torch.full_like(self._step, self._eps), smaller)
        self._num_changed = num_changed
        return sparser


@dataclass(frozen=True, kw_only=True)
class Apgd(IteratedAttack):
    """Auto-PGD: momentum, and steps that halve where a sample's loss stops rising."""

    name: ClassVar[str] = "apgd"
    function = staticmethod(apgd)
    cost: ClassVar[str] = "`(2K + 1) F`"
    paper: ClassVar[str] = (
        "Croce and Hein, ICML 2020, arXiv 2003.01690, algorithm 1; l1: ICML 2021, 2103.01208"
    )
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.LOOKS_AT_CLASSES, Trait.NEEDS_LABELS})
    losses: ClassVar[tuple[str, ...]] = ("ce", "cw", "dlr", "dlr-targeted")
    card: ClassVar[str] = """\
Starts with steps of `2 eps`, halves each sample's step when its loss stops rising, and returns to
its best point; no step size to choose. With `steps: 2` it is the cheap training attack of Singh et
al., NeurIPS 2023, arXiv 2303.01870. `loss: "dlr-targeted"` runs once per wrong class: for
evaluation.
"""

    restarts: int = at_least(1, 1, traits={Trait.LOOKS_AT_CLASSES: lambda v: v > 1})
    """Independent runs; the worst image of each sample is kept, a misclassified one first."""
    loss: str | None = None
    """Inner loss to maximise. Default ``ce``."""
    num_targets: int = at_least(1, 9)
    """With the loss ``dlr-targeted``: wrong classes to try."""
    random_start: bool = True
    """Start at a random point of the ball."""
