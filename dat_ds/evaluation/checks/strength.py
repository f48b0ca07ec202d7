"""Checks of whether gradient attacks do on this model what gradient attacks can do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.evaluation.checks.finding import Measured, verdict
from dat_ds.evaluation.checks.probe import WHITE_BOX_STEPS, Probe
from dat_ds.evaluation.checks.search import estimated_ascent, random_search, surrogate_of

_NO_IMAGES = Measured("skipped", "no image is classified correctly")
_FEWEST = 3  # images that say more than chance
_SHARE = 0.1
_QUERIES = 150
_ESTIMATED_STEPS = 8
_UNBOUNDED_STEPS = 20
_ALONE = 8


def measure_black_box(probe: Probe) -> Measured:
    """Random search on what the white-box attack leaves."""
    return _beaten(
        probe,
        f"random search of {_QUERIES} queries",
        lambda x, y: random_search(
            probe.logits, x, y, probe.threat, _QUERIES, probe.generator("random search")
        ),
    )


def measure_estimated_gradient(probe: Probe) -> Measured:
    """An ascent along estimated gradients on what the white-box attack leaves."""
    return _beaten(
        probe,
        "the ascent along estimated gradients",
        lambda x, y: estimated_ascent(
            probe.logits, x, y, probe.threat, _ESTIMATED_STEPS, probe.generator("estimates")
        ),
    )


def measure_transfer(probe: Probe) -> Measured:
    """Images made for a surrogate, on what the white-box attack leaves."""

    def transferred(x: Tensor, y: Tensor) -> Tensor:
        surrogate = surrogate_of(probe.logits, probe.x, probe.threat, probe.generator("surrogate"))
        return probe.attack(x, y, "transfer", steps=20, model=surrogate)

    return _beaten(probe, "a transfer from a surrogate", transferred)


def _beaten(probe: Probe, name: str, attack: Callable[[Tensor, Tensor], Tensor]) -> Measured:
    if not len(probe.rows) or probe.threat.eps == 0:
        return _NO_IMAGES
    left = probe.standing
    if len(left) < _FEWEST:
        count = f"{len(left)} of {len(probe.rows)} images" if len(left) else "no image"
        return Measured("ok", f"the white-box attack leaves {count}: nothing to gain", 0.0)
    x, y = probe.images[left], probe.labels[left]
    fooled = int(probe.fooled(attack(x, y), y).sum())
    found = f"{name} breaks {fooled} of the {len(left)} images that PGD-{WHITE_BOX_STEPS} leaves"
    alarm = fooled >= max(_FEWEST, _SHARE * len(left))
    return verdict(alarm, found, fooled / len(left), fails=fooled > len(left) / 2)


def measure_convergence(probe: Probe) -> Measured:
    """Accuracy under more and more steps."""
    if not len(probe.rows) or probe.threat.eps == 0:
        return _NO_IMAGES
    count = len(probe.rows)
    after = [
        1 - float(fooled.double().mean()) for _, fooled in (probe.short_attack, probe.white_box)
    ]
    found = f"robust accuracy of {count} images {after[0]:.0%} after PGD-10, {after[1]:.0%} after "
    found += f"PGD-{WHITE_BOX_STEPS}"
    broken_late = round((after[0] - after[1]) * count)
    alarm = broken_late >= max(_FEWEST, 2 * _SHARE * count)
    if not alarm:
        return verdict(False, found, after[0] - after[1])
    left = probe.standing
    x, y = probe.images[left], probe.labels[left]
    more = probe.attack(x, y, "longest", steps=2 * WHITE_BOX_STEPS)
    further = int(probe.fooled(more, y).sum())
    found += f", {after[1] - further / count:.0%} after PGD-{2 * WHITE_BOX_STEPS}"
    alarm = further >= max(_FEWEST, _SHARE * count)
    return verdict(alarm, found, further / count)


def measure_unbounded_attack(probe: Probe) -> Measured:
    """An attack that may turn every image into the same grey one."""
    if not len(probe.rows):
        return _NO_IMAGES
    threat = ThreatModel(
        "linf",
        (probe.threat.upper - probe.threat.lower) / 2,
        probe.threat.lower,
        probe.threat.upper,
    )
    x, y = probe.images, probe.labels
    for loss, steps in (("ce", _UNBOUNDED_STEPS), ("cw", 2 * _UNBOUNDED_STEPS)):
        x_adv = probe.attack(x, y, f"unbounded {loss}", steps=steps, threat=threat, loss=loss)
        left = ~probe.fooled(x_adv, y)
        x, y = x[left], y[left]
        if not len(x):
            break
    share = len(x) / len(probe.rows)
    found = f"{len(x)} of {len(probe.rows)} images withstand PGD with eps of half the pixel range"
    return verdict(len(x) >= _FEWEST and share > _SHARE, found, share, fails=share > 0.5)


def measure_verification(probe: Probe) -> Measured:
    """Broken images shown again, alone and in another order."""
    if not len(probe.rows) or probe.threat.eps == 0:
        return _NO_IMAGES
    x_adv, fooled = probe.white_box
    broken = fooled.nonzero().flatten()
    if not len(broken):
        return Measured("ok", "the white-box attack breaks no image: nothing to verify", 0.0)
    x, y = x_adv[broken], probe.labels[broken]
    again = probe.fooled(x.flip(0), y.flip(0)).flip(0)
    alone = torch.cat(
        [probe.fooled(x[i : i + 1], y[i : i + 1]) for i in range(min(_ALONE, len(x)))]
    )
    again[: len(alone)] &= alone
    lost = int((~again).sum())
    found = f"{lost} of {len(x)} broken images are classified correctly when shown again"
    return verdict(lost > 0, found, lost / len(x), fails=lost >= max(_FEWEST, _SHARE * len(x)))
