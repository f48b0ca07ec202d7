"""Base class of the robust objectives, and the functions that they share.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from dat_ds.attacks import Generator, InnerLoss
from dat_ds.kinds import Head
from dat_ds.method import Method, Trait, at_least, option

Gather = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""This rank's features and ``y`` to those of all other ranks, differentiable."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Outputs of the outer forward, in float32 (float64 where the model's are).

    Attributes:
        objective: Whose outputs they are, for messages.
        adversarial: Of the adversarial images ``(B, K)``.
        y: Class indices ``(B,)`` int64, -1 for an unlabelled sample; probabilities
            ``(B, K)``; or what :meth:`Objective.inputs` made.
        natural: Of the natural images ``(B, K)``, where the objective needs them.
        helper: Of the helper images ``(B, K)``.
        y_helper: Class indices of the helper images ``(B,)``.
        start: Of the images that the attack started from ``(B, K)``.
        weights: Weight of each sample in every term ``(B,)``; None for 1.
        gather: Brings in other ranks' features.
    """

    objective: str
    adversarial: Tensor
    y: Tensor
    natural: Tensor | None = None
    helper: Tensor | None = None
    y_helper: Tensor | None = None
    start: Tensor | None = None
    weights: Tensor | None = None
    gather: Gather | None = None

    def needed(self, kind: str) -> Tensor:
        """Outputs or labels of a kind.

        Raises:
            ValueError: If they are missing.
        """
        found = getattr(self, kind)
        if not isinstance(found, Tensor):
            raise ValueError(f"objective {self.objective!r} needs outputs: {kind} is missing.")
        return found

    def mean(self, values: Tensor) -> Tensor:
        """``sum_i w_i v_i / B`` of values ``(B,)``, with this batch's weights."""
        return average(values, self.weights)


