"""Images at lower resolution during an attack."""

import torch.nn.functional as F

from dat_ds.attacks.gradient import Model


def at_resolution(model: Model, resolution: int) -> Model:
    """``model`` of images area-interpolated to ``resolution`` by ``resolution`` pixels."""
    size = (resolution, resolution)
    return lambda images: model(F.interpolate(images, size, mode="area"))
