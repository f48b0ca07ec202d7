"""Views of images for self-supervised learning: turned, cropped, mirrored, recoloured.

Everything is done for the whole batch at once on its device; what is drawn is a function of the
generator alone.

Shapes: ``B`` batch; images ``(B, C, H, W)``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_ds.attacks import Generator, rand_like

_ASPECT_RATIO = 4 / 3  # widest crop; its inverse is the narrowest
_JITTER_SHARE, _GRAY_SHARE = 0.8, 0.2
_JITTER_WIDTH = 0.8  # of brightness, contrast and saturation, at strength 1
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def rotations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every image turned by 0, 90, 180 and 270 degrees, and which of them it is.

    Args:
        x: Square images.

    Returns:
        Images ``(4 B, C, H, W)``, the four of an image one after the other, and the number of
        quarter turns ``(4 B,)`` int64.

    Raises:
        ValueError: For images that are not square.
    """
    height, width = x.shape[2:]
    if height != width:
        raise ValueError(
            f"objective 'rotation' turns images by 90 degrees, but these are {height} x {width}: "
            "make them square."
        )
    turned = torch.stack([torch.rot90(x, turns, dims=(2, 3)) for turns in range(4)], dim=1)
    return turned.flatten(0, 1), torch.arange(4, device=x.device).repeat(len(x))


def random_view(
    x: Tensor, generator: Generator, *, crop_area: float, color_jitter: float, flip: float
) -> Tensor:
    """One random view of every image, as SimCLR makes them but for hue and blur.

    Chen et al., ICML 2020, arXiv 2002.05709, appendix A: a crop of random area and aspect ratio
    brought back to full size, mirrored or not; brightness, contrast and saturation multiplied by
    random factors in four of five images; no colour in one of five.

    Args:
        x: Images, pixels in [0, 1], float32; not modified.
        generator: Source of random numbers, ten for each image.
        crop_area: Smallest area of a crop as a share of the image, in (0, 1].
        color_jitter: Strength, in [0, 1]; factors lie within ``1 +- 0.8 * color_jitter``.
        flip: Probability of mirroring left and right.

    Returns:
        Images of the same shape, pixels in [0, 1].
    """
    area, ratio, left, top, mirror, *colors = rand_like(x.new_empty(len(x), 10), generator).unbind(
        dim=1
    )
    area = crop_area + (1 - crop_area) * area
    # Only as long as it fits into the image: a crop of the whole area is the image.
    longest = (-area.log()).clamp(0, math.log(_ASPECT_RATIO))
    stretch = torch.exp(0.5 * longest * (2 * ratio - 1))
    width, height = area.sqrt() * stretch, area.sqrt() / stretch
    sign = torch.where(mirror < flip, -1.0, 1.0)
    zero = torch.zeros_like(area)
    # Coordinates of the crop within the image, which reaches from -1 to 1.
    rows = [sign * width, zero, (2 * left - 1) * (1 - width)]
    rows += [zero, height, (2 * top - 1) * (1 - height)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), False)
    crops = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _recolored(crops, colors, color_jitter)


def _recolored(x: Tensor, draws: list[Tensor], strength: float) -> Tensor:
    jitters, loses_color = draws[0] < _JITTER_SHARE, draws[1] < _GRAY_SHARE
    width = _JITTER_WIDTH * strength
    brightness, contrast, saturation = (
        torch.where(jitters, 1 + width * (2 * u - 1), 1.0).view(-1, 1, 1, 1) for u in draws[2:]
    )
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(_gray(x).mean(dim=(1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
    if strength > 0:
        saturation = torch.where(loses_color.view(-1, 1, 1, 1), 0.0, saturation)
    return torch.lerp(_gray(x), x, saturation).clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    """Brightness of each pixel ``(B, 1, H, W)``."""
    if x.shape[1] != len(_LUMA):
        return x.mean(dim=1, keepdim=True)
    red, green, blue = (weight * x[:, i : i + 1] for i, weight in enumerate(_LUMA))
    return red + green + blue
