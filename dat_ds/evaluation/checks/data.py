"""Checks of the images, their normalisation, and the order of their labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dat_ds.evaluation.checks.finding import Measured, verdict
from dat_ds.evaluation.checks.probe import Probe

_SLACK = 1e-4
_DARK = 0.05
_TRIED = 64  # images that each normalisation is tried on first
_PROMISING = 2.0
_SIGMAS = 3.0
_LEAST_GAIN = 0.05
_DOMINANT = 0.9
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "one half": ((0.5,), (0.5,)),
    "MNIST": ((0.1307,), (0.3081,)),
}
"""Usual means and standard deviations, per channel or for all."""


def measure_images(probe: Probe) -> Measured:
    """Range of the pixels."""
    lower, upper = probe.threat.lower, probe.threat.upper
    width = upper - lower
    low, high = float(probe.x.min()), float(probe.x.max())
    mean, std = float(probe.x.mean()), float(probe.x.std())
    found = f"pixels span [{low:.4g}, {high:.4g}], mean {mean:.3g}, standard deviation {std:.3g}"
    if not (low >= lower - _SLACK * width and high <= upper + _SLACK * width):
        normalised = low < lower and abs(mean) < 0.5 and 0.3 < std < 3
        hint = "; they look normalised" if normalised else ""
        found = f"{found}: outside [{lower:g}, {upper:g}]{hint}"
        return verdict(True, found, std, fails=True)
    if high - low < _DARK * width:
        return verdict(True, f"{found}: a small part of [{lower:g}, {upper:g}]", std, fails=True)
    return Measured("ok", found, std)


def measure_accuracy(probe: Probe) -> Measured:
    """Natural accuracy against chance."""
    count, chance = len(probe.y), 1 / probe.num_classes
    return judge_accuracy(float(probe.correct.double().mean()), count, chance)


def judge_accuracy(accuracy: float, count: int, chance: float) -> Measured:
    """Whether an accuracy is above chance by more than sampling explains."""
    sigma = math.sqrt(chance * (1 - chance) / max(count, 1))
    found = f"natural accuracy {accuracy:.1%} of {count} images, by chance {chance:.1%}"
    return verdict(accuracy < chance + _SIGMAS * sigma, found, accuracy, fails=True)


def measure_normalisation(probe: Probe) -> Measured:
    """Whether images normalised once more, or one time less, are classified better."""
    modules = normalising_modules(probe.model)
    x = probe.x

    def gain(change: Callable[[Tensor], Tensor], part: slice) -> tuple[float, float]:
        guess = probe.logits(change(x[part])).argmax(dim=1)
        return _gain(guess == probe.y[part], probe.correct[part])

    best, by = (0.0, 0.0), ""
    for name, (mean, std) in STATISTICS.items():
        if len(mean) not in (1, x.shape[1]):
            continue
        m, s = (
            torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for v in (mean, std)
        )
        for word, change in (("undone", _affine(s, m)), ("applied", _affine(1 / s, -m / s))):
            outcome = gain(change, slice(_TRIED))
            if outcome[0] >= _PROMISING:
                outcome = gain(change, slice(None))
            if outcome > best:
                best, by = outcome, f"the normalisation of {name} {word} first"
    sigmas, more = best
    found = f"accuracy changes by {more:+.1%} with {by}" if by else "no usual statistics help"
    if sigmas >= _SIGMAS and more >= _LEAST_GAIN:
        return verdict(True, found, more, fails=True)
    if len(modules) > 1:
        found = f"{len(modules)} layers normalise: {', '.join(modules)}; {found}"
    return verdict(len(modules) > 1, found, more)


def _affine(factor: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor + shift


def _gain(after: Tensor, before: Tensor) -> tuple[float, float]:
    """McNemar's statistic in standard deviations, and the gain in accuracy."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return (gained - lost) / math.sqrt(max(gained + lost, 1)), (gained - lost) / len(before)


def normalising_modules(model: object) -> list[str]:
    """Names of the modules that subtract a mean and divide by a standard deviation per channel."""
    if not isinstance(model, nn.Module):
        return []
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if _normalises(module)
    ]


