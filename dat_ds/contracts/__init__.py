"""What images, labels and outputs have to be, at every door alike."""

from dat_ds.contracts.gate import (
    Gate,
    GatedModel,
    Reads,
    named_forward_errors,
)
from dat_ds.contracts.images import (
    PIXEL_SLACK,
    as_images,
    as_pictures,
    check_images,
    faulty_images,
)
from dat_ds.contracts.labels import (
    MOST_CLASSES,
    UNLABELLED,
    Labels,
    as_labels,
    classes_of,
    pseudo_label,
)
from dat_ds.contracts.outputs import check_finite, logits_of, tensor_of

__all__ = [
    "MOST_CLASSES",
    "PIXEL_SLACK",
    "UNLABELLED",
    "Gate",
    "GatedModel",
    "Labels",
    "Reads",
    "as_images",
    "as_labels",
    "as_pictures",
    "check_finite",
    "check_images",
    "classes_of",
    "faulty_images",
    "logits_of",
    "named_forward_errors",
    "pseudo_label",
    "tensor_of",
]
