"""Inner losses: what an attack maximises. Per sample, never reduced.

Shapes: ``B`` batch, ``K`` classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_ds.method import Trait

InnerLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (B, K), y) -> loss (B,)``, larger is better for the attacker, no reduction."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample.

    For class indices it is written as ``softplus(logsumexp_{k != y} z_k - z_y)``, whose gradient
    does not round to zero however confident the model is.

    Args:
        logits: Shape ``(B, K)``, floating point.
        y: Class indices ``(B,)`` int64, or class probabilities ``(B, K)``.

    Returns:
        Shape ``(B,)``, same dtype as ``logits``.
    """
    if y.is_floating_point():
        return F.cross_entropy(logits, y, reduction="none")
    return F.softplus(log_odds(logits, y))


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Log-odds against the true class of each sample: what an attack climbs for cross-entropy.

    ``v = log((1 - p_y) / p_y) = logsumexp_{k != y} z_k - z_y``, of which the cross-entropy is the
    increasing function ``log(1 + exp(v))``: both order images alike. The gradient of the
    cross-entropy at the logits is ``1 - p_y`` times that of ``v``, which is ``q - e_y`` with ``q``
    the softmax over the other classes. Where ``p_y`` rounds to 1, loss and gradient of the
    cross-entropy round to 0; ``v`` and its gradient never do.

    Args:
        logits: Shape ``(B, K)``, floating point.
        y: Class indices ``(B,)`` int64.

    Returns:
        Shape ``(B,)``, same dtype as ``logits``.
    """
    true, others = _true_and_others(logits, y)
    return others.logsumexp(dim=1) - true


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margin ``max_{k != y} z_k - z_y`` (Carlini and Wagner, S&P 2017, arXiv 1608.04644, f6).

    Args:
        logits: Shape ``(B, K)``.
        y: Class indices ``(B,)`` int64.

    Returns:
        Shape ``(B,)``; positive where misclassified.

    Raises:
        ValueError: For probabilities instead of indices.
    """
    _refuse_probabilities("cw", y)
    true, others = _true_and_others(logits, y)
    return others.amax(dim=1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, arXiv 2003.01690, eq. 6).

    ``(max_{k != y} z_k - z_y) / (z_(1) - z_(3))``, with ``z_(i)`` the i-th largest logit: blind to
    shifts and to the scale of the logits.

    Args:
        logits: Shape ``(B, K)``, ``K >= 3``.
        y: Class indices ``(B,)`` int64.

    Returns:
        Shape ``(B,)``.

    Raises:
        ValueError: For fewer than 3 classes, or probabilities instead of indices.
    """
    _refuse_few_classes("dlr", logits, 3)
    _refuse_probabilities("dlr", y)
    largest = logits.topk(3, dim=1).values
    return cw_margin(logits, y) / (largest[:, 0] - largest[:, 2] + _TIE)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein, ICML 2020, eq. 7).

    ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``.

    Args:
        logits: Shape ``(B, K)``, ``K >= 4``.
        y: Class indices ``(B,)`` int64.
        target: Class to be reached, ``(B,)`` int64.

    Returns:
        Shape ``(B,)``.

    Raises:
        ValueError: For fewer than 4 classes, or probabilities instead of indices.
    """
    _refuse_few_classes("dlr-targeted", logits, 4)
    _refuse_probabilities("dlr-targeted", y)
    largest = logits.topk(4, dim=1).values
    gap = targeted_margin(logits, y, target)
    return gap / (largest[:, 0] - largest[:, 2:].mean(dim=1) + _TIE)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``z_t - z_y`` of each sample.

    Args:
        logits: Shape ``(B, K)``.
        y: Class indices ``(B,)`` int64.
        target: Class to be reached, ``(B,)`` int64.

    Returns:
        Shape ``(B,)``.
    """
    gap = logits.gather(1, target.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))
    return gap.squeeze(1)


def towards(loss: Callable[[Tensor, Tensor, Tensor], Tensor], target: Tensor) -> InnerLoss:
    """A targeted loss with its target classes ``(B,)``, as an inner loss."""
    return lambda logits, y: loss(logits, y, target)


def kl_divergence(logits: Tensor, p: Tensor) -> Tensor:
    """``KL(p || softmax(logits))`` of each sample; the inner loss of TRADES.

    Zhang et al., ICML 2019, arXiv 1901.08573, eq. 5.

    Args:
        logits: Shape ``(B, K)``.
        p: Probabilities ``(B, K)`` of the same dtype; zeros contribute nothing.

    Returns:
        Shape ``(B,)``.
    """
    return F.kl_div(logits.log_softmax(dim=1), p, reduction="none").sum(dim=1)


def feature_distance(features: Tensor, y: Tensor) -> Tensor:
    """``||features - y||_2^2`` of each sample; the inner loss of FARE.

    Schlarmann et al., ICML 2024, arXiv 2402.12336, sec. 3.

    Args:
        features: The model's outputs ``(B, D)``.
        y: Features that they are to stay close to ``(B, D)``.

    Returns:
        Shape ``(B,)``; its gradient is zero where both are equal.
    """
    return (features - y).square().sum(dim=1)


def nt_xent(
    features: Tensor,
    y: Tensor,
    temperature: float = 0.5,
    others: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalised temperature-scaled cross-entropy of each view.

    Chen et al., ICML 2020, arXiv 2002.05709, eq. 1: with ``s`` the cosine over the temperature,
    ``-log(exp s(z_i, z_j) / sum_{k != i} exp s(z_i, z_k))``, where ``z_j`` is the other view of the
    same image. The sum over a batch depends on all of its features together; its gradient at
    ``z_i`` holds every view's share.

    Args:
        features: Two views of each image one after the other ``(2 B, D)``.
        y: Int64 ``(2 B,)``; a view with a negative entry only fills a place: it is compared with
            none, and its loss is 0.
        temperature: Above 0.
        others: Features and entries of ``y`` of further views to compare with, such as other ranks'
            ``(M, D)`` and ``(M,)``.

    Returns:
        Shape ``(2 B,)``, same dtype as ``features``.
    """
    unit = F.normalize(features, dim=1)
    view = torch.arange(len(unit), device=unit.device)
    partner = view ^ 1
    excluded = (y < 0).expand(len(unit), -1)
    # A place that is only filled keeps its partner, so that no row is empty.
    excluded = excluded.scatter(1, partner.unsqueeze(1), value=False)
    excluded = excluded.scatter(1, view.unsqueeze(1), value=True)
    similarity = (unit @ unit.T / temperature).masked_fill(excluded, float("-inf"))
    positive = similarity.gather(1, partner.unsqueeze(1)).squeeze(1)
    if others is not None:
        further = unit @ F.normalize(others[0], dim=1).T / temperature
        further = further.masked_fill(others[1] < 0, float("-inf"))
        similarity = torch.cat([similarity, further], dim=1)
    return (similarity.logsumexp(dim=1) - positive).where(y >= 0, 0.0)


