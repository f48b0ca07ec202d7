"""FAB: adversarial images of small norm, along the linearised decision boundary.

Croce and Hein, ICML 2020, arXiv 1907.02044, algorithm 1; targeted as in Croce and Hein, ICML 2020,
arXiv 2003.01690, sec. 5.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import misclassified, targeted_margin, true_classes
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.projections import per_sample, step_to_plane
from dat_ds.attacks.targets import likeliest_wrong
from dat_ds.attacks.threat import ThreatModel

_LARGEST_BIAS = 0.1  # alpha_max
_OVERSHOOT = 1.05  # eta
_BACKWARD = 0.9  # beta
_FINAL_STEPS = 3
_FINAL_SHARE = 0.99  # of the way on which the margin would vanish: a tie changes no class


def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 100,
    restarts: int = 1,
    targets: int | Tensor | None = None,
    random_start: bool = False,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """FAB: the smallest perturbation that changes the class, kept if it is allowed.

    Cost: ``restarts`` times ``steps`` times two forwards and, untargeted, ``K - 1`` input-gradient
    backwards; targeted one, for each target. Five forwards more, and one for a number of targets.
    Leaves the model, the global generators and ``x`` as they were. The number of forwards does not
    depend on the data.

    Args:
        model: Pixels ``(B, C, H, W)`` in ``[threat.lower, threat.upper]`` to logits ``(B, K)``.
        x: Original images, float32.
        y: Class indices ``(B,)`` int64, or probabilities ``(B, K)``, of which the largest counts.
        threat: Allowed perturbations. The search itself looks beyond ``eps``.
        steps: Steps of a run, at least 1; AutoAttack has 100.
        restarts: Independent runs. The first starts from ``x``, further ones from a random image at
            most half as far from it as ``eps`` and as the nearest image so far.
        targets: None: each step goes to the class whose linearised boundary is nearest. A number:
            one series of runs towards each of that many likeliest wrong classes. Class indices
            ``(B,)``, none of them the sample's own: runs towards these.
        random_start: Start the first run at random too.
        generator: Source of the random starts. None: a fresh, unpredictable one.
        model_mode: Mode of the model's modules during the attack.
        gradient: How input gradients are taken and counted. None: the default way.

    Returns:
        ``x_adv``, detached float32 of the shape of ``x``, inside the threat model: the nearest
        misclassified image found, or ``x`` where that lies outside the ball or there is none.

    Raises:
        ValueError: For counts out of range.
    """
    if steps < 1 or restarts < 1 or (isinstance(targets, int) and targets < 1):
        raise ValueError(f"{steps=}, {restarts=} and targets={targets} must be at least 1.")
    is_random = restarts > 1 or random_start
    source = fresh_generator(x.device) if generator is None and is_random else generator
    with admitted(model, x, y, threat=threat, loss="cw", model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        classes = true_classes(y, "cw")
        assert classes is not None
        take_gradient = InputGradient() if gradient is None else gradient
        search = _Search(model, x, classes, threat, steps, take_gradient)
        nearest = search.begin()
        for others in search.others_of(targets):
            for restart in range(restarts):
                start = x.clone()
                if source is not None and (restart > 0 or random_start):
                    start = _random_start(x, threat, nearest.distance, source)
                nearest = search.run(start, others, nearest)
        x_adv = search.finish(nearest)
        allowed = threat.distance(x_adv, x) <= threat.eps
        return torch.where(per_sample(allowed, x), x_adv, threat.project(x, x))


def _random_start(x: Tensor, threat: ThreatModel, found: Tensor, source: Generator) -> Tensor:
    """A random image at most half as far from ``x`` as ``eps`` and as ``found`` ``(B,)``."""
    # At most 1/2, and 1/2 where no distance was found or nothing is allowed.
    share = (found / max(threat.eps, torch.finfo(x.dtype).tiny)).clamp(max=1.0) / 2
    delta = (threat.random_start(x, source) - x) * per_sample(share.to(x.dtype), x)
    return (x + delta).clamp_(threat.lower, threat.upper)


@dataclass
class _Nearest:
    """The nearest misclassified image of each sample so far; the original at infinity for none."""

    x_adv: Tensor
    distance: Tensor

    def or_if_nearer(self, x_adv: Tensor, distance: Tensor, fools: Tensor) -> _Nearest:
        nearer = fools & (distance < self.distance)
        return _Nearest(
            torch.where(per_sample(nearer, x_adv), x_adv, self.x_adv),
            torch.where(nearer, distance, self.distance),
        )


@dataclass
class _Search:
    """What all runs of an attack share.

    Args:
        model: Frozen, in the mode of the attack.
        x: Original images.
        y: Class indices ``(B,)``.
        threat: Norm and pixel range.
        steps: Of a run.
        take_gradient: Takes and counts input gradients.
    """

    model: Model
    x: Tensor
    y: Tensor
    threat: ThreatModel
    steps: int
    take_gradient: InputGradient

    def begin(self) -> _Nearest:
        """No image yet but those that are misclassified as they are."""
        with torch.no_grad():
            self._logits = self.model(self.x).double()
        unknown = torch.full_like(self.x.flatten(1)[:, 0], float("inf"))
        fools = misclassified(self._logits, self.y)
        return _Nearest(self.x, unknown).or_if_nearer(self.x, torch.zeros_like(unknown), fools)

    def others_of(self, targets: int | Tensor | None) -> list[Tensor]:
        """Classes ``(B, T)`` of each series of runs, the sample's own never among them."""
        if isinstance(targets, Tensor):
            return [targets.unsqueeze(1)]
        if targets is not None:
            likeliest = likeliest_wrong(self.model, self.x, self.y, targets)
            return [target.unsqueeze(1) for target in likeliest.unbind(dim=1)]
        classes = torch.arange(self._logits.shape[1] - 1, device=self.y.device)
        return [classes + (classes >= self.y.unsqueeze(1))]

    def run(self, x_adv: Tensor, others: Tensor, nearest: _Nearest) -> _Nearest:
        """The nearest images after one run from ``x_adv``."""
        for _ in range(self.steps):
            x_adv = self._step(x_adv, others)
            with torch.no_grad():
                fools = misclassified(self.model(x_adv), self.y)
            nearest = nearest.or_if_nearer(x_adv, self.threat.distance(x_adv, self.x), fools)
            back = self.x + _BACKWARD * (x_adv - self.x)
            x_adv = torch.where(per_sample(fools, x_adv), back, x_adv)
        return nearest

    def finish(self, nearest: _Nearest) -> Tensor:
        """Closer images on the way from the nearest one to the original.

        The margin between the two ends of the segment is taken for linear; each step evaluates the
        image just before it would vanish, which becomes the end on its side of the boundary.
        """
        outer, inner = nearest.x_adv, self.x
        with torch.no_grad():
            logits = self.model(outer).double()
            reached = logits.scatter(1, self.y.unsqueeze(1), float("-inf")).argmax(dim=1)
            outer_margin = self._margin(logits, reached)
            inner_margin = self._margin(self._logits, reached)
            for _ in range(_FINAL_STEPS):
                rise = (outer_margin - inner_margin).clamp_min(torch.finfo(torch.float64).tiny)
                share = (_FINAL_SHARE * outer_margin / rise).clamp(0, 1).to(outer.dtype)
                between = outer + per_sample(share, outer) * (inner - outer)
                logits = self.model(between).double()
                margin, fools = self._margin(logits, reached), misclassified(logits, self.y)
                is_outer = per_sample(fools, between)
                outer = torch.where(is_outer, between, outer)
                inner = torch.where(is_outer, inner, between)
                outer_margin = torch.where(fools, margin, outer_margin)
                inner_margin = torch.where(fools, inner_margin, margin)
        return outer

    def _margin(self, logits: Tensor, reached: Tensor) -> Tensor:
        return targeted_margin(logits, self.y, reached)

    def _step(self, x_adv: Tensor, others: Tensor) -> Tensor:
        """A step from ``x_adv`` across the nearest linearised boundary, biased to the original."""
        margin, weight = self._boundary(x_adv, others)
        # One projection for both: from the iterate, and from the original image.
        points = torch.stack([x_adv, self.x])
        way = ((self.x - x_adv) * weight).flatten(1).sum(dim=1, dtype=torch.float64)
        step, step_of_x = step_to_plane(
            weight,
            torch.stack([-margin, -margin - way]),
            self.threat.lower - points,
            self.threat.upper - points,
            self.threat.norm,
        )
        zero = torch.zeros_like(step)
        length = self.threat.distance(step, zero)
        length_of_x = self.threat.distance(step_of_x, zero)
        total = (length + length_of_x).clamp_min(torch.finfo(length.dtype).tiny)
        bias = per_sample((length / total).clamp_max(_LARGEST_BIAS), x_adv)
        moved = (1 - bias) * (x_adv + _OVERSHOOT * step) + bias * (self.x + _OVERSHOOT * step_of_x)
        return torch.clamp(moved, self.threat.lower, self.threat.upper)

    def _boundary(self, x_adv: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Margin ``(B,)`` and its gradient of the class whose linearised boundary is nearest."""
        found = None
        for margin, weight in self.take_gradient.of_margins(self.model, x_adv, self.y, others):
            slope = torch.linalg.vector_norm(
                weight.flatten(1), ord=self.threat.dual_order, dim=1, dtype=torch.float64
            )
            distance = margin.abs() / slope.clamp_min(torch.finfo(torch.float64).tiny)
            if found is not None:
                nearer = distance < found[0]
                distance = torch.where(nearer, distance, found[0])
                margin = torch.where(nearer, margin, found[1])
                weight = torch.where(per_sample(nearer, weight), weight, found[2])
            found = distance, margin, weight
        assert found is not None
        return found[1], found[2]
