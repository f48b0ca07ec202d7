"""Augmentation of colours and shapes: transforms of timm and torchvision, and IDBH.

The transforms of these libraries draw from the global generators of Python, numpy and torch;
:func:`seeded_globals` makes what they draw a function of one seed.

Shapes: ``C`` channels, ``H`` height, ``W`` width of an image.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dat_ds.errors import DataError

if TYPE_CHECKING:
    from dat_ds.data.method import DatasetMethod

ImageTransform = Callable[[Image.Image], Image.Image]
PixelTransform = Callable[[Tensor], Tensor]

IDBH_ERASING = {"idbh_weak": 0.5, "idbh_strong": 1.0}
"""Probability of erasing in the two policies for CIFAR-10, which differ in nothing else."""
COLOUR_BIASED: dict[str, tuple[float, float] | None] = {
    "color": (0.1, 1.9),
    "brightness": (0.5, 1.9),
    "contrast": (0.5, 1.9),
    "sharpness": (0.1, 1.9),
    "autocontrast": None,
    "equalize": None,
    "shear": (0.05, 0.15),
    "rotate": (1, 10),
}
"""IDBH's transforms for CIFAR-10, equally likely, with the range of their strength: factors,
radians and whole degrees."""
_LEVELS = 255


@contextlib.contextmanager
def seeded_globals(seed: int, *, only_torch: bool = False) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators inside, and leave them as they were.

    Of torch the CPU's alone: ``torch.manual_seed`` would seed every accelerator too.

    Args:
        seed: In ``[0, 2**63)``.
        only_torch: Leave out the others, whose states take a hundred times as long to copy.
    """
    generator = torch.default_generator
    cpu = generator.get_state()
    others = None if only_torch else (random.getstate(), np.random.get_state())
    generator.manual_seed(seed)
    if others is not None:
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        generator.set_state(cpu)
        if others is not None:
            random.setstate(others[0])
            np.random.set_state(others[1])


@dataclass(frozen=True)
class Policy:
    """Transforms that draw from global generators, one after the other.

    Args:
        on_images: Of 8-bit images; float pixels that are not multiples of 1/255 are rounded.
        on_pixels: Of float32 pixels ``(C, H, W)`` in [0, 1], after them.
        only_torch: Whether all of them draw from torch's generator alone.
    """

    on_images: tuple[ImageTransform, ...] = ()
    on_pixels: tuple[PixelTransform, ...] = ()
    only_torch: bool = False

    def __call__(self, x: Tensor, seed: int) -> Tensor:
        """The image after all transforms, float32 ``(C, H, W)`` in [0, 1].

        Args:
            x: The same; its channels are 1 or 3 where there are ``on_images``.
            seed: Decides everything that is drawn; in ``[0, 2**63)``.
        """
        with seeded_globals(seed, only_torch=self.only_torch):
            if self.on_images:
                image = to_image(x)
                for transform in self.on_images:
                    image = transform(image)
                x = to_pixels(image)
            for change in self.on_pixels:
                x = change(x)
        return x


def to_image(x: Tensor) -> Image.Image:
    """8-bit image of pixels ``(C, H, W)`` in [0, 1], with 1 or 3 channels; exact for k / 255."""
    levels = x.mul(_LEVELS).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def to_pixels(image: Image.Image) -> Tensor:
    """Float32 pixels ``(C, H, W)`` in [0, 1] of an 8-bit image."""
    levels = torch.from_numpy(np.array(image))
    levels = levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)
    return levels.to(torch.float32).contiguous() / _LEVELS


def policy_of(
    dataset: DatasetMethod,
    image_shape: tuple[int, int, int],
    statistics: tuple[Sequence[float], Sequence[float]],
) -> Policy | None:
    """The policy that keys of ``dat.data`` beside ``augment`` ask for; None for none.

    Args:
        dataset: The section.
        image_shape: ``(C, H, W)`` of the images that the model sees.
        statistics: Mean and standard deviation of each channel, in pixel units.

    Raises:
        DataError: For images of other than 1 or 3 channels, where a transform needs those.
    """
    from torchvision import transforms

    channels, height, width = image_shape
    _check_channels(dataset, channels)
    mean, std = statistics
    on_images: list[ImageTransform] = []
    on_pixels: list[PixelTransform] = []
    if dataset.rand_augment is not None:
        grey = tuple(min(_LEVELS, round(_LEVELS * m)) for m in mean)
        # What timm's create_transform gives it: longest shift, and colour of what moves in.
        fitted = {
            "translate_const": int(0.45 * min(height, width)),
            "img_mean": grey[0] if channels == 1 else grey,
        }
        on_images.append(_rand_augment(dataset.rand_augment, fitted))
    if dataset.trivial_augment:
        on_images.append(transforms.TrivialAugmentWide())
    if dataset.color_jitter > 0:
        on_images.append(transforms.ColorJitter(*[dataset.color_jitter] * 3))
    if dataset.random_erasing > 0:
        on_pixels.append(NoiseErasing(dataset.random_erasing, mean, std))
    if not on_images and not on_pixels:
        return None
    only_torch = dataset.rand_augment is None and dataset.random_erasing == 0
    return Policy(tuple(on_images), tuple(on_pixels), only_torch)


