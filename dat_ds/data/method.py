"""Base of the dataset sections of a run config: reading, splits, mixing and loading of images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dat_ds.contracts import MOST_CLASSES
from dat_ds.data.transforms import CROP_SHARE, Augmentation
from dat_ds.method import (
    Method,
    Trait,
    UnknownKey,
    above,
    at_least,
    fraction,
    option,
    parse_method,
    positive_share,
    share,
    shown,
)

if TYPE_CHECKING:
    from dat_ds.data.readers.source import Part, Source

_MIXES = {Trait.MIXES_LABELS: lambda v: v > 0, Trait.CONCERNS_LABELS: lambda v: v > 0}
_PATH = "what it is read from"
_USUAL_SIDE = 224
_RAND_AUGMENT = {
    "m": r"10|\d",
    "n": r"[1-9]",
    "p": r"0\.\d+|1",
    "mstd": r"\d+(?:\.\d+)?",
    "inc": r"[01]",
    "t": r"weights|3a|3aw",
}
_RAND_AUGMENT_PART = re.compile(
    "|".join(f"(?P<{key}>{key}(?:{value}))" for key, value in _RAND_AUGMENT.items())
)


def is_rand_augment(text: str) -> bool:
    """Whether timm follows every part of a string for its RandAugment; it passes over others.

    Args:
        text: ``rand`` and parts such as ``-m9``, each at most once: ``m`` magnitude up to 10, ``n``
            number of operations, ``p`` probability of each, ``mstd`` spread of the magnitude,
            ``inc1`` for operations that grow with it, ``t`` set of operations.
    """
    name, *parts = text.split("-")
    found = [_RAND_AUGMENT_PART.fullmatch(part) for part in parts]
    keys = {match.lastgroup for match in found if match is not None}
    return name == "rand" and len(keys) == len(parts)


def named_data(text: str) -> dict[str, str]:
    """Keys of ``dat.data`` that ``"NAME"`` or ``"NAME:PATH"`` stands for, on command lines."""
    name, colon, path = text.partition(":")
    return {"name": name, **({"path": path} if colon else {})}


def name_of_data(data: DatasetMethod) -> str:
    """``"NAME"`` or ``"NAME:PATH"``, of which :func:`named_data` makes the keys."""
    path = getattr(data, "path", None)
    return data.name if path is None else f"{data.name}:{path}"


@dataclass(frozen=True, kw_only=True)
class DatasetMethod(Method):
    """A dataset and how it is loaded; images reach the model as pixels in [0, 1].

    A subclass reads its files in :meth:`read`.
    """

    kind: ClassVar[str] = "dataset"

    augment: Augmentation = "none"
    """Augmentation of the training images: what is cut out of them, and mirroring; ``idbh_weak``
    and ``idbh_strong`` are whole policies."""
    rand_augment: str | None = None
    """timm's RandAugment by its string there, such as ``rand-m9-mstd0.5-inc1``, after ``augment``.
    On 8-bit pixels: others are rounded to them."""
    trivial_augment: bool = False
    """torchvision's TrivialAugment (wide), after ``augment``; on 8-bit pixels likewise."""
    color_jitter: float = share(0.0)
    """Largest relative change of brightness, contrast and saturation; on 8-bit pixels likewise."""
    random_erasing: float = share(0.0)
    """Probability that a box of the image becomes noise, last of all."""
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
    unlabelled_batch_fraction: float | None = option(
        None,
        "a number in (0, 1)",
        lambda v: 0 < v < 1,
        traits={Trait.CONCERNS_UNLABELLED: lambda v: True},
    )
    """Share of unlabelled images in every global batch; an epoch is then one pass over the labelled
    ones. Default: all are shuffled together."""
    pseudo_labels: str | None = option(
        None,
        traits=dict.fromkeys((Trait.CONCERNS_LABELS, Trait.CONCERNS_UNLABELLED), lambda v: True),
    )
    """What labels the unlabelled images: a folder that ``dat-ds label`` wrote, or the run folder or
    checkpoint of a model, which labels them before training."""
    least_confidence: float = share(0.0)
    """Images whose pseudo-label has a smaller probability are left out of training."""
    extra: dict[str, Any] | None = option(None)
    """Further labelled training images, such as generated ones: ``name`` and the dataset's own
    keys, of which the training part is read. Nothing of it is held out for validation."""
    extra_fraction: float | None = option(None, "a number in (0, 1)", lambda v: 0 < v < 1)
    """Share of ``extra`` in every global batch; an epoch is one pass over the other images."""
    damaged: Literal["stop", "skip"] = "stop"
    """What a damaged training image does: end the run, or be replaced by the next readable one."""
    most_damaged: float = at_least(0, 0.01)
    """With ``skip``: how many training images may be damaged; below 1 as a share of them."""
    validation_fraction: float = fraction(0.1)
    """Share of the training images held out for choosing the best checkpoint."""
    img_size: int | None = above(0, None)
    """Side in pixels of the square images that the model sees. Default: their own."""
    progressive_from: int | None = above(0, None, traits={Trait.CHANGES_SIZES: lambda v: True})
    """Side of the training images in the first epochs, smaller than the full one, to which it rises
    over ``progressive_epochs``. Evaluation is at the full side. The model must take every side on
    the way (a ViT: ``dat.model.options.dynamic_img_size``)."""
    progressive_epochs: float | None = above(0, None)
    """Epochs until training images have the full side."""
    progressive_step: int = above(0, 32)
    """Pixels by which the side rises at a time; of a ViT a multiple of its patch."""
    num_classes: int | None = option(
        None, f"a number from 2 to {MOST_CLASSES}", lambda v: 2 <= v <= MOST_CLASSES
    )
    """Number of classes. Default: as many as occur in the data."""
    num_workers: int = at_least(0, 0)
    """Processes that read images beside the training loop."""
    pin_memory: bool | None = None
    """Copy batches from page-locked memory. Default: true where there is an accelerator."""

    @property
    def has_unlabelled(self) -> bool:
        """Whether some training images have no true label."""
        hides = self.labelled_fraction < 1 and not self.drop_unlabelled
        return hides or self.unlabelled_path is not None

    def side_in(self, epoch: int, full: int) -> int:
        """Side of the training images in an epoch, counted from 0.

        Args:
            epoch: Number of the epoch.
            full: Side of the images that are evaluated.
        """
        start, epochs = self.progressive_from, self.progressive_epochs
        if start is None or epochs is None or epoch >= epochs:
            return full
        risen = int((full - start) * epoch / epochs)
        return start + risen // self.progressive_step * self.progressive_step

    @property
    def mixes(self) -> bool:
        """Whether labels are probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def problems(self) -> Iterator[str]:
        """Keys that exclude or need one another; nothing to drop; shares that do not add up."""
        if self.rand_augment is not None and not is_rand_augment(self.rand_augment):
            yield (
                f"rand_augment={self.rand_augment!r} is not valid: write timm's string, such as "
                "'rand-m9-mstd0.5-inc1'."
            )
        policies = [
            key
            for key in ("rand_augment", "trivial_augment", "color_jitter", "random_erasing")
            if getattr(self, key)
        ]
        if self.augment.startswith("idbh") and policies:
            yield (
                f"augment={self.augment!r} is a whole policy: remove "
                f"{', '.join(f'dat.data.{key}' for key in policies)}, or write "
                "dat.data.augment='cropshift_flip'."
            )
        if self.rand_augment and self.trivial_augment:
            yield (
                f"rand_augment={self.rand_augment!r} and dat.data.trivial_augment=true are two "
                "policies: remove one of them."
            )
        if self.mixes and self.has_unlabelled:
            key = "mixup" if self.mixup else "cutmix"
            yield (
                f"{key}={getattr(self, key):g} makes labels probabilities, but unlabelled images "
                f"have none to mix: remove dat.data.{key}."
            )
        if (self.progressive_from is None) != (self.progressive_epochs is None):
            yield (
                f"progressive_from={self.progressive_from} and dat.data.progressive_epochs="
                f"{self.progressive_epochs} go together: give both or neither."
            )
        if self.drop_unlabelled and self.labelled_fraction == 1:
            yield (
                "drop_unlabelled=true has nothing to drop: write dat.data.labelled_fraction, such "
                "as 0.1, or remove it."
            )
        if self.least_confidence and self.pseudo_labels is None:
            yield (
                f"least_confidence={self.least_confidence:g} is that of pseudo-labels: write "
                "dat.data.pseudo_labels, or remove it."
            )
        if self.unlabelled_batch_fraction is not None and self.labelled_repeats > 1:
            yield (
                f"labelled_repeats={self.labelled_repeats} beside unlabelled_batch_fraction="
                f"{self.unlabelled_batch_fraction:g}, which fixes the share of labelled images "
                "already: remove one of them."
            )
        if (self.extra is None) != (self.extra_fraction is None):
            missing = "extra_fraction" if self.extra_fraction is None else "extra"
            yield (
                f"{missing} is missing: dat.data.extra names further images, and "
                "dat.data.extra_fraction their share of every batch, such as 0.7."
            )
        shares = (self.extra_fraction or 0) + (self.unlabelled_batch_fraction or 0)
        if shares >= 1:
            yield (
                f"extra_fraction={self.extra_fraction:g} and unlabelled_batch_fraction="
                f"{self.unlabelled_batch_fraction:g} leave no other image in a batch: their sum is "
                "below 1."
            )
        problems: list[str] = []
        self.extra_dataset(problems)
        yield from problems

    def extra_dataset(self, problems: list[str] | None = None) -> DatasetMethod | None:
        """The dataset of ``extra``; None without one.

        Args:
            problems: Receives one message per problem found.
        """
        from dat_ds.data.readers import DATASETS

        if self.extra is None:
            return None
        common = DatasetMethod.known_keys()
        found: list[str] = []
        own = {key: value for key, value in self.extra.items() if key not in common}
        # The images of both are cut to one size, augmented alike, and loaded together.
        found += [
            f"extra.{key}={shown(value)} is a key of dat.data itself, for all images: remove it."
            for key, value in self.extra.items()
            if key in common
        ]
        dataset = parse_method(DATASETS, own, "extra", found)
        found += [
            f"extra.{key} is missing: {dataset.name!r} needs {what}."
            for key, what in dataset.required.items()
            if getattr(dataset, key) is None
        ]
        if problems is not None:
            problems += [
                problem.within("extra") if isinstance(problem, UnknownKey) else problem
                for problem in found
            ]
        return dataset

    def read(self, seed: int) -> Source:
        """Both parts of the dataset; what a subclass defines.

        Raises:
            DataError: For files that are missing or damaged.
        """
        raise TypeError(f"{type(self).__name__} defines no read.")

    def read_test(self, seed: int) -> Part:
        """The test part alone; a subclass may do without the training part.

        Raises:
            DataError: For files that are missing or damaged.
        """
        from dat_ds.data.readers.source import Part

        source = self.read(seed)
        return Part(source.test, source.class_names, source.num_classes)

    def read_train(self, seed: int) -> Part:
        """The training part alone, as ``dat.data.extra``; a subclass may do without the test part.

        Raises:
            DataError: For files that are missing or damaged.
        """
        from dat_ds.data.readers.source import Part

        source = self.read(seed)
        return Part(source.train, source.class_names, source.num_classes)


@dataclass(frozen=True, kw_only=True)
class FileDataset(DatasetMethod):
    """A dataset that is read from disk."""

    required: ClassVar[Mapping[str, str]] = {"path": _PATH}

    path: str | None = None
    """File or folder of the data."""


@dataclass(frozen=True, kw_only=True)
class StoredDataset(FileDataset):
    """A dataset of encoded images of any size, which are decoded when they are used."""

    crop_share: float = positive_share(CROP_SHARE)
    """Fraction of the shorter edge that the center crop of evaluation keeps; 1 for images that are
    cropped to ``img_size`` already."""

    @property
    def keeps_ratio(self) -> bool:
        """Whether images are resized by the shorter edge and cropped, not squashed."""
        return True

    @property
    def side(self) -> int:
        """Side of the images that the model sees."""
        return self.img_size or _USUAL_SIDE
