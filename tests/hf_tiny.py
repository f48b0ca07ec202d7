"""Tiny models, data and Trainers that the tests of the Hugging Face integration share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.distributed import tiny

MEAN, STD = [0.5] * 3, [0.5] * 3


class PixelDicts(Dataset[dict[str, Tensor]]):
    """Random images, normalised by MEAN and STD, as the Trainer takes them."""

    def __init__(self, count: int, seed: int = 1, size: int = tiny.SIZE, levels: int = 256) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Multiples of 1/256 survive normalising and back without rounding, in bfloat16 too.
        self.pixels = (
            torch.randint(levels + 1, (count, 3, size, size), generator=generator) / levels
        )
        self.labels = torch.randint(tiny.CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": (self.pixels[index] - 0.5) / 0.5, "labels": self.labels[index]}


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=tiny.SIZE,
        patch_size=4,
        num_labels=tiny.CLASSES,
        **options,
    )
    return transformers.ViTForImageClassification(config)


def clip(seed: int = 0) -> nn.Module:
    """An image encoder whose features have length 8."""
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=tiny.SIZE,
        patch_size=4,
        projection_dim=8,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def trainer_of(
    model: nn.Module,
    folder: Any,
    callbacks: list[Any],
    *,
    kind: type[transformers.Trainer] = transformers.Trainer,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **arguments: Any,
) -> transformers.Trainer:
    """A Trainer on the CPU that reads the data in order, by SGD with momentum."""
    values = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 100,
        **arguments,
    }
    return kind(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **values),
        train_dataset=PixelDicts(64) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        **(trainer_options or {}),
    )


def our_hooks(model: nn.Module) -> list[Any]:
    """Hooks of ours on any of the model's modules."""
    found = [
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    ]
    return [hook for hook in found if "dat_ds" in getattr(hook, "__module__", "")]