def _rand_augment(text: str, fitted: dict[str, Any]) -> ImageTransform:
    """Timm's RandAugment, with a posterize that keeps no bits at its strongest."""
    from timm.data import auto_augment

    transform: Any = auto_augment.rand_augment_transform(text, fitted)
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    found: ImageTransform = transform
    return found


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The highest bits of every pixel; none is black, as in Pillow before it refused that."""
    if bits == 0:
        return image.point(lambda _: 0)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _check_channels(dataset: DatasetMethod, channels: int) -> None:
    keys = [
        key for key in ("rand_augment", "trivial_augment", "color_jitter") if getattr(dataset, key)
    ]
    keys += ["augment"] if dataset.augment in IDBH_ERASING else []
    if keys and channels not in (1, 3):
        given = ", ".join(f"dat.data.{key}={getattr(dataset, key)!r}" for key in keys)
        raise DataError(
            f"{given}: works on images of 1 or 3 channels, and these have {channels}. Remove it, "
            "and write dat.data.augment='crop' or 'crop_flip'."
        )


class NoiseErasing:
    """timm's random erasing in mode ``pixel`` (Zhong et al., AAAI 2020, arXiv 1708.04896).

    A box of 2 to 33 percent of the area becomes noise that is standard normal in the units of a
    normalised image: ``mean + std * noise`` in pixel units, cut to [0, 1].

    Args:
        probability: Of erasing.
        mean: Of each channel, pixel units.
        std: Of each channel, pixel units.
    """

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        from timm.data.random_erasing import RandomErasing

        self._erase: Any = RandomErasing(probability, mode="pixel", device="cpu")
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """The image ``(C, H, W)`` in [0, 1] with a box erased, or as it is."""
        # What is drawn does not depend on pixels, so marks in their place show the box.
        drawn: Tensor = self._erase(torch.full_like(x, float("nan")))
        noise = (drawn * self._std + self._mean).clamp(0, 1)
        return torch.where(drawn.isnan(), x, noise)


def idbh(augment: str) -> Policy:
    """The part of IDBH that follows its flip and Cropshift: ColorShape, and random erasing.

    Li and Spratling, ICLR 2023, arXiv 2301.09879, with the policies for CIFAR-10 as their authors
    released them.

    Args:
        augment: One of ``IDBH_ERASING``.
    """
    from torchvision import transforms

    erase = transforms.RandomErasing(IDBH_ERASING[augment])
    return Policy((color_or_shape,), (erase,), only_torch=True)


def color_or_shape(image: Image.Image) -> Image.Image:
    """One of :data:`COLOUR_BIASED`, each with the same probability, at a random strength."""
    names = list(COLOUR_BIASED)
    name = names[_below(len(names))]
    limits = COLOUR_BIASED[name]
    if limits is None:
        return changed(image, name)
    low, high = limits
    strength = low + _below(int(high - low) + 1) if name == "rotate" else _between(low, high)
    if name in ("shear", "rotate") and _below(2):
        strength = -strength
    return changed(image, name, strength, across=name == "shear" and _below(2) == 1)


def changed(
    image: Image.Image, name: str, strength: float = 0.0, *, across: bool = False
) -> Image.Image:
    """One transform of :data:`COLOUR_BIASED` at a strength.

    Args:
        image: 8-bit image of 1 or 3 channels.
        name: Which.
        strength: Factor, radians of a shear, degrees of a rotation.
        across: Of a shear: along the width and not the height.
    """
    import torchvision.transforms.functional as vision

    if name == "shear":
        degrees = math.degrees(strength)
        shear = [degrees, 0.0] if across else [0.0, degrees]
        sheared: Image.Image = vision.affine(image, 0.0, [0, 0], 1.0, shear)
        return sheared
    with_strength = {
        "color": vision.adjust_saturation,
        "brightness": vision.adjust_brightness,
        "contrast": vision.adjust_contrast,
        "sharpness": vision.adjust_sharpness,
        "rotate": vision.rotate,
    }
    found: Image.Image
    if name in with_strength:
        found = with_strength[name](image, strength)
    else:
        found = {"autocontrast": vision.autocontrast, "equalize": vision.equalize}[name](image)
    return found


def _below(stop: int) -> int:
    return int(torch.randint(stop, ()))


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
