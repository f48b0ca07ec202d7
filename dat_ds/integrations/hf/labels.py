"""Check of a Trainer's labels on the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dat_ds.data.unlabelled import UNLABELLED
from dat_ds.errors import ConfigError
from dat_ds.integrations.hf.settings import Settings
from dat_ds.method import Trait

_IGNORED = -100  # by torch's cross-entropy, and by transformers' data collators


def check_labels(labels: Tensor | None, settings: Settings) -> None:
    """Refuse labels that attack or objective cannot take; waits for the device.

    Args:
        labels: Class indices ``(B,)``, -1 where there is none and ``-2 - c`` for a class ``c`` that
            a model gave; or probabilities ``(B, K)``. None where the batch has none.
        settings: Settings of the callback.

    Raises:
        ConfigError: With what is wrong with them.
    """
    if settings.objective.head != "classes":
        return
    if labels is None:
        raise ConfigError(
            "The batch has no labels: give the data a column 'label' or 'labels'. (A "
            "compute_loss_func takes them away before the model sees them: use "
            "AdversarialTrainer, which keeps them.)"
        )
    if labels.is_floating_point():
        sums = labels.float().sum(dim=-1)
        if labels.ndim != 2 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise ConfigError(
                "labels are floating-point and no probabilities (rows that sum to 1): several "
                "labels an image, and regression, are not supported. Give class indices."
            )
        return
    negative = labels[labels < 0]
    # Beside others it is the pseudo-label of class 98.
    if len(negative) and bool((negative == _IGNORED).all()):
        raise ConfigError(
            f"labels hold {_IGNORED}, as for ignored tokens of a text: write {UNLABELLED} for an "
            "image without a label."
        )
    if bool((labels == UNLABELLED).any()):
        _check_unlabelled(settings)


def _check_unlabelled(settings: Settings) -> None:
    words = f"labels hold {UNLABELLED}, images without a label, "
    name, attack = settings.objective.name, settings.dat.attack
    if not settings.objective.uses_unlabelled:
        raise ConfigError(
            f"{words}of which the objective {name!r} has no use: filter them out of the training "
            "data, or write objective='trades'."
        )
    if settings.dat.objective.grad_align:
        raise ConfigError(f"{words}but grad_align needs labels: filter them out, or remove it.")
    found = [who for trait, who in attack.facts("dat.attack") if trait is Trait.NEEDS_LABELS]
    if found:
        raise ConfigError(
            f"{words}but {' and '.join(found)} needs labels: write attack={{'name': 'pgd', "
            "'loss': 'kl', ...}, or filter them out of the training data."
        )
