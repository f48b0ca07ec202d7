"""What every robust objective is, and what they share.

Shapes: ``B`` batch, ``K`` classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_ds.attacks import Generator, InnerLoss

Head = Literal["classes", "rotation", "projection", "features"]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
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
        needs_start_logits: Whether the forward pass must hold the images that the attack started
            from.
        uses_unlabelled: Whether a sample without a label adds to the loss.
        head: What the model puts out: logits of ``"classes"`` or of the four ``"rotation"`` s, a
            ``"projection"`` of its features, or the ``"features"`` themselves.
        classifies: Whether these are logits of what ``y`` names, so that accuracy has a meaning.
        num_views: Images that :meth:`inputs` makes of each image.
        compares_samples: Whether a sample's loss depends on the others of the batch.
        needs_reference: Whether :meth:`inputs` asks the model as it was at the start.
    """

    name: ClassVar[str]
    default_attack_loss: ClassVar[str] = "ce"
    needs_helper_logits: ClassVar[bool] = False
    needs_start_logits: ClassVar[bool] = False
    uses_unlabelled: ClassVar[bool] = False
    head: ClassVar[Head] = "classes"
    classifies: ClassVar[bool] = True
    num_views: ClassVar[int] = 1
    compares_samples: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    @property
    def inner_loss(self) -> InnerLoss | None:
        """What an attack has to maximise; None leaves the choice to ``dat.attack.loss``."""
        return None

    def inputs(
        self,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
        reference: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is attacked and trained on in the place of a batch; by default the batch itself.

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

    @abstractmethod
    def __call__(
        self,
        logits_adv: Tensor,
        y: Tensor,
        logits: Tensor | None = None,
        *,
        logits_helper: Tensor | None = None,
        y_helper: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            logits_adv: Logits of the adversarial images ``(B, K)``, any floating dtype.
            y: Class indices ``(B,)`` int64, -1 for an unlabelled sample, or probabilities
                ``(B, K)``.
            logits: Logits of the natural images ``(B, K)``; needed where
                :attr:`needs_natural_logits`.
            logits_helper: Logits of the helper images ``(B, K)``; needed where
                :attr:`needs_helper_logits`.
            y_helper: Class indices of the helper images ``(B,)``; likewise.
            weights: Weight of each sample in every term ``(B,)``; None for 1.

        Returns:
            ``loss`` (with gradient) and detached terms such as ``robust_loss``.

        Raises:
            ValueError: If logits that are needed are missing.
        """

    def _needed(self, logits: Tensor | None, what: str = "x") -> Tensor:
        if logits is None:
            raise ValueError(f"objective {self.name!r} needs logits of {what}.")
        return accurate(logits)


def accurate(logits: Tensor) -> Tensor:
    """``logits`` in float32, or in float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def average(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_i w_i v_i / B`` of values ``(B,)``, with weights ``(B,)`` or 1."""
    return values.mean() if weights is None else (values * weights).mean()


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
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


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """``KL(softmax(logits_p) || softmax(logits_q))`` of each sample ``(B,)``.

    Both arguments carry gradients. Finite for saturated logits: it is computed from logarithms.
    """
    log_p, log_q = logits_p.log_softmax(dim=1), logits_q.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
