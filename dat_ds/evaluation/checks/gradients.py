"""Checks of the input gradient, and of how the logits follow small changes of the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from dat_ds.evaluation.checks.finding import Measured, verdict
from dat_ds.evaluation.checks.probe import Probe

_NO_IMAGES = Measured("skipped", "no image is classified correctly")
_COARSE = Measured("skipped", "16-bit weights: rounding hides small changes")
_FINEST = 1e-6  # rounding of float32 weights, with room
_SHARE = 0.25  # of the images, for an alarm
_VANISHED = 1e-4
_STEPS = (1e-5, 1e-4)  # of a difference quotient, as shares of the pixel range
_DISAGREEMENT = 0.5
_RADII = (1e-6, 1e-5, 1e-4, 1 / 510, 1 / 255, 2 / 255)
_CONSTANT_RADII = (1e-5, 1e-4)
_JUMP = 0.3
_SPECIAL = 4.0
_NOTICEABLE = 0.01


def measure_gradient(probe: Probe) -> Measured:
    """Whether there is an input gradient at all."""
    if not len(probe.rows):
        return _NO_IMAGES
    gradient = probe.gradient
    if gradient is None:
        return verdict(True, "the outputs carry no gradient to the pixels", 1.0, fails=True)
    finite = gradient.flatten(1).isfinite().all(dim=1)
    damaged = float((~finite).double().mean())
    if damaged:
        found = f"the gradients of {damaged:.0%} of the images are not finite"
        return verdict(True, found, damaged, fails=True)
    return Measured("ok", "the outputs carry a finite gradient to the pixels", 0.0)


def measure_zero_gradient(probe: Probe) -> Measured:
    """Gradients of the margin that are zero, or too small to predict any change."""
    if not len(probe.rows):
        return _NO_IMAGES
    gradient = probe.gradient
    if gradient is None:
        return Measured("skipped", "there is no gradient")
    # What the gradient predicts for moving every pixel through the whole range.
    width = probe.threat.upper - probe.threat.lower
    reach = gradient.flatten(1).abs().sum(dim=1) * width
    zero = float((reach == 0).double().mean())
    vanished = float((reach < _VANISHED * probe.spread[probe.rows]).double().mean())
    found = f"zero for {zero:.0%} of the images, next to zero for {vanished - zero:.0%}"
    return verdict(vanished >= _SHARE, found, vanished, fails=vanished >= 1 - _SHARE)


def _margin(logits: Tensor, y: Tensor, other: Tensor) -> Tensor:
    pick = torch.stack([other, y], dim=1)
    return -logits.gather(1, pick).diff(dim=1).squeeze(1)


def measure_gradient_agreement(probe: Probe) -> Measured:
    """The gradient against difference quotients along it."""
    if not len(probe.rows):
        return _NO_IMAGES
    gradient = probe.gradient
    if gradient is None:
        return Measured("skipped", "there is no gradient")
    if probe.rounding > _FINEST:
        return _COARSE
    slope = gradient.flatten(1).abs().sum(dim=1)
    usable = slope > 0
    if not bool(usable.any()):
        return Measured("skipped", "every gradient is zero")
    x, y, direction = probe.images[usable], probe.labels[usable], gradient[usable].sign()
    clean = probe.clean[probe.rows[usable]]
    other = clean.scatter(1, y[:, None], float("-inf")).argmax(dim=1)
    width = probe.threat.upper - probe.threat.lower
    best = torch.full_like(slope[usable], float("inf"))
    for step in _STEPS:
        move = (step * width * direction).to(x.dtype)
        ahead = _margin(probe.logits(x + move), y, other)
        behind = _margin(probe.logits(x - move), y, other)
        # What float32 makes of the step is what was moved.
        quotient = (ahead - behind) / (2 * step * width)
        best = torch.minimum(best, (quotient / slope[usable] - 1).abs())
    differing = float((best > _DISAGREEMENT).double().mean())
    found = (
        f"difference quotients differ from the gradient by more than {_DISAGREEMENT:.0%} for "
        f"{differing:.0%} of the images (median error {float(best.median()):.1%})"
    )
    return verdict(differing >= _SHARE, found, differing, fails=differing >= 1 - _SHARE)


def _noise(probe: Probe, purpose: str, radius: float) -> Tensor:
    """Random signs times ``radius`` of the pixel range, like the attacked images."""
    x = probe.images
    bits = probe.generator(purpose).bits(len(x), x[:1].numel(), x.device)
    signs = (bits >= 0).to(x.dtype).view(x.shape).mul_(2).sub_(1)
    return signs.mul_(radius * (probe.threat.upper - probe.threat.lower))


def measure_input_quantisation(probe: Probe) -> Measured:
    """Small changes of all pixels that change no logit at all, where larger ones do."""
    if not len(probe.rows):
        return _NO_IMAGES
    if probe.rounding > _FINEST:
        return _COARSE
    clean = probe.clean[probe.rows]
    constant = 0.0
    for radius in _CONSTANT_RADII:
        logits = probe.logits(probe.images + _noise(probe, "quantisation", radius))
        same = float((logits == clean).all(dim=1).double().mean())
        constant = max(constant, same)
    found = (
        f"changing every pixel by up to {_CONSTANT_RADII[-1]:g} of the range leaves the logits of "
        f"{constant:.0%} of the images exactly as they were"
    )
    return verdict(constant >= _SHARE, found, constant, fails=constant >= 1 - _SHARE)


def measure_continuity(probe: Probe) -> Measured:
    """Jumps of the logits under changes as small as rounding."""
    if not len(probe.rows):
        return _NO_IMAGES
    if probe.rounding > _FINEST:
        return _COARSE
    rows = probe.rows
    tiny = probe.change(probe.logits(probe.images + _noise(probe, "continuity", 1e-6)), rows)
    small = probe.change(probe.logits(probe.images + _noise(probe, "continuity", 1e-3)), rows)
    jumps = (tiny > _JUMP * small) & (tiny > _NOTICEABLE * _NOTICEABLE)
    share = float(jumps.double().mean())
    found = (
        f"changing pixels by 1e-6 of the range changes the logits by {float(tiny.median()):.2g} of "
        f"their size (median), by 1e-3: {float(small.median()):.2g}"
    )
    return verdict(share >= _SHARE, found, share, fails=share >= 1 - _SHARE)


def measure_label_leak(probe: Probe) -> Measured:
    """Whether the logits at the images themselves stand apart from those of their neighbours.

    For a smooth model a neighbour differs from the image no more than two neighbours do from each
    other. Where the model knows the images, it is the image that differs, at whatever radius its
    memory ends.
    """
    if not len(probe.rows):
        return _NO_IMAGES
    clean = probe.clean[probe.rows]
    worst, at, gain = 0.0, 0.0, 0.0
    for radius in _RADII:
        one = probe.logits(probe.images + _noise(probe, "neighbour one", radius))
        two = probe.logits(probe.images + _noise(probe, "neighbour two", radius))
        from_image = (one + two - 2 * clean).flatten(1).norm(dim=1) / 2
        apart = (one - two).flatten(1).norm(dim=1)
        visible = from_image > _NOTICEABLE * probe.spread[probe.rows]
        special = float(((from_image > _SPECIAL * apart) & visible).double().mean())
        if special > worst:
            away = probe.labels[:, None]
            true = clean.gather(1, away) - (one.gather(1, away) + two.gather(1, away)) / 2
            worst, at, gain = special, radius, float(true.median())
    found = f"the logits of {worst:.0%} of the images stand apart from those of their neighbours"
    if worst:
        found += f" at {at:.2g} of the pixel range (true logit higher by {gain:.3g}, median)"
    return verdict(worst >= _SHARE, found, worst, fails=True)