INNER_LOSSES: dict[str, InnerLoss] = {
    "ce": cross_entropy,
    "cw": cw_margin,
    "dlr": dlr,
    "kl": kl_divergence,
    "feature_distance": feature_distance,
    "nt_xent": nt_xent,
}
FEATURE_LOSSES = ("feature_distance", "nt_xent")
"""Losses of features, which know no classes and hence no misclassification."""
LOSS_TRAITS: dict[str, tuple[Trait, ...]] = {
    "ce": (Trait.NEEDS_LABELS, Trait.LOSS_OF_CLASSES),
    "cw": (Trait.NEEDS_LABELS, Trait.LOSS_OF_CLASSES, Trait.NEEDS_TRUE_CLASS),
    "dlr": (Trait.NEEDS_LABELS, Trait.LOSS_OF_CLASSES, Trait.NEEDS_TRUE_CLASS),
    "dlr-targeted": (Trait.NEEDS_LABELS, Trait.LOSS_OF_CLASSES, Trait.NEEDS_TRUE_CLASS),
    "kl": (Trait.LOSS_OF_CLASSES, Trait.FLAT_AT_THE_IMAGE),
    "feature_distance": (Trait.NEEDS_LABELS,),
    "nt_xent": (Trait.NEEDS_LABELS,),
}
"""Traits that an inner loss adds to a run."""
MIN_CLASSES: dict[str, int] = {"dlr": 3, "dlr-targeted": 4}
"""Fewest classes of the losses that need more than two."""

_TIE = 1e-12  # keeps the ratio finite where the largest logits are equal, as in the paper's release


def resolve_inner_loss(loss: str | InnerLoss) -> InnerLoss:
    """The inner loss of that name, or the callable itself.

    Raises:
        ValueError: For an unknown name.
    """
    if callable(loss):
        return loss
    if loss not in INNER_LOSSES:
        raise ValueError(f"loss={loss!r} is not one of {', '.join(INNER_LOSSES)}, nor a callable.")
    return INNER_LOSSES[loss]


def ascent_loss(loss: str | InnerLoss) -> InnerLoss:
    """The loss in the form that an attack climbs, where only direction and order count.

    For cross-entropy and class indices that is :func:`log_odds`, which no scale of the logits
    rounds to zero; any other loss is :func:`resolve_inner_loss`'s. An attack that adds something
    to the loss needs its value, and takes that.

    Raises:
        ValueError: For an unknown name.
    """
    inner = resolve_inner_loss(loss)
    return _climbed_cross_entropy if inner is cross_entropy else inner


def _climbed_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return (cross_entropy if y.is_floating_point() else log_odds)(logits, y)


def true_classes(y: Tensor, loss: str | InnerLoss) -> Tensor | None:
    """The classes ``(B,)`` that an attack leads away from; None where ``y`` names none.

    Args:
        y: Class indices ``(B,)``, probabilities ``(B, K)``, or what a callable loss compares, which
            are classes where they are integers ``(B,)``.
        loss: As the attack was given it.
    """
    if not y.is_floating_point():
        return y if y.ndim == 1 else None
    return None if callable(loss) else y.argmax(dim=1)


def misclassified(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Which samples are classified otherwise ``(B,)``: none where there are no classes.

    Args:
        logits: Shape ``(B, K)``; outputs of other shapes are of no classes.
        classes: Of :func:`true_classes`.
    """
    if classes is None or logits.ndim != 2:
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return logits.argmax(dim=1) != classes


def _true_and_others(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The true class's logit ``(B,)``, and all logits with minus infinity in its place."""
    index = y.unsqueeze(1)
    return logits.gather(1, index).squeeze(1), logits.scatter(1, index, float("-inf"))


def _refuse_probabilities(name: str, y: Tensor) -> None:
    if y.is_floating_point():
        raise ValueError(f"loss {name!r} needs class indices, not probabilities: use 'ce'.")


def _refuse_few_classes(name: str, logits: Tensor, fewest: int) -> None:
    if logits.shape[1] < fewest:
        raise ValueError(
            f"loss {name!r} needs at least {fewest} classes, not {logits.shape[1]}: use 'ce'."
        )
