"""The micro-batch as it is attacked and trained on, and how it comes from a caller's tensors.

Shapes: ``B`` images of the caller, ``n`` with the views that the objective makes of them; images
``(B, C, H, W)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dat_ds.attacks import Attack, ThreatModel
from dat_ds.contracts import (
    PIXEL_SLACK,
    Gate,
    as_pictures,
    check_images,
    classes_of,
    faulty_images,
)
from dat_ds.errors import DataError
from dat_ds.method import Trait
from dat_ds.minmax.moment import Moment
from dat_ds.minmax.watch import BatchWatch
from dat_ds.objectives import Objective
from dat_ds.ranks import Ranks


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


def refusal_of_unlabelled(objective: Objective, attack: Attack | None) -> str | None:
    """Why an image without a label is of no use to a run, and what to do; None where it is."""
    if not objective.uses_unlabelled:
        return (
            f"of which the objective {objective.name!r} has no use: filter them out of the "
            "training data, or choose the objective 'trades'."
        )
    facts = [] if attack is None else attack.facts("attack")
    needing = [words for trait, words in facts if trait is Trait.NEEDS_LABELS]
    if objective.grad_align:
        needing.append("grad_align")
    if needing:
        return (
            f"but {' and '.join(needing)} needs labels: use an attack such as {{'name': 'pgd', "
            "'loss': 'kl'}, or filter them out of the training data."
        )
    return None


class BatchReader:
    """Makes micro-batches of a caller's tensors, all of which it checks.

    Args:
        objective: Makes views and targets.
        ranks: The processes of the run.
        threat: Its pixel range.
        without_label: Why an image without a label is of no use; None where it is of use.
        unlabelled_weight: Weight of a sample whose label is not a true one.
        reference: Outputs of the model as it was at the start, where the objective asks for them.
        source: Where pixels come from, for messages.

    Attributes:
        gate: Fits labels to the model's outputs.
        watch: Tells what is wrong with a batch after the first.
    """

    def __init__(
        self,
        objective: Objective,
        ranks: Ranks,
        threat: ThreatModel,
        *,
        without_label: str | None = None,
        unlabelled_weight: float = 1.0,
        reference: Callable[[Tensor], Tensor] | None = None,
        source: str = "",
    ) -> None:
        self._objective = objective
        self._device = ranks.device
        self._threat = threat
        self._has_classes = objective.head == "classes"
        self._unlabelled_weight = unlabelled_weight
        self._reference = reference
        self._source = source
        self._slack = PIXEL_SLACK
        self.gate = Gate("partly labelled" if self._has_classes else "own", without_label)
        self.watch = BatchWatch(ranks, self._explain)

    def read(
        self,
        x: Tensor,
        y: Tensor,
        moment: Moment,
        *,
        weight: float = 1.0,
        samples: Sequence[int] | None = None,
        rounding: float = 0.0,
    ) -> MicroBatch:
        """Move a batch to the device, check it, and fill in for an empty one.

        Args:
            x: Images ``(B, C, H, W)``, pixel units, floating point; ``B`` may be 0.
            y: Class indices, what is known of them, or probabilities: see
                :mod:`dat_ds.contracts.labels`.
            moment: Place of the batch in the run; ``first_image`` without views.
            weight: Of the loss.
            samples: Dataset indices of the images.
            rounding: Share of the pixel range by which rounding may have moved pixels; they are
                clamped to the range.

        Raises:
            DataError: For what are not images, or no labels of them, at the latest when
                :attr:`watch` is asked.
        """
        num_images, num_views = len(x), self._objective.num_views
        x = as_pictures(x).to(self._device, torch.float32, non_blocking=True)
        y = self.check(x, y, moment, samples=samples, rounding=rounding)
        if rounding:
            x = x.clamp(self._threat.lower, self._threat.upper)
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

    def check(
        self,
        x: Tensor,
        y: Any,
        moment: Moment,
        *,
        samples: Sequence[int] | None = None,
        rounding: float = 0.0,
    ) -> Tensor:
        """Labels of images, on the device.

        Args:
            x: Images ``(B, C, H, W)``, on the device.
            y: As for :meth:`read`.
            moment: As for :meth:`read`.
            samples: As for :meth:`read`.
            rounding: As for :meth:`read`.

        Returns:
            Class indices or probabilities; the class 0 in the place of labels that name none, which
            :attr:`watch` tells.

        Raises:
            DataError: As :meth:`read`.
        """
        if y is None and not self._has_classes:
            y = torch.zeros(len(x), dtype=torch.int64)
        if isinstance(y, Tensor):
            y = y.to(self._device, non_blocking=True)
        self._slack = max(rounding, PIXEL_SLACK)
        faulty = faulty_images(x, self._threat.lower, self._threat.upper, self._slack)
        labels = self.gate.labels(y, len(x))
        given: Tensor = torch.as_tensor(y).to(self._device, non_blocking=True)
        if labels is None:
            self.watch.see(faulty, x, given, moment, samples)
            return given
        found = labels.y.to(self._device, non_blocking=True)
        outside = self.gate.outside(found)
        faulty |= outside if labels.faulty is None else labels.faulty.to(self._device) | outside
        self.watch.see(faulty, x, given, moment, samples)
        self.gate.expect(labels)
        if found.is_floating_point():
            return found
        return found.masked_fill(outside, 0)  # as an index it would end the process on a GPU

    def _explain(self, x: Tensor, y: Tensor) -> str | None:
        """Words for a faulty image ``(1, C, H, W)`` and its label."""
        try:
            check_images(x, self._threat.lower, self._threat.upper, self._slack)
        except DataError as error:
            return f"{error}{self._source}"
        try:
            labels = self.gate.labels(y, 1)
            if labels is not None:
                self.gate.check(labels, y)
        except DataError as error:
            return str(error)
        return None

    def _read_labels(self, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Classes, which of them are true ``(n,)``, and each sample's weight ``(n,)``.

        The latter two are None where they are 1 throughout.
        """
        if y.is_floating_point() or not self._has_classes:
            return y, None, None
        labelled = y >= 0
        weights = None
        if self._unlabelled_weight != 1:
            weights = torch.where(labelled, 1.0, self._unlabelled_weight)
        return classes_of(y), labelled, weights