def _normalises(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    mean, std = getattr(module, "mean", None), getattr(module, "std", None)
    if not (_is_statistic(mean) and _is_statistic(std)):
        return False
    m, s = (torch.as_tensor(v, dtype=torch.float32).flatten().cpu() for v in (mean, std))
    return not (bool((m == 0).all()) and bool((s == 1).all()))


def _is_statistic(value: object) -> bool:
    """Whether it is one number per channel of an image."""
    if isinstance(value, Tensor):
        return 1 <= value.numel() <= 4
    return isinstance(value, (tuple, list)) and 1 <= len(value) <= 4


def measure_label_order(probe: Probe) -> Measured:
    """Whether the names, or other classes for the same labels, fit better."""
    data, training = probe.names.data, probe.names.training
    if data is not None and training is not None and list(data) != list(training):
        differing = [i for i, (a, b) in enumerate(zip(data, training, strict=False)) if a != b]
        first = (
            f"class {differing[0]} is {data[differing[0]]!r} in the data and " if differing else ""
        )
        first += f"{training[differing[0]]!r} in training" if differing else "their number differs"
        same = sorted(data) == sorted(training)
        return verdict(True, f"the names of the classes differ: {first}", fails=same)
    return judge_label_order(
        probe.clean.argmax(dim=1).tolist(), probe.y.tolist(), probe.num_classes
    )


def judge_label_order(predicted: Sequence[int], labels: Sequence[int], classes: int) -> Measured:
    """Whether classes in another order would be right more often, by cross-validation.

    The order that is best for one half of the images (Hungarian method on the confusion matrix) is
    tried on the other half, so that chance does not count; shifts by one are tried on all.
    """
    guess, truth = torch.tensor(predicted), torch.tensor(labels)
    right = guess == truth
    half = torch.arange(len(truth)) % 2 == 0
    reordered = torch.zeros_like(right)
    for fitted in (half, ~half):
        order = _best_order(guess[fitted], truth[fitted], classes)
        reordered[~fitted] = order[guess[~fitted]] == truth[~fitted]
    best, by = _gain(reordered, right), "the best order of the classes"
    for shift in (-1, 1):
        outcome = _gain(guess + shift == truth, right)
        if outcome > best:
            best, by = outcome, f"classes shifted by {shift:+d}"
    sigmas, gain = best
    found = f"accuracy changes by {gain:+.1%} with {by}"
    return verdict(sigmas >= _SIGMAS and gain >= _LEAST_GAIN, found, gain, fails=True)


def _best_order(guess: Tensor, truth: Tensor, classes: int) -> Tensor:
    """The class that each predicted class stands for ``(K,)``; its own where it is not seen."""
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    confusion.index_put_(
        (guess, truth), torch.ones(len(guess), dtype=torch.float64), accumulate=True
    )
    # Ties keep the classes as they are.
    confusion += 0.5 * torch.eye(classes, dtype=torch.float64)
    predicted, true = linear_sum_assignment(confusion.numpy(), maximize=True)
    order = torch.arange(classes)
    order[torch.as_tensor(predicted)] = torch.as_tensor(true)
    return order


def measure_predictions(probe: Probe) -> Measured:
    """Whether one class is predicted for nearly all images."""
    counts = torch.bincount(probe.clean.argmax(dim=1), minlength=probe.num_classes)
    labels = torch.bincount(probe.y, minlength=probe.num_classes)
    share = float(counts.amax() / counts.sum())
    expected = float(labels.amax() / labels.sum())
    found = f"the most frequent prediction is given for {share:.0%} of the images"
    return verdict(share > max(_DOMINANT, 1.5 * expected), found, share)


def measure_training_mode(probe: Probe) -> Measured:
    """Layers that were handed over in training mode."""
    layers = probe.layers_in_training
    if not layers:
        return Measured("ok", "no layer was handed over in training mode", 0.0)
    shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return verdict(True, f"in training mode when handed over: {shown}", float(len(layers)))
