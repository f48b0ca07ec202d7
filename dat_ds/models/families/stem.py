"""A stem for images of 32 pixels and less in ResNet-like timm models."""

from __future__ import annotations

from torch import nn

from dat_ds.errors import ModelError


def use_cifar_stem(body: nn.Module, name: str) -> None:
    """Replace the stem by a 3x3 convolution of stride 1 without max-pooling, in place.

    The usual stem (7x7, stride 2, then max-pooling) shrinks the image fourfold before the first
    block, which leaves an 8x8 map of a 32-pixel image.

    Args:
        body: A timm model with a convolution ``conv1`` followed by ``maxpool``, such as
            ``resnet18``.
        name: Name of the model, for the error text.

    Raises:
        ModelError: ``body`` has no such stem.
    """
    conv = getattr(body, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(body, "maxpool"):
        raise ModelError(
            f"dat.model.stem='cifar' does not apply to dat.model.name='{name}', which has no "
            "single convolution 'conv1' followed by 'maxpool'. It works for 'resnet18', "
            "'resnet50', 'wide_resnet50_2' and their like; otherwise set dat.model.stem='default'."
        )
    body.conv1 = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=3,
        stride=1,
        padding=1,
        bias=False,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    # As timm's ResNet initialises every convolution.
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
    body.maxpool = nn.Identity()
