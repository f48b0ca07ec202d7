"""Robust objectives: logits in, named scalar terms out.

Shapes: ``B`` batch, ``K`` classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

ObjectiveName = Literal["at", "dat"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)

DEFAULT_NATURAL_WEIGHT: dict[str, float] = {"at": 0.0, "dat": 1.0}
"""``at``: Madry et al., ICLR 2018, eq. 2.1; ``dat``: Zhang et al., UAI 2022, eq. 1, lambda 1."""


@dataclass(frozen=True)
class Objective:
    """Adversarial training: ``natural_weight * CE(f(x), y) + CE(f(x_adv), y)``.

    A sum, not a weighted mean, as in Zhang et al., UAI 2022, eq. 1, arXiv 2206.06257; with
    ``natural_weight`` 0 it is Madry et al., ICLR 2018, arXiv 1706.06083.

    Args:
        name: ``"at"`` or ``"dat"``; they differ in the default weight alone.
        natural_weight: Weight of the natural term, at least 0.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
    """

    name: ObjectiveName
    natural_weight: float
    label_smoothing: float = 0.0

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the forward pass must hold natural images beside the adversarial ones."""
        return self.natural_weight > 0

    def __call__(
        self, logits_adv: Tensor, y: Tensor, logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss and its terms, each the mean over this rank's batch, in float32.

        Args:
            logits_adv: Logits of the adversarial images ``(B, K)``, any floating dtype.
            y: Labels ``(B,)`` int64, or probabilities ``(B, K)``.
            logits: Logits of the natural images ``(B, K)``; needed where
                :attr:`needs_natural_logits`.

        Returns:
            ``loss`` (with gradient), ``robust_loss``, and ``natural_loss`` where it is part of it.
        """
        robust = self._cross_entropy(logits_adv, y)
        if not self.needs_natural_logits:
            return {"loss": robust, "robust_loss": robust.detach()}
        if logits is None:
            raise ValueError(f"objective {self.name!r} with natural_weight > 0 needs logits of x.")
        natural = self._cross_entropy(logits, y)
        return {
            "loss": self.natural_weight * natural + robust,
            "robust_loss": robust.detach(),
            "natural_loss": natural.detach(),
        }

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        target = y.float() if y.is_floating_point() else y
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)


def build_objective(config: Mapping[str, Any]) -> Objective:
    """Build an objective from the keys of ``dat.objective``.

    Raises:
        ValueError: For an unknown name or option, or a value out of range.
    """
    options = dict(config)
    name = options.pop("name", "at")
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r} is not one of {', '.join(OBJECTIVES)}.")
    weight = options.pop("natural_weight", None)
    smoothing = options.pop("label_smoothing", 0.0)
    if options:
        raise ValueError(
            f"objective {name!r} has no option {', '.join(sorted(options))}: "
            "natural_weight, label_smoothing."
        )
    weight = DEFAULT_NATURAL_WEIGHT[name] if weight is None else float(weight)
    if not 0 <= weight < float("inf"):
        raise ValueError(
            f"objective.natural_weight={weight} must be a finite number of at least 0."
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"objective.label_smoothing={smoothing} must lie in [0, 1).")
    return Objective(name, weight, float(smoothing))
