"""Small networks of published results, by name: import this module and write dat.model.name=...

    dat-ds train --import networks ...      with this folder on PYTHONPATH

They are entries of timm's registry, so that configs, checkpoints and exports name them like any
other network; inputs are what the model's normalisation makes of pixels.
"""

import argparse
from collections.abc import Callable
from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn
from torch.nn import functional

CONFIG = {"classifier": "head", "first_conv": "conv1", "input_size": (3, 32, 32)}


class MnistCnn(nn.Module):
    """Two strided convolutions and two layers (Wong et al., ICLR 2020, arXiv 2001.03994)."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 7 * 7, 100)
        self.head = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, 28, 28) to logits (B, K)."""
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        logits: Tensor = self.head(functional.relu(self.hidden(x.flatten(1))))
        return logits


class LeNet5(nn.Module):
    """advertorch's LeNet5, which is smaller than Madry's (Ding et al. 2019, arXiv 1902.07623)."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, 200)
        self.head = nn.Linear(200, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, 28, 28) to logits (B, K)."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        logits: Tensor = self.head(functional.relu(self.hidden(x.flatten(1))))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a shortcut, without BatchNorm."""

    def __init__(self, wide_in: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        changes = stride != 1 or wide_in != wide
        self.shortcut = nn.Conv2d(wide_in, wide, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(functional.relu(self.conv1(x)))
        return functional.relu(y + self.shortcut(x))


class ResNet2B(nn.Module):
    """Two residual blocks without BatchNorm, 0.1 million parameters.

    Of the verification literature (Wang et al., NeurIPS 2021, arXiv 2103.06624).
    """

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(_Block(8, 16, 2), _Block(16, 16, 1))
        self.hidden = nn.Linear(16 * 8 * 8, 100)
        self.head = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, 32, 32) to logits (B, K)."""
        x = self.blocks(functional.relu(self.conv1(x)))
        logits: Tensor = self.head(functional.relu(self.hidden(x.flatten(1))))
        return logits


class ResNet6(nn.Module):
    """Six layers with BatchNorm, 0.07 million parameters: two of timm's residual blocks.

    A small relative of the CIFAR networks of He et al. (CVPR 2016, arXiv 1512.03385).
    """

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(_timm_block(16, 32), _timm_block(32, 64))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, 32, 32) to logits (B, K)."""
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def _timm_block(wide_in: int, wide: int) -> BasicBlock:
    """A block that halves height and width."""
    return BasicBlock(wide_in, wide, 2, downsample_conv(wide_in, wide, kernel_size=1, stride=2))


def _build(
    kind: Callable[[int, int], nn.Module],
    num_classes: int = 10,
    in_chans: int = 3,
    **of_timm: None,
) -> nn.Module:
    given = [key for key, value in of_timm.items() if value is not None]
    if given:
        raise TypeError(f"{kind.__name__} got an unexpected keyword argument {given[0]!r}")
    network: Any = kind(num_classes, in_chans)
    network.pretrained_cfg = CONFIG
    network.num_classes = num_classes
    return network


@register_model
def mnist_cnn(pretrained: bool = False, **options: Any) -> nn.Module:
    """:class:`MnistCnn`."""
    return _build(MnistCnn, **options)


@register_model
def lenet5(pretrained: bool = False, **options: Any) -> nn.Module:
    """:class:`LeNet5`."""
    return _build(LeNet5, **options)


@register_model
def resnet2b(pretrained: bool = False, **options: Any) -> nn.Module:
    """:class:`ResNet2B`."""
    return _build(ResNet2B, **options)


@register_model
def resnet6(pretrained: bool = False, **options: Any) -> nn.Module:
    """:class:`ResNet6`."""
    return _build(ResNet6, **options)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
