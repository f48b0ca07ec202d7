"""CIFAR-10 and CIFAR-100 in torchvision's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from dat_ds.data.images import Channels, TensorImages
from dat_ds.data.method import FileDataset
from dat_ds.data.readers.source import Source
from dat_ds.errors import DataError

_LARGEST_FILE = 2**30
# Per channel over the 50 000 training images, pixel units.
_CIFAR_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass(frozen=True, kw_only=True)
class Cifar(FileDataset):
    """CIFAR in torchvision's files, under ``path``."""

    def read(self, seed: int) -> Source:
        """Both parts of CIFAR-10 or CIFAR-100."""
        import torchvision

        kind: Any = getattr(torchvision.datasets, self.name.upper())
        parts = []
        folder = Path(str(self.path)) / kind.base_folder
        try:
            # torchvision reads whole files for their checksums: a sparse terabyte takes hours.
            for name, _ in kind.train_list + kind.test_list:
                if (size := (folder / name).stat().st_size) > _LARGEST_FILE:
                    raise OSError(f"{name} has {size} bytes")
            for is_train in (True, False):
                data = kind(str(self.path), train=is_train, download=False)
                images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
                parts.append(TensorImages(images, torch.tensor(data.targets), self.img_size))
        except (RuntimeError, OSError) as error:
            listed = [name for name, _ in kind.train_list + kind.test_list]
            files = ", ".join([*listed, kind.meta["filename"]])
            raise DataError(
                f"dat.data.path={str(self.path)!r} does not hold an intact {self.name} "
                f"({error}). Expected in its folder {kind.base_folder!r}: {files}. Get them once "
                f"with torchvision.datasets.{kind.__name__}({str(self.path)!r}, download=True)."
            ) from error
        names = tuple(data.classes)
        train, test = parts
        return Source(train, test, _CIFAR_STATISTICS[self.name], names, num_classes=len(names))


@dataclass(frozen=True, kw_only=True)
class Cifar10(Cifar):
    """CIFAR-10 in torchvision's files: 32 x 32 pixels, 10 classes."""

    name: ClassVar[str] = "cifar10"


@dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar):
    """CIFAR-100 in torchvision's files: 32 x 32 pixels, 100 classes."""

    name: ClassVar[str] = "cifar100"
