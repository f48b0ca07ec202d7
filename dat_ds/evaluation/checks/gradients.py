"""Checks of the input gradient, and of how the logits follow small changes of the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from dat_ds.attacks import rand_like
from dat_ds.evaluation.checks.finding import RANDOM, Measured, verdict
from dat_ds.evaluation.checks.probe import Probe

_NO_IMAGES = Measured("skipped", "no image is classified correctly")
_COARSE = Measured("skipped", "16-bit weights: rounding hides small changes")
_FINEST = 1e-6  # rounding of float32 weights, with room
_SHARE = 0.25  # of the images, for an alarm
_VANISHED = 1e-4
_INSIDE = 0.01
_STEPS = (1e-5, 1e-4)  # of a difference quotient, as shares of the pixel range
_DISAGREEMENT = 0.5
_RESOLUTION = 30  # multiples of a logit's rounding that a difference of two shows
_RADII = (1e-6, 1e-5, 1e-4, 1 / 510, 1 / 255, 2 / 255)
_CONSTANT_RADII = (1e-6, 1e-5, 1e-4)
_JUMP = 0.3
_SPECIAL = 4.0
_NOTICEABLE = 0.01
_JUMP_SIZE = 1e-4


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


def _unclear(probe: Probe) -> Measured | None:
    """Why small changes of the pixels tell nothing; None where they do."""
    if not len(probe.rows):
        return _NO_IMAGES
    if probe.is_random:
        return RANDOM
    return _COARSE if probe.rounding > _FINEST else None


def _inside(probe: Probe) -> Tensor:
    """The attacked images, each pixel moved a little towards the middle of the range."""
    threat, x = probe.threat, probe.images
    width = threat.upper - threat.lower
    inwards = torch.where(x > (threat.lower + threat.upper) / 2, -width, width)
    return x + _INSIDE * inwards * rand_like(x, probe.generator("inside"))


def measure_gradient_agreement(probe: Probe) -> Measured:
    """The gradient against difference quotients in random directions.

    Taken a little inside the images: at pixels that are equal, such as of a black background,
    maxima have kinks.
    """
    if (unclear := _unclear(probe)) is not None:
        return unclear
    x, y = _inside(probe), probe.labels
    gradient = probe.gradient_at(x, y)
    if gradient is None:
        return Measured("skipped", "there is no gradient")
    if not bool(gradient.any()):
        return Measured("skipped", "every gradient is zero")
    other = probe.logits(x).scatter(1, y[:, None], float("-inf")).argmax(dim=1)
    pair = torch.stack([y, other], dim=1)
    error = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
    visible = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    rounding = _RESOLUTION * probe.rounding * probe.shown.abs().amax(dim=1)
    for step in _STEPS:
        move = _noise(probe, "directions", step)
        ahead, behind = x + move, x - move
        logits = probe.logits(ahead) - probe.logits(behind)
        quotient = logits.gather(1, pair).diff(dim=1).squeeze(1)
        # What float32 makes of the move is what was moved.
        moved = (ahead.double() - behind.double()).flatten(1)
        expected = (gradient.flatten(1) * moved).sum(dim=1)
        size = torch.maximum(quotient.abs(), expected.abs()).clamp_min(1e-300)
        error = torch.minimum(error, (quotient - expected).abs() / size)
        visible |= size > rounding
    if float(visible.double().mean()) < _SHARE:
        return Measured(
            "skipped", "small changes of the pixels drown in the rounding of the logits"
        )
    error = error[visible]
    differing = float((error > _DISAGREEMENT).double().mean())
    found = (
        f"difference quotients differ from the gradient by more than {_DISAGREEMENT:.0%} for "
        f"{differing:.0%} of the images (median error {float(error.median()):.1%})"
    )
    return verdict(differing >= _SHARE, found, differing, fails=differing >= 2 * _SHARE)


def _noise(probe: Probe, purpose: str, radius: float) -> Tensor:
    """Random signs times ``radius`` of the pixel range, like the attacked images."""
    x = probe.images
    bits = probe.generator(purpose).bits(len(x), x[:1].numel(), x.device)
    signs = (bits >= 0).to(x.dtype).view(x.shape).mul_(2).sub_(1)
    return signs.mul_(radius * (probe.threat.upper - probe.threat.lower))


def measure_input_quantisation(probe: Probe) -> Measured:
    """Small changes of all pixels that change no logit at all, where larger ones do."""
    if (unclear := _unclear(probe)) is not None:
        return unclear
    constant, at = 0.0, _CONSTANT_RADII[0]
    # Pixels may lie at the very values where a rounding jumps, but not all of them inside.
    inside = _inside(probe)
    for x, before in ((probe.images, probe.shown), (inside, probe.logits(inside))):
        for radius in _CONSTANT_RADII:
            logits = probe.logits(x + _noise(probe, "quantisation", radius))
            share = float((logits == before).all(dim=1).double().mean())
            if share > constant:
                constant, at = share, radius
    found = (
        f"changing every pixel by {at:g} of the range leaves the logits of {constant:.0%} of the "
        "images exactly as they were"
    )
    return verdict(constant >= _SHARE, found, constant, fails=constant >= 1 - _SHARE)


def measure_continuity(probe: Probe) -> Measured:
    """Jumps of the logits under changes as small as rounding."""
    if (unclear := _unclear(probe)) is not None:
        return unclear
    tiny = probe.change(probe.logits(probe.images + _noise(probe, "continuity", 1e-6)))
    small = probe.change(probe.logits(probe.images + _noise(probe, "continuity", 1e-3)))
    jumps = (tiny > _JUMP * small) & (tiny > _JUMP_SIZE)
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
    if (unclear := _unclear(probe)) is not None:
        return unclear
    clean = probe.shown
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
