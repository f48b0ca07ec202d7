"""CIFAR-10 and CIFAR-100 in torchvision's files."""

from __future__ import annotations

from typing import Any

import torch
import torchvision

from dat_ds.data.images import Channels, TensorImages
from dat_ds.data.readers.source import Request, Source
from dat_ds.errors import DataError

# Per channel over the 50 000 training images, pixel units.
_CIFAR_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def read_cifar(request: Request) -> Source:
    """Both parts of CIFAR-10 or CIFAR-100."""
    kind: Any = getattr(torchvision.datasets, request.name.upper())
    parts = []
    try:
        for is_train in (True, False):
            data = kind(str(request.path), train=is_train, download=False)
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            parts.append(TensorImages(images, torch.tensor(data.targets), request.img_size))
    except (RuntimeError, OSError) as error:
        listed = [name for name, _ in kind.train_list + kind.test_list]
        files = ", ".join([*listed, kind.meta["filename"]])
        raise DataError(
            f"dat.data.path={str(request.path)!r} does not hold an intact {request.name} "
            f"({error}). Expected in its folder {kind.base_folder!r}: {files}. Get them once with "
            f"torchvision.datasets.{kind.__name__}({str(request.path)!r}, download=True)."
        ) from error
    names = tuple(data.classes)
    train, test = parts
    return Source(train, test, _CIFAR_STATISTICS[request.name], names, num_classes=len(names))
