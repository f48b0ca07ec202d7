"""Base of the dataset sections of a run config: reading, splits, mixing and loading of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dat_ds.contracts import MOST_CLASSES
from dat_ds.method import Method, Trait, above, at_least, fraction, option, positive_share

if TYPE_CHECKING:
    from dat_ds.data.readers.source import EvaluationImages, Source

_MIXES = {Trait.MIXES_LABELS: lambda v: v > 0, Trait.CONCERNS_LABELS: lambda v: v > 0}
_PATH = "what it is read from"


@dataclass(frozen=True, kw_only=True)
class DatasetMethod(Method):
    """A dataset and how it is loaded; images reach the model as pixels in [0, 1].

    A subclass reads its files in :meth:`read`.
    """

    kind: ClassVar[str] = "dataset"

    augment: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = "none"
    """Augmentation of the training images."""
    mixup: float = at_least(0, 0.0, traits=_MIXES)
    """Alpha of mixup: labels become probabilities. 0 for none."""
    cutmix: float = at_least(0, 0.0, traits=_MIXES)
    """Alpha of CutMix; with ``mixup`` too, each image gets one of them."""
    labelled_fraction: float = positive_share(1.0)
    """Fraction of the training images that keep their labels; the others count as unlabelled."""
    drop_unlabelled: bool = False
    """Leave the images without a label out of training."""
    unlabelled_path: str | None = None
    """Further unlabelled training images: a folder of image files, or an npz file with
    ``images``."""
    labelled_repeats: int = at_least(1, 1, traits={Trait.CONCERNS_UNLABELLED: lambda v: v != 1})
    """How often each labelled image occurs in an epoch beside the unlabelled ones."""
    pseudo_labels: str | None = option(
        None,
        traits=dict.fromkeys((Trait.CONCERNS_LABELS, Trait.CONCERNS_UNLABELLED), lambda v: True),
    )
    """Run folder or checkpoint of a model that labels the unlabelled images before training."""
    validation_fraction: float = fraction(0.1)
    """Share of the training images held out for choosing the best checkpoint."""
    img_size: int | None = above(0, None)
    """Side of the images that the model sees. Default: their own."""
    num_classes: int | None = option(
        None, f"a number from 2 to {MOST_CLASSES}", lambda v: 2 <= v <= MOST_CLASSES
    )
    """Default: as many as the data have."""
    num_workers: int = at_least(0, 0)
    """Processes that read images beside the training loop."""
    pin_memory: bool | None = None
    """Default: on where there is an accelerator."""

    @property
    def has_unlabelled(self) -> bool:
        """Whether some training images have no true label."""
        hides = self.labelled_fraction < 1 and not self.drop_unlabelled
        return hides or self.unlabelled_path is not None

    @property
    def mixes(self) -> bool:
        """Whether labels are probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def problems(self) -> Iterator[str]:
        """Mixed labels of images that have none; nothing to drop."""
        if self.mixes and self.has_unlabelled:
            key = "mixup" if self.mixup else "cutmix"
            yield (
                f"{key}={getattr(self, key):g} makes labels probabilities, but unlabelled images "
                f"have none to mix: remove dat.data.{key}."
            )
        if self.drop_unlabelled and self.labelled_fraction == 1:
            yield (
                "drop_unlabelled=true has nothing to drop: write dat.data.labelled_fraction, such "
                "as 0.1, or remove it."
            )

    def read(self, seed: int) -> Source:
        """Both parts of the dataset; what a subclass defines.

        Raises:
            DataError: For files that are missing or damaged.
        """
        raise TypeError(f"{type(self).__name__} defines no read.")

    def read_test(self, seed: int) -> EvaluationImages:
        """The test part alone; a subclass may do without the training part.

        Raises:
            DataError: For files that are missing or damaged.
        """
        from dat_ds.data.readers.source import EvaluationImages

        source = self.read(seed)
        return EvaluationImages(source.test, source.class_names, source.num_classes)


@dataclass(frozen=True, kw_only=True)
class FileDataset(DatasetMethod):
    """A dataset that is read from disk."""

    required: ClassVar[Mapping[str, str]] = {"path": _PATH}

    path: str | None = None
    """Where the data lie."""
