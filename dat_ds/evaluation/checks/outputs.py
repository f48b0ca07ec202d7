"""Checks of what the model puts out: logits, deterministic, of each image alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dat_ds.attacks import rand_like
from dat_ds.evaluation.checks.finding import RANDOM, Measured, verdict
from dat_ds.evaluation.checks.probe import NOISE, Probe

_GRADIENT_NOISE = 0.01
_KERNELS = 10  # other batch sizes, other kernels: more than the order of sums
_ALONE = 8  # images shown alone
_SUM = 1e-3  # deviation of a sum of probabilities that may be rounding
_LARGEST_MARGIN = 103.0  # exp(-103) is smaller than every float32
_SMALLEST_MARGIN = 0.02  # confidences of 10 classes within 0.1018 and 0.1
_CLIPPED_SHARE = 0.1
_SATURATED = 5e-3


def measure_randomness(probe: Probe) -> Measured:
    """Two forwards, and two gradients, of the same images."""
    worst = probe.redrawn
    found = f"logits of the same images differ by up to {worst:.2g} of their size between forwards"
    if probe.is_random:
        return verdict(True, found, worst, fails=True)
    first = probe.gradient
    second = None if first is None else probe.gradient_at(probe.images, probe.labels)
    if first is None or second is None or not len(first):
        return verdict(False, found, worst)
    size = first.flatten(1).norm(dim=1).clamp_min(torch.finfo(first.dtype).tiny)
    differs = float(((second - first).flatten(1).norm(dim=1) / size).median())
    if differs > _GRADIENT_NOISE:
        found += f"; their gradients differ by {differs:.2g} of their length"
    return verdict(differs > _GRADIENT_NOISE, found, max(worst, differs))


def measure_batch_dependence(probe: Probe) -> Measured:
    """Logits of images alone, in another order, and beside other images."""
    x = probe.images
    if len(x) < 2:
        return Measured("skipped", "fewer than two correctly classified images")
    if probe.is_random:
        return RANDOM
    few = x[:_ALONE]
    strangers = _noise_images(probe)
    worst, where = 0.0, "in another batch"
    ways: dict[str, Callable[[], Tensor]] = {
        "alone": lambda: torch.cat([probe.logits(few[i : i + 1]) for i in range(len(few))]),
        "in reverse order": lambda: probe.logits(x.flip(0)).flip(0),
        "beside noise images": lambda: probe.logits(torch.cat([few, strangers]))[: len(few)],
        "in half a batch": lambda: probe.logits(x[: len(x) // 2]),
    }
    for name, logits_of_rows in ways.items():
        try:
            logits = logits_of_rows()
        except (RuntimeError, ValueError) as error:
            first_line = str(error).partition("\n")[0]
            return verdict(True, f"the forward of images {name} fails: {first_line}", fails=True)
        changed = float(probe.change(logits).amax())
        if changed > worst:
            worst, where = changed, name
    found = f"logits change by up to {worst:.2g} of their size when an image is shown {where}"
    return verdict(worst > _KERNELS * NOISE * probe.rounding, found, worst, fails=True)


def _noise_images(probe: Probe) -> Tensor:
    """Images of uniform noise over the pixel range, like the attacked ones."""
    noise = rand_like(probe.images, probe.generator("strangers"))
    return probe.threat.lower + (probe.threat.upper - probe.threat.lower) * noise


def measure_probabilities(probe: Probe) -> Measured:
    """Whether outputs are probabilities or their logarithms."""
    z = probe.clean
    total = z.sum(dim=1)
    log_total = z.logsumexp(dim=1)
    within = bool(((z >= 0) & (z <= 1 + _SUM)).all())
    if within:
        sums = "rows sum to 1" if _all_near(total, 1.0) else "rows do not sum to 1, as of sigmoids"
        return verdict(True, f"every output lies in [0, 1]; {sums}", 1.0, fails=True)
    if bool((z >= 0).all()) and _all_near(total, float(total.median())):
        found = f"no output is negative and every row sums to {float(total.median()):.4g}"
        return verdict(True, found, 1.0, fails=True)
    if _all_near(log_total, float(log_total.median())) and bool(probe.spread.std() > _SUM):
        found = f"exponentials of every row sum to exp({float(log_total.median()):.4g})"
        return verdict(True, f"log-probabilities: {found}", 1.0)
    found = f"outputs span [{float(z.min()):.4g}, {float(z.max()):.4g}] and are not probabilities"
    return verdict(False, found, 0.0)


def _all_near(values: Tensor, target: float) -> bool:
    return bool(((values - target).abs() <= _SUM * max(1.0, abs(target))).all())


def measure_logit_scale(probe: Probe) -> Measured:
    """Margins so large that cross-entropy in float32 is flat, or so small that all is uniform."""
    largest = probe.clean.topk(2, dim=1).values
    margins = largest[:, 0] - largest[:, 1]
    median = float(margins.median())
    saturated = float((margins > _LARGEST_MARGIN).double().mean())
    found = f"median margin between the two largest logits {median:.3g}"
    if saturated >= _CLIPPED_SHARE:
        found += f"; softmax in float32 is exactly one-hot for {saturated:.0%} of the images"
        return verdict(True, found, median)
    above_chance = float(probe.correct.double().mean()) > 2 / probe.num_classes
    flat = median < _SMALLEST_MARGIN and above_chance
    if flat:
        found += "; every softmax is nearly uniform, though the classes are told apart"
    return verdict(flat, found, median)


def measure_clipped_logits(probe: Probe) -> Measured:
    """Many logits exactly at one bound, or all largest ones just below one."""
    z = probe.clean
    if probe.num_classes == 2 and bool((z[:, 0] == 0).all()):
        return Measured("ok", "one output for two classes: compared with 0")
    worst, where = 0.0, ""
    for name, bound in (("largest", z.max()), ("smallest", z.min())):
        share = float((z == bound).any(dim=1).double().mean())
        if share > worst:
            worst, where = share, f"{name} value {float(bound):.4g}"
    found = f"{worst:.0%} of the images have a logit at exactly the {where}"
    if worst >= _CLIPPED_SHARE and len(z) * worst >= 3:
        return verdict(True, found, worst)
    tied = float((z.topk(2, dim=1).values.diff(dim=1) == 0).double().mean())
    if tied >= _CLIPPED_SHARE:
        return verdict(True, f"the two largest logits are equal for {tied:.0%} of the images", tied)
    top = z.amax(dim=1)
    low, middle = top.quantile(0.25), top.quantile(0.75)
    width = float((middle - low) / probe.spread.median())
    found += f"; the middle half of the largest logits spans {width:.2g} of their range"
    return verdict(width < _SATURATED and len(z) >= 16, found, worst)