@dataclass(frozen=True, kw_only=True)
class Objective(Method):
    """A robust objective: logits in, named scalar terms out.

    Every term is a weighted sum over this rank's samples divided by their number ``B``, in float32
    (float64 for float64 logits). A sample with ``y = -1`` has no label: supervised terms pass over
    it, and are divided by ``B`` all the same, so that micro-batches and ranks average to the global
    batch.

    Attributes:
        name: Its name in ``dat.objective``.
        default_attack_loss: Inner loss that its attack maximises unless told otherwise.
        needs_helper_logits: Whether the forward pass must hold helper images; see
            :class:`dat_ds.objectives.Hat`.
        uses_unlabelled: Whether a sample without a label adds to the loss.
        head: Outputs of the model: logits of ``"classes"`` or of the four ``"rotation"`` s, a
            ``"projection"`` of its features, or the ``"features"`` themselves.
        classifies: Whether these are logits of what ``y`` names, so that accuracy has a meaning.
        num_views: Images that :meth:`inputs` makes of each image.
        compares_samples: Whether a sample's loss depends on the others of the batch.
        needs_reference: Whether :meth:`inputs` asks the model as it was at the start.
        needs_attack: Whether it has no meaning in natural training.
        needs_start_logits: Whether the forward pass must hold the images that the attack started
            from.
    """

    kind: ClassVar[str] = "objective"
    default_attack_loss: ClassVar[str] = "ce"
    needs_helper_logits: ClassVar[bool] = False
    needs_start_logits: ClassVar[bool] = False
    uses_unlabelled: ClassVar[bool] = False
    head: ClassVar[Head] = "classes"
    classifies: ClassVar[bool] = True
    num_views: ClassVar[int] = 1
    compares_samples: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_attack: ClassVar[bool] = True

    unlabelled_weight: float = at_least(
        0,
        1.0,
        traits={
            Trait.CONCERNS_UNLABELLED: lambda v: v != 1,
            Trait.CONCERNS_LABELS: lambda v: v != 1,
        },
    )
    """Weight of every image whose label is missing or a pseudo-label, in all terms."""
    grad_align: float = at_least(
        0,
        0.0,
        traits=dict.fromkeys(
            (
                Trait.LOSS_OF_CLASSES,
                Trait.NEEDS_ADVERSARIAL,
                Trait.NEEDS_GRADIENT_LENGTHS,
                Trait.NEEDS_LABELS,
                Trait.TAKES_GRADIENTS_APART,
            ),
            lambda v: v > 0,
        ),
    )
    """Weight of GradAlign's regulariser against catastrophic overfitting; 0.2 in its paper for
    CIFAR-10 at eps 8/255. Costs 16 forwards' time a step, under every ZeRO stage."""
    batch_norm: Literal["joint", "split"] = option(
        "joint", traits={Trait.SPLITS_BATCH_NORM: lambda v: v == "split"}
    )
    """Natural and adversarial images go through the model in one forward: BatchNorm takes its
    statistics of all of them (``joint``) or of each kind apart (``split``)."""

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """Its traits, and those that follow from what it declares."""
        yield from super().facts(path)
        declared = {
            Trait.KNOWS_NO_CLASSES: not self.classifies,
            Trait.LEARNS_NO_CLASSES: self.head != "classes",
            Trait.COMPARES_SAMPLES: self.compares_samples,
            Trait.NEEDS_ADVERSARIAL: self.needs_attack,
            Trait.NEEDS_LABELS: not self.uses_unlabelled,
            Trait.NEEDS_START: self.needs_start_logits,
        }
        for trait, holds in declared.items():
            if holds:
                yield trait, self.chosen_at(path)

    def resolved(self, has_attack: bool) -> Self:
        """With the defaults written out that depend on whether the run has an attack."""
        return self

    @property
    def inner_loss(self) -> InnerLoss | None:
        """Inner loss that attacks have to maximise; None leaves it to ``dat.attack.loss``."""
        return None

    def inputs(
        self,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
        reference: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images and targets to attack and train on in the place of a batch; by default the batch.

        Args:
            x: Images ``(B, C, H, W)``, pixel units, float32; not modified.
            y: Their labels ``(B,)``, or probabilities ``(B, K)``.
            generator: Source of random numbers, one stream for each image.
            reference: The model as it was at the start, where :attr:`needs_reference`.

        Returns:
            Images ``(num_views * B, C, H, W)``, the views of an image one after the other, and the
            ``y`` that the inner and the outer loss compare the model's outputs with.
        """
        return x, y

    @property
    def needs_natural_logits(self) -> bool:
        """Whether the forward pass must hold natural images beside the adversarial ones."""
        return True

    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        logits_start: Tensor | None = None,
        weights: Tensor | None = None,
        gather: Gather | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms, from the model's outputs in any floating dtype.

        Arguments are the fields of :class:`Outputs`.

        Returns:
            ``loss`` (with gradient) and detached terms such as ``robust_loss``.

        Raises:
            ValueError: If outputs that are needed are missing.
        """
        outputs = Outputs(
            objective=self.name,
            adversarial=accurate(logits_adv),
            y=y,
            natural=None if logits is None else accurate(logits),
            helper=None if logits_helper is None else accurate(logits_helper),
            y_helper=y_helper,
            start=None if logits_start is None else accurate(logits_start),
            weights=weights,
            gather=gather,
        )
        return self.terms(outputs)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """``loss`` with gradient, and detached terms; what a subclass defines."""
        raise TypeError(f"{type(self).__name__} defines no terms.")


def accurate(logits: Tensor) -> Tensor:
    """``logits`` in float32, or in float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def average(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_i w_i v_i / B`` of values ``(B,)``, with weights ``(B,)`` or 1."""
    return values.mean() if weights is None else (values * weights).mean()


def smoothed_cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample ``(B,)``; 0 for unlabelled ones.

    Args:
        logits: Shape ``(B, K)``, float32 or float64.
        y: Class indices ``(B,)``, or probabilities ``(B, K)``.
        label_smoothing: Probability mass spread over all classes.
    """
    target = y.to(logits.dtype) if y.is_floating_point() else y
    return F.cross_entropy(
        logits, target, label_smoothing=label_smoothing, ignore_index=-1, reduction="none"
    )


def prediction_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """``KL(softmax(logits_p) || softmax(logits_q))`` of each sample ``(B,)``.

    Both arguments carry gradients. Finite for saturated logits: it is computed from logarithms.
    """
    log_p, log_q = logits_p.log_softmax(dim=1), logits_q.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
