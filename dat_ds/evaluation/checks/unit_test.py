"""The active test of attacks: adversarial examples are planted, and the attack has to find them.

Zimmermann, Brendel, Tramer and Carlini, "Increasing Confidence in Adversarial Robustness
Evaluations", NeurIPS 2022, arXiv 2206.13991.

Shapes: ``B`` images, ``D`` features; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dat_ds.attacks.noise import Generator, rand_like
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.threat import ThreatModel
from dat_ds.evaluation.checks.finding import Measured, verdict
from dat_ds.evaluation.checks.probe import Probe

_INNER = 24  # random images of the ball, beside the image itself, of the first class
_STEPS = 20
_RIDGE = 1e-3
_LEAST = 0.75  # success of an attack that works
_EASY = 0.5  # success at random that makes the test say little


def measure_attack_unit_test(probe: Probe) -> Measured:
    """Share of planted adversarial examples that APGD finds, and that random images find."""
    if len(probe.rows) < 4 or probe.threat.eps == 0:
        return Measured("skipped", "too few images are classified correctly, or eps is 0")
    generator = probe.generator("unit test")
    x, threat = probe.images, probe.threat
    features = features_of(probe.model, probe.call)
    with torch.no_grad():
        inner = torch.stack(
            [features(x), *(features(threat.random_start(x, generator)) for _ in range(_INNER))], 1
        )
        planted = features(farthest(x, threat, generator))
    classifier = Planted.fitted(inner, planted)
    usable = classifier.separates
    if int(usable.sum()) < 4:
        share = float((~usable).double().mean())
        found = f"features of planted images equal those of the images for {share:.0%} of them"
        return verdict(True, found, 0.0)
    rows = usable.nonzero().flatten()
    x, classifier = x[rows], classifier.of(rows)

    def binary(images: Tensor) -> Tensor:
        score = classifier.score(features(images))
        return torch.stack([-score, score], dim=1)

    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    x_adv = probe.attack(x, y, "unit test", steps=_STEPS, model=binary, adapts_steps=True)
    at_random = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        found_by_attack = classifier.score(features(x_adv)) > 0
        for _ in range(_STEPS):
            images = threat.random_start(x, generator)
            at_random |= classifier.score(features(images)) > 0
    success = float(found_by_attack.double().mean())
    random = float(at_random.double().mean())
    found = f"APGD-{_STEPS} finds {success:.0%} of {len(x)} planted adversarial examples, "
    found += f"random images {random:.0%}"
    if random >= _EASY and success >= _LEAST:
        found += " (an easy test)"
    return verdict(success < _LEAST, found, success, fails=success < 0.5)


def farthest(x: Tensor, threat: ThreatModel, generator: Generator) -> Tensor:
    """Random images at the surface of the ball: corners for l-infinity."""
    if threat.norm == "linf":
        signs = rand_like(x, generator).sub_(0.5).sign_()
        # Towards the inside of the pixel range, where there is more room.
        middle = (threat.lower + threat.upper) / 2
        room = torch.where(x > middle, -1.0, 1.0)
        far = (x + threat.eps * signs > threat.upper) | (x + threat.eps * signs < threat.lower)
        return threat.project(x + threat.eps * torch.where(far, room, signs), x)
    start = threat.random_start(x, generator)
    length = threat.distance(start, x).clamp_min(1e-12)
    return threat.project(x + (start - x) * per_sample(threat.eps / length, x), x)


def features_of(model: object, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Images to the input of the model's last linear layer ``(B, D)``; else to its logits."""
    linear = (
        [m for m in model.modules() if isinstance(m, nn.Linear)]
        if isinstance(model, nn.Module)
        else []
    )
    if not linear:
        return call

    def features(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = call(x)
        finally:
            handle.remove()
        fits = len(seen) == 1 and seen[0].ndim == 2 and len(seen[0]) == len(x)
        return seen[0] if fits else logits

    return features


@dataclass(frozen=True)
class Planted:
    """A linear classifier of features for each image: positive at the planted example.

    Args:
        weight: ``(B, D)``.
        centre: ``(B, D)``.
        threshold: ``(B,)``.
        separates: Whether it tells the planted example from the inner ones ``(B,)``.
    """

    weight: Tensor
    centre: Tensor
    threshold: Tensor
    separates: Tensor

    @classmethod
    def fitted(cls, inner: Tensor, planted: Tensor) -> Planted:
        """Ridge regression, and a threshold between the planted example and the nearest inner one.

        Args:
            inner: Features of the first class ``(B, N, D)``.
            planted: Of the planted examples ``(B, D)``.
        """
        inner, planted = inner.double(), planted.double()
        centre = inner.mean(dim=1)
        rows = torch.cat([inner, planted[:, None]], dim=1) - centre[:, None]
        gram = rows @ rows.mT
        size = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-300)
        eye = torch.eye(rows.shape[1], dtype=gram.dtype, device=gram.device)
        target = torch.zeros(len(rows), rows.shape[1], 1, dtype=gram.dtype, device=gram.device)
        target[:, -1] = 1
        dual = torch.linalg.solve(gram / size[:, None, None] + _RIDGE * eye, target)
        weight = (rows.mT @ dual).squeeze(2) / size[:, None]
        scores = (rows @ weight[:, :, None]).squeeze(2)
        highest, at_planted = scores[:, :-1].amax(dim=1), scores[:, -1]
        # Neither rounding nor equal features may separate.
        separates = at_planted > highest + 1e-6
        return cls(weight, centre, (highest + at_planted) / 2, separates)

    def of(self, rows: Tensor) -> Planted:
        """The classifiers of some images."""
        return Planted(
            self.weight[rows], self.centre[rows], self.threshold[rows], self.separates[rows]
        )

    def score(self, features: Tensor) -> Tensor:
        """Positive where classified as the planted example ``(B,)``, float64."""
        return ((features.double() - self.centre) * self.weight).sum(dim=1) - self.threshold
