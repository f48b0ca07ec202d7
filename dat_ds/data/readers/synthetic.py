"""Images made up from random patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from dat_ds.data.images import TensorImages
from dat_ds.data.readers.source import Request, Source, measure_channels
from dat_ds.data.sampler import seeded_generator


def read_synthetic(request: Request) -> Source:
    """Make images that are half a fixed random pattern of their class and half noise."""
    shape = tuple(request.image_shape or (3, 32, 32))
    num_classes = request.num_classes or 10
    generator = seeded_generator("synthetic", request.seed)

    def draw(count: int) -> Tensor:
        return torch.randint(128, (count, *shape), generator=generator, dtype=torch.uint8)

    patterns = draw(num_classes)
    parts = []
    for count in (request.num_train or 512, request.num_test or 128):
        labels = torch.arange(count) % num_classes
        parts.append(TensorImages(draw(count) + patterns[labels], labels, request.img_size))
    train, test = parts
    return Source(train, test, measure_channels(train.images), num_classes=num_classes)
