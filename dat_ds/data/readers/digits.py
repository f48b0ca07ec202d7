"""scikit-learn's digits: 8 x 8 pixels, embedded in that library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dat_ds.data.images import TensorImages
from dat_ds.data.method import DatasetMethod
from dat_ds.data.readers.source import Source, measure_channels
from dat_ds.data.sampler import hold_out

_DIGITS_TEST_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Digits(DatasetMethod):
    """scikit-learn's handwritten digits, 8 x 8 pixels, embedded in that library.

    A fixed stratified fifth is the test part.
    """

    name: ClassVar[str] = "digits"

    def read(self, seed: int) -> Source:
        """Both parts of the digits."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(bunch.target)
        # Seed 0 whatever the run's seed: scores of different seeds are on the same test images.
        train, test = hold_out(labels, _DIGITS_TEST_FRACTION, seed=0)
        data, test_data = (TensorImages(images[i], labels[i], self.img_size) for i in (train, test))
        names = tuple(str(digit) for digit in range(10))
        return Source(data, test_data, measure_channels(data.images), names, num_classes=10)
