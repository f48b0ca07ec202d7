"""Accuracy against the radius, against the number of steps and by class; the loss near an image.

Every function returns JSON-serialisable values: counts, with their fractions and 95 % intervals.
:mod:`dat_ds.evaluation.figures` draws them.

Shapes: ``B`` images, ``K`` classes; images ``(B, C, H, W)`` in the threat model's pixel range, on
the model's device, with labels ``(B,)`` int64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dat_ds.attacks import (
    SampleGenerator,
    ThreatModel,
    already_checked,
    apgd,
    attack_mode,
    cross_entropy,
    cw_margin,
)
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.noise import randn_like
from dat_ds.contracts import Gate, GatedModel
from dat_ds.evaluation.samples import wilson_interval

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Radii of a curve, as multiples of the threat model's."""
STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Attack steps at which a run is looked at."""

_LOSSES = ("ce", "cw")  # in order; each breaks images that the other does not
_SURFACE_ALONG = (-1.0, 1.5)  # 0 is the image, 1 the adversarial image
_SURFACE_ACROSS = (-1.25, 1.25)


def radii_of(threat: ThreatModel) -> list[float]:
    """Radii from 0 to 16 times the threat model's, as far as the pixel range reaches."""
    largest = threat.upper - threat.lower if threat.norm == "linf" else math.inf
    return sorted({f * float(threat.eps) for f in FACTORS if f * threat.eps <= largest})


