"""Whether a model takes the images of a dataset, and the size of those that it would take."""

from __future__ import annotations

import warnings

import timm
import torch
from torch import Tensor

from dat_ds.errors import ModelError
from dat_ds.models.families import huggingface
from dat_ds.models.families.timm import published_side
from dat_ds.models.normalize import PixelModel

# Tried in this order where a model refuses the images of the data.
_SIDES = (8, 16, 32, 64, 96, 128, 160, 192, 224)


def check_takes_images(model: PixelModel, image_shape: tuple[int, int, int]) -> None:
    """Refuse images that the model's layers cannot work on, before a run starts.

    One black image goes through the model in eval mode, which leaves its buffers and every random
    state as they are.

    Args:
        model: A model as ``build_model`` gives it, in training mode, on the CPU.
        image_shape: ``(C, H, W)``.

    Raises:
        ModelError: The model fails on such an image; the message has a size that it takes.
    """
    channels, height, width = image_shape
    error = _failure(model, image_shape)
    if error is None:
        return
    sides = (s for s in _SIDES if _failure(model, (channels, s, s)) is None)
    side = next(sides, None) or _own_side(model)
    is_other = side is not None and (side, side) != (height, width)
    remedy = f"write dat.data.img_size={side}" if is_other else "resize them by dat.data.img_size"
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    raise ModelError(
        f"dat.model.name='{model.spec['name']}' does not take images of {height} x {width} pixels "
        f"({reason}): {remedy}, or choose another model."
    )


def _own_side(model: PixelModel) -> int | None:
    """Side of the images that the architecture was published for, where it says so."""
    name: str = model.spec["name"]
    if huggingface.is_hugging_face(name):
        return huggingface.own_side(huggingface.location_of(name))
    return published_side(timm.get_pretrained_cfg(name))


def _failure(model: PixelModel, image_shape: tuple[int, int, int]) -> Exception | None:
    """What a forward of one black image raises."""
    x: Tensor = torch.zeros(1, *image_shape)
    model.eval()
    try:
        # Reentrant checkpointing warns of inputs without a gradient.
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(x)
    except Exception as error:  # libraries raise whatever their layers do
        return error
    finally:
        model.train()
    return None
