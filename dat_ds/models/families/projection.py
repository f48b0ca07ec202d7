"""A projection head in the place of a network's classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dat_ds.errors import ModelError


def use_projection_head(network: nn.Module, classifier: Sequence[str], name: str) -> None:
    """Replace the linear classifier by a two-layer one of the same number of outputs, in place.

    Chen et al., ICML 2020, arXiv 2002.05709, sec. 2.1: ``W_2 relu(W_1 h)``, as wide as the
    features ``h`` in between.

    Args:
        network: The network.
        classifier: Names of the modules that make up its classifier.
        name: Name of the model, for the error text.

    Raises:
        ModelError: The classifier is something else than one linear layer.
    """
    linear = network.get_submodule(classifier[0]) if len(classifier) == 1 else None
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"dat.model.name='{name}' does not end in one linear layer, which a projection head "
            "could replace. Models such as 'resnet50', 'vit_base_patch16_224' and Hugging Face's "
            "ViT do."
        )
    width = linear.in_features
    hidden = nn.Linear(width, width, device=linear.weight.device, dtype=linear.weight.dtype)
    network.set_submodule(classifier[0], nn.Sequential(hidden, nn.ReLU(), linear))
