"""Pixels from ``pixel_values``, and back, under the callback of Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dat_ds.errors import ConfigError
from dat_ds.integrations.hf.pixels import Float32Collator, PixelScale, pixels_of, unpacked
from tests.hf_tiny import PixelDicts, trainer_of, vit
from tests.unit.hf_helpers import callback_of


def test_pixels_and_values_are_inverse() -> None:
    x = torch.rand(2, 3, 4, 4)
    scale = PixelScale([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(scale.to_pixels(scale.to_values(x)), x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    ],
)
def test_the_scale_is_the_processors(options: dict[str, Any]) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 4, "width": 4}, **options)
    levels = torch.randint(256, (3, 4, 4), dtype=torch.uint8)
    values = processor(levels, return_tensors="pt")["pixel_values"]
    pixels = pixels_of(None, None, processor).to_pixels(values)
    torch.testing.assert_close(pixels[0], levels / 255)


class _Values(PixelDicts):
    def __init__(self, factor: float, shift: float) -> None:
        super().__init__(8)
        self._change = factor, shift

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        factor, shift = self._change
        values = self.pixels[index] * factor + shift
        return {"pixel_values": values, "labels": self.labels[index]}


@pytest.mark.parametrize(
    ("factor", "shift", "message"),
    [(255, 0, "levels of 0 to 255"), (4, -2, "normalised by other numbers")],
)
def test_wrong_values_are_refused(
    tmp_path: Path, factor: float, shift: float, message: str
) -> None:
    trainer = trainer_of(vit(), tmp_path, [callback_of()], train_dataset=_Values(factor, shift))
    with pytest.raises(ConfigError, match=message):
        trainer.train()


def test_raw_pixels_are_suspected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(vit(), tmp_path, [callback_of()], train_dataset=_Values(1, 0)).train()
    assert "without a negative number" in caplog.text


def test_float32_bits_survive_a_cast_of_floats() -> None:
    values = torch.randn(2, 3, 4, 4)
    batch = Float32Collator(lambda _: {"pixel_values": values})(None)["pixel_values"]
    cast = batch.to(torch.bfloat16) if batch.is_floating_point() else batch
    assert torch.equal(unpacked(cast), values)
