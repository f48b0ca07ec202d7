"""Robust metrics on what ``Trainer.evaluate`` was given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dat_ds.casting import casting_at_layers
from dat_ds.contracts import Gate
from dat_ds.errors import ConfigError, DataError
from dat_ds.evaluation import Record, evaluate, task_of
from dat_ds.integrations.hf.forward import PixelView
from dat_ds.integrations.hf.pixels import PixelScale
from dat_ds.integrations.hf.settings import Settings
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")


class _PixelDataset(Dataset[tuple[Tensor, Tensor]]):
    """The samples of a Trainer's evaluation as pixels and class."""

    def __init__(self, loader: DataLoader[Any], pixels: PixelScale, settings: Settings) -> None:
        self._samples: Any = loader.dataset
        self._collate: Any = loader.collate_fn
        self._pixels = pixels
        self._threat = settings.threat
        batch = self._collate([self._samples[0]])
        if settings.objective.head == "classes" and "labels" not in batch:
            raise ConfigError(
                "Robust accuracy needs labels, and eval_dataset has none: give it a column "
                "'label' or 'labels', or pass evaluation={'attacks': []}."
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self._collate([self._samples[index]])
        values = batch["pixel_values"]
        try:
            self._pixels.check(values, self._threat)
        except ConfigError as error:
            raise DataError(f"eval_dataset[{index}]: {error}") from None
        label = batch["labels"][0] if "labels" in batch else torch.zeros((), dtype=torch.int64)
        pixels = self._pixels.to_pixels(values)[0]
        return pixels.clamp_(self._threat.lower, self._threat.upper), label

    def differs_when_read_again(self) -> bool:
        """Whether one of the first samples has other values the second time, as a random crop has.

        The first eight are read: a flip of every second image goes unseen once in 256.
        """
        for index in range(min(_PROBED, len(self))):
            first, second = (
                self._collate([self._samples[index]])["pixel_values"] for _ in range(2)
            )
            if first.shape != second.shape or not torch.equal(first, second):
                return True
        return False


_PROBED = 8
_RANDOM_TRANSFORM = (
    "eval_dataset gives other pixels each time a sample is read: its transform is random. Robust "
    "evaluation reads the images a second time, so its natural accuracy is that of other images "
    "than compute_metrics saw, and no two evaluations measure the same. Give eval_dataset a "
    "transform without randomness, such as resize and center crop in "
    "eval_dataset.set_transform(...)."
)


class ClassLabels:
    """Hands evaluation's labels over as class indices, which the model's own loss takes too.

    Args:
        collate: The data loader's own collator.
        num_classes: Of the model.
    """

    is_wrapped = True

    def __init__(self, collate: Callable[[Any], Any], num_classes: int) -> None:
        self.collate = collate
        self._gate = Gate("classes")
        self._gate.num_classes = num_classes

    def __call__(self, samples: Any) -> Any:
        """A batch with ``labels`` as int64 ``(B,)``, where it has some.

        Raises:
            DataError: For labels that are not classes.
        """
        batch = self.collate(samples)
        labels = batch.get("labels")
        if labels is not None:
            batch["labels"] = self._gate.true_classes(labels, len(labels))
        return batch


def robust_metrics(
    module: nn.Module,
    loader: DataLoader[Any],
    settings: Settings,
    pixels: PixelScale,
    *,
    ranks: Ranks,
    reference: Any,
    batch_size: int,
    num_workers: int,
    is_first: bool = False,
) -> dict[str, float]:
    """Attack the model on a Trainer's evaluation data; a collective.

    Args:
        module: The bare model; left as it was.
        loader: The Trainer's; its samples are read one by one, each once over all ranks.
        settings: Threat model and attacks.
        pixels: Scale of the data.
        ranks: The processes of the run.
        reference: Outputs of the model as it was at the start; None where no objective asks.
        batch_size: Images per forward and rank, where the settings leave it open.
        num_workers: Worker processes that read the images.
        is_first: Whether to look for a random transform, and warn of it.

    Returns:
        ``natural_accuracy``; ``robust_accuracy`` of images that withstand every attack, and of each
        attack by name where there are several; where the model does not classify, ``natural_loss``
        and ``robust_loss``, the largest.

    Raises:
        ConfigError: For data without a length, or without labels.
    """
    config = settings.dat.evaluation
    if not hasattr(loader.dataset, "__len__"):
        raise ConfigError(
            "Robust evaluation reads samples by their index, and eval_dataset is iterable: give a "
            "map-style dataset, or evaluation={'attacks': []}."
        )
    data = _PixelDataset(loader, pixels, settings)
    if is_first and ranks.is_main and data.differs_when_read_again():
        logger.warning(_RANDOM_TRANSFORM)
    with casting_at_layers(module):
        record = evaluate(
            PixelView(module, pixels, settings.objective.head),
            data,
            settings.threat,
            config.attacks,
            num_examples=config.num_examples,
            batch_size=batch_size,
            seed=settings.dat.seed,
            device=ranks.device,
            rank=ranks.rank,
            ranks=ranks.count,
            gather=ranks.gather,
            num_workers=num_workers,
            task=task_of(settings.objective, reference),
        )
    return _metrics(record)


def _metrics(record: Record) -> dict[str, float]:
    if record.natural_loss is not None:
        return {
            "natural_loss": record.natural_loss,
            "robust_loss": max(record.robust_loss.values()),
            **_by_name("robust_loss", record.robust_loss),
        }
    assert record.natural_acc is not None
    outcomes = [record.outcomes[name] for name in record.robust_acc]
    withstood = sum(all(c == "1" for c in image) for image in zip(*outcomes, strict=True))
    return {
        "natural_accuracy": record.natural_acc,
        "robust_accuracy": withstood / record.num_examples,
        **_by_name("robust_accuracy", record.robust_acc),
    }


def _by_name(metric: str, values: Mapping[str, float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    return {f"{metric}_{attack}": value for attack, value in values.items()}