def accuracy_against_radius(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    radii: Sequence[float],
    *,
    steps: int = 20,
    until: float = 0.01,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Images that stand APGD on cross-entropy and then on the margin, for growing radii.

    Each radius attacks the images that withstand all smaller ones, so the curve never rises.

    Args:
        model: Pixels to logits ``(B, K)``.
        x: Images.
        y: Labels.
        threat: Its norm and pixel range; the radius is taken from ``radii``.
        radii: In pixel units; 0 is the accuracy without an attack.
        steps: Gradient steps of each of the two runs at each radius.
        until: Radii beyond the first with an accuracy below this fraction are left out.
        seed: Seed of the random starts.
        batch_size: Images per forward.

    Returns:
        ``attacks`` as ``dat.attack`` sections write them, ``norm``, ``num_examples``, and one entry
        for each radius measured: ``radii``, ``standing``, ``accuracy``, ``intervals``.
    """
    measured: list[float] = []
    counts: list[int] = []
    with _opened(model) as called:
        standing = _correct(called, x, y, batch_size)
        for step, eps in enumerate(sorted(radii)):
            if counts and counts[-1] < until * len(x):
                break
            here = dataclasses.replace(threat, eps=eps)
            for loss in _LOSSES if eps > 0 else ():
                for part in torch.split(standing.nonzero().flatten(), batch_size):
                    stream = f"radius {loss}"
                    generator = SampleGenerator(seed, step, indices=part.tolist(), stream=stream)
                    images, labels = x[part], y[part]
                    x_adv = apgd(
                        called,
                        images,
                        labels,
                        threat=here,
                        steps=steps,
                        loss=loss,
                        generator=generator,
                    )
                    standing[part] = _correct(called, x_adv, labels, batch_size)
            measured.append(eps)
            counts.append(int(standing.sum()))
    return {
        "attacks": [_attack(loss, steps) for loss in _LOSSES],
        "norm": threat.norm,
        "radii": measured,
        **_shares(counts, len(x)),
    }


def accuracy_against_steps(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Images that stand the first steps of one run of APGD on cross-entropy.

    An image counts as broken from the first step on at which it was misclassified. APGD plans its
    step sizes for the whole run, so the entry for few steps is not that of a run of as few.

    Args:
        model: Pixels to logits ``(B, K)``.
        x: Images.
        y: Labels.
        threat: Allowed perturbations.
        steps: Where to look, each at least 1; the largest is the length of the run.
        seed: Seed of the random starts.
        batch_size: Images per forward.

    Returns:
        ``attack`` as a ``dat.attack`` section writes it, ``norm``, ``eps``, ``num_examples``,
        ``natural`` (images classified correctly without an attack), and one entry for each of
        ``steps``: ``standing``, ``accuracy``, ``intervals``.
    """
    looks = sorted(steps)
    with _opened(model) as called:
        correct = _correct(called, x, y, batch_size)
        first = torch.full_like(y, looks[-1] + 1)
        for part in torch.split(correct.nonzero().flatten(), batch_size):
            recorder = _Recorder(called, y[part], never=looks[-1] + 1)
            generator = SampleGenerator(seed, 0, indices=part.tolist(), stream="steps")
            apgd(
                recorder,
                x[part],
                y[part],
                threat=threat,
                steps=looks[-1],
                loss="ce",
                generator=generator,
            )
            first[part] = recorder.first
    counts = [int((correct & (first > look)).sum()) for look in looks]
    return {
        "attack": _attack("ce", looks[-1]),
        "norm": threat.norm,
        "eps": float(threat.eps),
        "natural": int(correct.sum()),
        "steps": looks,
        **_shares(counts, len(x)),
    }


def accuracy_by_class(
    samples: Sequence[Mapping[str, Any]], class_names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Accuracy of each class that occurs, without and under attack.

    Args:
        samples: Rows of ``samples.jsonl``.
        class_names: Names of the classes, from 0 on; numbers for those without.

    Returns:
        For each label, in order: ``label``, ``name``, ``num_examples``; ``natural`` and ``robust``
        counts with ``natural_acc``, ``robust_acc`` and their ``natural_interval`` and
        ``robust_interval``; ``taken_for``, the class that most of its broken images are taken for,
        and ``taken_count`` of them, None and 0 where none is broken.
    """
    by_label: dict[int, list[Mapping[str, Any]]] = {}
    for row in samples:
        by_label.setdefault(int(row["label"]), []).append(row)
    found = []
    for label, rows in sorted(by_label.items()):
        natural = sum(bool(row["correct"]) for row in rows)
        robust = sum(bool(row["robust"]) for row in rows)
        taken = Counter(
            int(row["predicted_under_attack"])
            for row in rows
            if row["broken_by"] is not None and row["predicted_under_attack"] is not None
        )
        # Ties go to the smaller class.
        taken_for = min(taken, key=lambda k: (-taken[k], k), default=None)
        found.append(
            {
                "label": label,
                "name": name_of(label, class_names),
                "num_examples": len(rows),
                "natural": natural,
                "robust": robust,
                "natural_acc": natural / len(rows),
                "robust_acc": robust / len(rows),
                "natural_interval": list(wilson_interval(natural, len(rows))),
                "robust_interval": list(wilson_interval(robust, len(rows))),
                "taken_for": None if taken_for is None else name_of(taken_for, class_names),
                "taken_count": 0 if taken_for is None else taken[taken_for],
            }
        )
    return found


def loss_surface(
    model: Model,
    x: Tensor,
    y: int,
    threat: ThreatModel,
    *,
    steps: int = 50,
    points: int = 41,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Margin and loss of one image in the plane of two perturbations of the same length.

    One leads to the adversarial image of APGD on the margin; the other is random: signs for
    l-infinity, a uniform direction for l2, a sparse one for l1. Images are clipped to the pixel
    range.

    Args:
        model: Pixels to logits ``(B, K)``.
        x: Image ``(C, H, W)``.
        y: Its label.
        threat: Allowed perturbations.
        steps: Gradient steps of the attack.
        points: Grid points on each axis, at least 2.
        seed: Seed of the random start and of the random direction.
        batch_size: Images per forward.

    Returns:
        ``label``, ``eps``, ``norm``, ``attack``, ``length`` of the perturbations in pixel units,
        ``along`` (0 is the image, 1 the adversarial image) and ``across`` (multiples of the
        length), and ``margin`` (true logit minus the largest other) and ``loss`` (cross-entropy),
        each a list of ``across`` rows with ``along`` entries.
    """
    image, label = x.unsqueeze(0), torch.tensor([y], device=x.device)
    generator = SampleGenerator(seed, 0, stream="surface")
    along = torch.linspace(*_SURFACE_ALONG, points, dtype=torch.float64)
    across = torch.linspace(*_SURFACE_ACROSS, points, dtype=torch.float64)
    margins, losses = [], []
    with _opened(model) as called:
        x_adv = apgd(
            called, image, label, threat=threat, steps=steps, loss="cw", generator=generator
        )
        length = threat.distance(x_adv, image)
        towards = x_adv - image
        sideways = threat.steepest(randn_like(image, generator)) * length
        places = torch.cartesian_prod(across, along).to(x.device, x.dtype)
        for part in torch.split(places, batch_size):
            b, a = (value.view(-1, 1, 1, 1) for value in part.unbind(dim=1))
            shown = (image + a * towards + b * sideways).clamp(threat.lower, threat.upper)
            with torch.no_grad():
                logits = called(shown).double()
            labels = label.expand(len(shown))
            margins.append(-cw_margin(logits, labels))
            losses.append(cross_entropy(logits, labels))
    shape = (points, points)
    return {
        "label": y,
        "eps": float(threat.eps),
        "norm": threat.norm,
        "attack": _attack("cw", steps),
        "length": float(length),
        "along": along.tolist(),
        "across": across.tolist(),
        "margin": torch.cat(margins).view(shape).tolist(),
        "loss": torch.cat(losses).view(shape).tolist(),
    }


def name_of(label: int, class_names: Sequence[str] | None) -> str:
    """Name of a class; its number where it has none."""
    names = class_names or ()
    return str(names[label]) if 0 <= label < len(names) else str(label)


class _Recorder:
    """A model that notes at which of its calls each image was first misclassified.

    Attributes:
        first: Number of that call, from 0 on; ``never`` where there was none ``(B,)``.
    """

    def __init__(self, model: Model, y: Tensor, never: int) -> None:
        self._model, self._y, self._never = model, y, never
        self._calls = 0
        self.first = torch.full_like(y, never)

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._model(x)
        wrong = logits.detach().argmax(dim=1) != self._y
        is_new = wrong & (self.first == self._never)
        self.first = torch.where(is_new, torch.full_like(self.first, self._calls), self.first)
        self._calls += 1
        return logits


@contextlib.contextmanager
def _opened(model: Model) -> Iterator[Model]:
    """The model with its outputs read, frozen and in eval mode."""
    with attack_mode(model), already_checked():
        yield GatedModel(model, Gate("classes"))


@torch.no_grad()
def _correct(model: Model, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Which images are classified correctly ``(B,)``."""
    parts = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    return torch.cat([model(images).argmax(dim=1) == labels for images, labels in parts])


def _attack(loss: str, steps: int) -> dict[str, Any]:
    return {"name": "apgd", "loss": loss, "steps": steps}


def _shares(counts: Sequence[int], total: int) -> dict[str, Any]:
    return {
        "num_examples": total,
        "standing": list(counts),
        "accuracy": [count / total for count in counts],
        "intervals": [list(wilson_interval(count, total)) for count in counts],
    }
