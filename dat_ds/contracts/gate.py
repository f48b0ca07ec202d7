"""The gate of a door: what comes in is checked, and what a model puts out is read.

Shapes: ``B`` images, ``K`` classes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from dat_ds.contracts.images import layout_hint
from dat_ds.contracts.labels import (
    Labels,
    as_labels,
    check_width,
    describe_faulty_labels,
    describe_out_of_range,
    out_of_range,
)
from dat_ds.contracts.outputs import check_finite, logits_of, tensor_of
from dat_ds.errors import DataError, ModelError, UserError

_OF_SHAPES = re.compile(r"\b(shapes?|sizes?|channels?|dimensions?|match|same d?type|be the same)\b")
Reads = Literal["classes", "partly labelled", "own"]
"""What ``y`` and the outputs are: true labels and logits of classes; the same with pseudo-labels;
or what a loss of the user's own, or one of features, compares."""


class Gate:
    """Labels of a door and the outputs of its model, which have to fit.

    Args:
        reads: What they are.
        without_label: Why an image without a label is of no use; None where it is of use.

    Attributes:
        num_classes: Outputs of the model; None before the first.
    """

    def __init__(
        self, reads: Reads, without_label: str | None = "of which there is no use: filter it out."
    ) -> None:
        self._reads = reads
        self._without_label = without_label
        self._awaiting: Labels | None = None
        self.num_classes: int | None = None

    @property
    def reads_classes(self) -> bool:
        """Whether labels are classes, and not the affair of a loss."""
        return self._reads != "own"

    def labels(self, y: Any, num_images: int) -> Labels | None:
        """Labels of ``num_images`` images, without waiting; None where they are the loss's affair.

        Raises:
            DataError: For what can be told without their values.
        """
        if self._reads == "own":
            return None
        labels = as_labels(y, num_images)
        if self.num_classes is not None:
            check_width(labels, self.num_classes)
        return labels

    def outside(self, y: Tensor) -> Tensor:
        """Labels that name no class ``(B,)``, as far as it is known how many there are."""
        return out_of_range(
            y,
            self.num_classes,
            may_be_pseudo=self._reads == "partly labelled",
            may_miss=self._without_label is None,
        )

    def check(self, labels: Labels, given: Any) -> Tensor:
        """The ``y`` of labels whose values are right; waits for the device.

        Args:
            labels: Of :meth:`labels`.
            given: Its argument.

        Raises:
            DataError: With the first that is wrong.
        """
        if labels.faulty is not None and bool(labels.faulty.any()):
            raise DataError(describe_faulty_labels(labels, given))
        problem = self.problem_of(labels.y)
        if problem is not None:
            raise DataError(problem)
        return labels.y

    def settled(self, y: Any, num_images: int) -> Any:
        """``y`` as losses take it, with values that are right; waits for the device.

        Raises:
            DataError: With the first that is wrong; for classes that the model does not have, at
                its first outputs.
        """
        labels = self.labels(y, num_images)
        if labels is None:
            return y
        self.expect(labels)
        return self.check(labels, y)

    def true_classes(self, y: Any, num_images: int) -> Tensor:
        """The one class that is right for each image ``(B,)`` int64; waits for the device.

        Raises:
            DataError: For what are not labels, or probabilities of several classes.
        """
        labels = as_labels(y, num_images)
        if self.num_classes is not None:
            check_width(labels, self.num_classes)
        classes = self.check(labels, y)
        if not classes.is_floating_point():
            return classes
        if not bool(((classes == 0) | (classes == 1)).all()):
            raise DataError(
                "Accuracy needs class indices, and labels are probabilities: give such as "
                "y.argmax()."
            )
        return classes.argmax(dim=1)

    def expect(self, labels: Labels) -> None:
        """Compare labels with the model's first outputs, where there were none yet."""
        if self.num_classes is None:
            self._awaiting = labels

    def outputs(self, outputs: Any, num_images: int) -> Tensor:
        """The tensor that losses read: logits ``(B, K)``, or of any shape for a loss of one's own.

        Raises:
            ModelError: If it cannot be told.
            DataError: If labels of the first batch do not fit them.
        """
        if self._reads == "own":
            return tensor_of(outputs, num_images)
        logits = logits_of(outputs, num_images)
        if self.num_classes is None:
            self.num_classes = logits.shape[1]
        if self._awaiting is not None:
            labels, self._awaiting = self._awaiting, None
            check_width(labels, self.num_classes)
            problem = self.problem_of(labels.y)
            if problem is not None:
                raise DataError(problem)
        return logits

    def problem_of(self, y: Tensor) -> str | None:
        """In words, which label names no class of the model; waits for the device."""
        outside = self.outside(y)
        if not bool(outside.any()):
            return None
        return describe_out_of_range(y, outside, self.num_classes, self._without_label or "")


class GatedModel:
    """A model whose outputs are read, and that says what images it cannot take.

    Args:
        model: Images to whatever it puts out.
        gate: Reads that.
        refuses_damage: Whether the first outputs have to be finite.
    """

    def __init__(
        self, model: Callable[[Tensor], Any], gate: Gate, *, refuses_damage: bool = True
    ) -> None:
        self._model = model
        self._gate = gate
        self._refuses_damage = refuses_damage

    def __call__(self, x: Tensor) -> Tensor:
        """Its output tensor for ``x``.

        Raises:
            ModelError: Where the call fails, with the shape that it was given, or the first gives
                outputs that are not finite.
        """
        with named_forward_errors(x):
            outputs = self._model(x)
        found = self._gate.outputs(outputs, len(x))
        if self._refuses_damage:
            self._refuses_damage = False
            check_finite(found)
        return found


@contextlib.contextmanager
def named_forward_errors(x: Tensor) -> Iterator[None]:
    """Inside, an error about shapes or dtypes becomes one that names those of the images.

    Args:
        x: The images.

    Raises:
        ModelError: From torch's, timm's or transformers' own error.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    # timm asserts image sizes, transformers raises ValueError, torch RuntimeError.
    except (RuntimeError, ValueError, AssertionError) as error:
        if _OF_SHAPES.search(str(error)) is None:
            raise
        raise ModelError(
            f"The model's forward failed on images of shape {tuple(x.shape)}, {x.dtype}"
            f"{layout_hint(x)}: {error}"
        ) from error
