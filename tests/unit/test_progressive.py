"""Training images that grow along the run: their sides, their pixels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dat_ds.assembly import build_data_of, build_model_of
from dat_ds.config import load_config
from dat_ds.data import DistributedLoader, SampleKey, build_data
from dat_ds.data.method import DatasetMethod
from dat_ds.data.transforms import resize_square
from dat_ds.errors import ConfigError, DataError

pytestmark = pytest.mark.fast
GROWING = {"progressive_from": 8, "progressive_epochs": 4, "progressive_step": 4}


def splits(**options: Any) -> Any:
    given = {"num_train": 12, "num_test": 4, "image_shape": [3, 16, 16], "seed": 1}
    return build_data("synthetic", **{**given, "validation_fraction": 0.0, **GROWING, **options})


def run_of(model: dict[str, Any], data: dict[str, Any], **dat: Any) -> Any:
    images = {"name": "synthetic", "num_train": 12, "num_test": 4, "image_shape": [3, 16, 16]}
    return load_config(
        {
            "train_batch_size": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
            "dat": {"model": model, "data": {**images, **GROWING, **data}, **dat},
        }
    )


def test_the_side_rises_in_steps_to_the_full_one() -> None:
    method = DatasetMethod(progressive_from=128, progressive_epochs=10, progressive_step=32)
    sides = [method.side_in(epoch, 224) for epoch in range(13)]
    assert sides == [128, 128, 128, 128, 160, 160, 160, 192, 192, 192, 224, 224, 224]
    odd = DatasetMethod(progressive_from=100, progressive_epochs=2.5, progressive_step=50)
    assert [odd.side_in(epoch, 224) for epoch in range(4)] == [100, 100, 150, 224]
    assert DatasetMethod().side_in(0, 224) == 224


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip", "idbh_weak"])
def test_images_of_an_epoch_have_its_side_and_others_the_full_one(augment: str) -> None:
    data = splits(augment=augment)
    assert data.sides == (8, 12, 16)
    assert data.image_shape == (3, 16, 16)
    for epoch, side in enumerate([8, 8, 12, 12, 16, 16]):
        x, _ = data.train[SampleKey(epoch, 3)]
        assert x.shape == (3, side, side)
        assert x.min() >= 0
        assert x.max() <= 1
    assert data.test[0][0].shape == (3, 16, 16)


def test_small_images_are_the_full_ones_resized() -> None:
    small, full = splits().train, splits(progressive_from=None, progressive_epochs=None).train
    expected = resize_square(full[5][0], 8).clamp(0, 1)
    assert torch.equal(small[SampleKey(0, 5)][0], expected)
    assert torch.equal(small[SampleKey(4, 5)][0], full[SampleKey(4, 5)][0])


def test_batches_have_one_side_whatever_the_ranks_workers_and_start() -> None:
    data = splits(augment="crop_flip", mixup=0.5).train

    def images(ranks: int, start: int = 0, **options: int) -> list[torch.Tensor]:
        parts = []
        for rank in range(ranks):
            loader = DistributedLoader(
                data, micro_batch=6 // ranks, rank=rank, ranks=ranks, **options
            )
            loader.set_position(start, 0)
            parts.append([x for _ in range(start, 5) for x, _ in loader])
        return [torch.cat(step) for step in zip(*parts, strict=True)]

    whole = images(1)
    assert [x.shape[-1] for x in whole] == [8, 8, 8, 8, 12, 12, 12, 12, 16, 16]
    for others, first in ((images(3), 0), (images(1, num_workers=2), 0), (images(1, start=2), 4)):
        assert all(torch.equal(a, b) for a, b in zip(whole[first:], others, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"progressive_from": 16}, "progressive_from=16 has to be below their side"),
        ({"image_shape": [3, 16, 12]}, "progressive_from=8 is for square images, .* 16 x 12"),
        ({"progressive_epochs": None}, "progressive_from=8 and dat.data.progressive_epochs=None"),
    ],
)
def test_mistakes_name_the_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        splits(**options)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ({"name": "resnet18", "stem": "cifar", "options": {"channels": [8] * 4}}, {}, None),
        ({"options": {"dynamic_img_size": True}}, {}, None),
        (
            {},
            {},
            r"progressive_from=8: .* does not take images of 8 x 8 pixels .* "
            "Write dat.model.options.dynamic_img_size=true",
        ),
        (
            {"options": {"dynamic_img_size": True}},
            {"progressive_step": 3},
            "does not take images of 11 x 11 pixels",
        ),
    ],
)
def test_a_model_has_to_take_every_side(
    model: dict[str, Any], data: dict[str, Any], words: str | None
) -> None:
    vit = {"name": "vit_tiny_patch16_224", "patch_size": 4, "depth": 1, "embed_dim": 16}
    run = run_of({**vit, "num_heads": 2, **model} if "name" not in model else model, data)
    images = build_data_of(run)
    if words is None:
        assert build_model_of(run, images)(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    else:
        with pytest.raises(ConfigError, match=words):
            build_model_of(run, images)


@pytest.mark.parametrize("attack", ["free", "fgsm_pgi"])
def test_attacks_that_carry_perturbations_on_are_refused(attack: str) -> None:
    with pytest.raises(ConfigError, match=r"progressive_from=8 changes the size of images"):
        run_of({"name": "resnet18"}, {}, attack={"name": attack})


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_through_all_sides(stage: int, tmp_path: Path) -> None:
    from dat_ds.training.run import train
    from tests.integration import tiny_run

    dynamic = {**tiny_run.VIT, "patch_size": 2, "options": {"dynamic_img_size": True}}
    values = tiny_run.config(tmp_path / "run", model=tiny_run.CNN if stage == 2 else dynamic)
    values["zero_optimization"] = {"stage": stage}
    data = {"progressive_from": 4, "progressive_epochs": 1.5, "progressive_step": 2}
    values["dat"]["data"] |= data
    record = train(load_config(values))
    assert record is not None
    assert len(tiny_run.rows(tmp_path / "run")) == record["steps"] > 20
