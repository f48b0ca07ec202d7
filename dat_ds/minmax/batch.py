"""The micro-batch as it is attacked and trained on, and how it comes from a caller's tensors.

Shapes: ``B`` images of the caller, ``n`` with the views that the objective makes of them; images
``(B, C, H, W)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.errors import DataError
from dat_ds.minmax.moment import Moment
from dat_ds.objectives import Objective

_SLACK = 1e-6  # of the pixel range


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch on the device; ``n`` images, views included.

    Attributes:
        x: Images ``(n, C, H, W)``, pixel units, float32.
        y: Targets of the inner and the outer loss.
        moment: Its place in the run; ``first_image`` counts views.
        num_images: How many images count; 0 where one fills in for none.
        labelled: Which labels are true ``(n,)``; None for all.
        weights: Weight of each sample ``(n,)``; None for 1.
        weight: Of the loss.
        samples: Dataset index of each of the caller's images ``(B,)``; None where it is not known.
    """

    x: Tensor
    y: Tensor
    moment: Moment
    num_images: int
    labelled: Tensor | None = None
    weights: Tensor | None = None
    weight: float = 1.0
    samples: Sequence[int] | None = None


def joined(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of one optimizer step as one, to be attacked: images in their order."""
    first = parts[0].moment
    indices = [part.moment.first_image + i for part in parts for i in range(len(part.x))]
    samples = [part.samples for part in parts if part.samples is not None]
    return MicroBatch(
        x=torch.cat([part.x for part in parts]),
        y=torch.cat([part.y for part in parts]),
        moment=dataclasses.replace(first, indices=indices),
        num_images=sum(part.num_images for part in parts),
        samples=[i for of_part in samples for i in of_part] if len(samples) == len(parts) else None,
    )


class BatchReader:
    """Makes micro-batches of a caller's tensors.

    Args:
        objective: Makes views and targets.
        device: Where the model runs.
        threat: Its pixel range is checked, once.
        classes_of: Classes of labels, -1 where there is none, from labels that are below 0 where
            they are not true ones; None where all labels are true.
        unlabelled_weight: Weight of a sample whose label is not a true one.
        reference: Outputs of the model as it was at the start, where the objective asks for them.
    """

    def __init__(
        self,
        objective: Objective,
        device: torch.device,
        threat: ThreatModel,
        *,
        classes_of: Callable[[Tensor], Tensor] | None = None,
        unlabelled_weight: float = 1.0,
        reference: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._objective = objective
        self._device = device
        self._threat = threat
        self._classes_of = classes_of
        self._unlabelled_weight = unlabelled_weight
        self._reference = reference
        self._checked_pixels = False

    def read(
        self,
        x: Tensor,
        y: Tensor,
        moment: Moment,
        *,
        weight: float = 1.0,
        samples: Sequence[int] | None = None,
    ) -> MicroBatch:
        """Move a batch to the device, check its pixels once, and fill in for an empty one.

        Args:
            x: Images ``(B, C, H, W)``, pixel units, floating point; ``B`` may be 0.
            y: Class indices ``(B,)``, what is known of them, or probabilities ``(B, K)``.
            moment: Place of the batch in the run; ``first_image`` without views.
            weight: Of the loss.
            samples: Dataset indices of the images.

        Raises:
            DataError: For images that are not floating-point pixels of the threat model's range.
        """
        num_images, num_views = len(x), self._objective.num_views
        if not x.is_floating_point():
            raise DataError(
                f"Images are {x.dtype}: give floating-point pixels in [0, 1], as x.float() / 255."
            )
        x = x.to(self._device, torch.float32, non_blocking=True)
        y = y.to(self._device, non_blocking=True)
        if not self._checked_pixels and num_images:
            self._check_pixels(x)
        if num_images == 0:
            x, y = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1, *y.shape[1:])
        x, y = self._objective.inputs(
            x, y, generator=moment.generator("views"), reference=self._reference
        )
        if num_images == 0 and self._objective.compares_samples:
            y = torch.full_like(y, -1)
        y, labelled, weights = self._read_labels(y)
        return MicroBatch(
            x=x,
            y=y,
            moment=dataclasses.replace(moment, first_image=moment.first_image * num_views),
            num_images=num_images * num_views,
            labelled=labelled,
            weights=weights,
            weight=weight,
            samples=samples,
        )

    def _read_labels(self, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Classes, which of them are true ``(n,)``, and each sample's weight ``(n,)``.

        The latter two are None where they are 1 throughout.
        """
        if y.is_floating_point() or self._classes_of is None:
            return y, None, None
        labelled = y >= 0
        weights = None
        if self._unlabelled_weight != 1:
            weights = torch.where(labelled, 1.0, self._unlabelled_weight)
        return self._classes_of(y), labelled, weights

    def _check_pixels(self, x: Tensor) -> None:
        lower, upper = self._threat.lower, self._threat.upper
        low, high = float(x.min()), float(x.max())
        if not (low >= lower - _SLACK and high <= upper + _SLACK):
            raise DataError(
                f"Images span [{low:g}, {high:g}], outside the pixel range [{lower:g}, "
                f"{upper:g}]. Give raw pixels; normalisation belongs inside the model "
                "(dat.model.mean, dat.model.std)."
            )
        self._checked_pixels = True
