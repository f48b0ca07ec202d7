"""A Trainer for what a callback cannot reach."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from dat_ds.attacks import Attack, ThreatModel
from dat_ds.errors import ConfigError
from dat_ds.integrations.hf.callback import AdversarialTrainingCallback
from dat_ds.integrations.hf.settings import Section, Settings
from dat_ds.objectives import Objective

_POSITIONS = ("model", "args", "data_collator", "train_dataset", "eval_dataset")


class AdversarialTrainer(Trainer):  # type: ignore[misc]  # untyped base
    """``transformers.Trainer`` with :class:`AdversarialTrainingCallback` and what it refuses.

    - ``label_smoothing_factor`` becomes the objective's ``label_smoothing``.
    - ``compute_loss_func`` takes the place of cross-entropy on adversarial images, with the
      objective ``"at"`` without a natural term.
    - An error in ``train()``, wherever it comes from, leaves nothing on the model.

    Defaults are those of :class:`AdversarialTrainingCallback`.

    Args:
        args: Those of the Trainer, by position.
        threat_model: Allowed perturbations: the keys of ``dat.threat_model``, or an object.
        attack: The inner maximisation: the keys of ``dat.attack``, its name alone, an object, or a
            function ``(model, x, y, generator) -> x_adv``.
        objective: The outer loss: the keys of ``dat.objective``, its name alone, or an object.
        mean: Per channel, the mean that the data were normalised by, in pixel units.
        std: Per channel, the standard deviation that they were normalised by, in pixel units.
        seed: Of the attack's random numbers.
        evaluation: Keys ``attacks``, ``num_examples`` and ``batch_size`` of ``dat.evaluation``.
        weight_perturbation: AWP or SAM: the keys of ``dat.weight_perturbation``, or its name alone.
        resident_parameters_gib: Memory in GiB for ZeRO-3's parameters during the attack.
        kwargs: Those of the Trainer, by name.

    Raises:
        ConfigError: With all problems of the settings.
    """

    def __init__(
        self,
        *args: Any,
        threat_model: Mapping[str, Any] | ThreatModel | None = None,
        attack: Section | Attack | Callable[..., Any] | None = None,
        objective: Section | Objective | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int | None = None,
        evaluation: Mapping[str, Any] | None = None,
        weight_perturbation: Section | None = None,
        resident_parameters_gib: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.adversarial = AdversarialTrainingCallback(
            threat_model=threat_model,
            attack=attack,
            objective=objective,
            mean=mean,
            std=std,
            seed=seed,
            evaluation=evaluation,
            weight_perturbation=weight_perturbation,
            resident_parameters_gib=resident_parameters_gib,
        )
        if len(args) > len(_POSITIONS):
            raise TypeError(f"AdversarialTrainer takes {', '.join(_POSITIONS)} by position.")
        kwargs |= dict(zip(_POSITIONS, args, strict=False))
        kwargs["args"] = self._without_smoothing(kwargs.get("args"))
        kwargs["callbacks"] = [self.adversarial, *(kwargs.get("callbacks") or [])]
        super().__init__(**kwargs)
        if self.compute_loss_func is not None:
            _check_plain(self.adversarial.settings)
            self.adversarial.user_computes_loss = True

    def _without_smoothing(self, args: Any) -> Any:
        """The arguments with label smoothing handed to the objective."""
        if args is None or not args.label_smoothing_factor:
            return args
        request = self.adversarial.request
        self.adversarial.request = dataclasses.replace(
            request, label_smoothing=args.label_smoothing_factor
        )
        args = copy.copy(args)
        args.label_smoothing_factor = 0.0
        return args

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``transformers.Trainer.train``."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.adversarial.detach()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's; a ``compute_loss_func`` takes labels away that the attack needs."""
        if self.compute_loss_func is not None:
            self.adversarial.labels = inputs.get("labels")
        try:
            loss: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, *args, **kwargs)
            return loss
        finally:
            self.adversarial.labels = None


def _check_plain(settings: Settings) -> None:
    objective = settings.objective
    if objective.name != "at" or objective.needs_natural_logits:
        raise ConfigError(
            f"compute_loss_func with objective={objective.name!r}, which has a loss of its own for "
            "natural and adversarial outputs together: write objective='at' without "
            "natural_weight, or remove compute_loss_func."
        )
    if settings.weight_perturbation is not None:
        raise ConfigError(
            "compute_loss_func with weight_perturbation, which moves the weights up the "
            "objective's loss and not up yours: remove one of them."
        )
