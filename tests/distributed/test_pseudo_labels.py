"""Pseudo-labels are the same on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.distributed.harness import run_ranks

COUNT = 29


def images_and_model() -> tuple[TensorDataset, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    return TensorDataset(torch.rand(COUNT, 3, 2, 2), torch.arange(COUNT) % 5), model


def label() -> tuple[Any, Any, Any, int]:
    from dat_ds.engine.launch import setup_ranks
    from dat_ds.training.pseudo_labels import label_images

    images, model = images_and_model()
    seen = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return model(x)

    found = label_images(images, counting, setup_ranks(), batch_size=4)
    return found.classes, found.confidence, found.given, sum(seen)


def test_three_ranks_share_the_images_and_all_get_every_label() -> None:
    (x, y), model = images_and_model()[0].tensors, images_and_model()[1]
    shares = model(x).detach().double().softmax(1)
    results = run_ranks(label, 3)
    for classes, confidence, given, _ in results:
        assert torch.equal(classes, shares.argmax(1))
        torch.testing.assert_close(confidence, shares.amax(1).float(), rtol=1e-5, atol=0)
        assert torch.equal(given, y)
    assert sum(seen for *_, seen in results) == COUNT
    assert max(seen for *_, seen in results) <= 10
