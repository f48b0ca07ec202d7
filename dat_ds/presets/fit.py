"""Whether the images are those that a preset was written for."""

from __future__ import annotations

from dat_ds.config import RunConfig
from dat_ds.errors import ConfigError


def check_fits(run: RunConfig) -> None:
    """Refuse images of other channels, size or classes than the run's model is written for.

    A preset writes all three out, as ``dat.model.mean``, ``img_size`` and ``num_classes``. A run
    that leaves one out takes what the images have. The test part of the data is read for it.

    Raises:
        ConfigError: With all that differ, and the keys to write.
        DataError: For data that cannot be read.
    """
    model, part = run.dat.model, run.dat.data.read_test(run.dat.seed)
    channels, height, width = part.images.image_shape
    problems = []
    if model.mean is not None and len(model.mean) != channels:
        problems.append(
            f"dat.model.mean={model.mean} is for images of {len(model.mean)} channels, those of "
            f"{run.dat.data.name} have {channels}: write as many values into dat.model.mean and "
            "dat.model.std, such as --set dat.model.mean=null --set dat.model.std=null for those "
            "of the data."
        )
    if model.img_size is not None and {height, width} != {model.img_size}:
        problems.append(
            f"dat.model.img_size={model.img_size}, but the images of {run.dat.data.name} have "
            f"{height} x {width} pixels: write --set dat.data.img_size={model.img_size}, which "
            "resizes them, or --set dat.model.img_size=null."
        )
    labels = part.images.labels
    found = part.num_classes or (int(labels.max()) + 1 if len(labels) else 0)
    classes = run.dat.data.num_classes or found
    if model.num_classes is not None and model.num_classes != classes:
        problems.append(
            f"dat.model.num_classes={model.num_classes}, but {run.dat.data.name} has {classes} "
            f"classes: write --set dat.model.num_classes={classes}, or null."
        )
    if problems:
        raise ConfigError("\n".join(problems))
