"""What the tests of models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VIT = "vit_tiny_patch16_224"
TINY_VIT: dict[str, Any] = {
    "name": VIT,
    "num_classes": 10,
    "in_chans": 1,
    "img_size": 8,
    "patch_size": 4,
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 2,
    "seed": 0,
}


def pixels(size: int = 8, channels: int = 1, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(batch, channels, size, size, generator=generator)


def write_hf_vit(folder: Path, num_labels: int = 10, weights: bool = True) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=3,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if weights:
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)


HEADS = [("rotation", 4), ("projection", 16), ("features", 0)]
