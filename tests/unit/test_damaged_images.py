"""Claims about damaged training images that others stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dat_ds.data import DistributedLoader, Readable, build_data
from dat_ds.errors import DamagedImageError, DataError


def write_folder(root: Path, count: int = 6) -> list[Path]:
    """Grey images by number, of which a single one can be told from the others."""
    files = []
    for part, classes in (("train", "ab"), ("test", "ab")):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                file = root / part / name / f"{i}.png"
                level = 20 * (label * count + i)
                Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(file)
                files.append(file)
    return files[: 2 * count]


def data_of(root: Path, **keys):
    return build_data(
        "imagefolder",
        path=root,
        img_size=16,
        crop_share=1.0,
        **{"validation_fraction": 0, "damaged": "skip", **keys},
    )


def harm(*files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:60])


def levels(splits, **keys):
    loader = DistributedLoader(splits.train, micro_batch=4, shuffle=False, **keys)
    found = [round(255 * float(image.mean()) / 20) for x, _ in loader for image in x]
    return found, loader


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "resized_crop_flip"])
def test_the_next_readable_image_stands_for_a_damaged_one(tmp_path, num_workers, augment):
    files = write_folder(tmp_path)
    harm(files[2], files[3], files[11])
    found, loader = levels(data_of(tmp_path, augment=augment), num_workers=num_workers)
    assert found == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 0]
    damaged = loader.take_damaged()
    assert list(damaged) == [str(files[2]), str(files[3]), str(files[11])]
    assert all(str(file) in words for file, words in damaged.items())
    assert loader.take_damaged() == {}


def test_the_label_is_that_of_the_image_that_is_shown(tmp_path):
    files = write_folder(tmp_path)
    harm(files[5])
    train = data_of(tmp_path).train
    assert train[5][1] == train[6][1] == 1
    assert torch.equal(train[5][0], train[6][0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_the_same_on_any_ranks_and_after_a_resume(tmp_path, ranks):
    harm(*write_folder(tmp_path)[3:5])
    splits = data_of(tmp_path)
    whole = {}
    for x, _ in (loader := DistributedLoader(splits.train, micro_batch=6)):
        whole |= dict(zip(loader.plan.indices, x, strict=True))
    for rank in range(ranks):
        loader = DistributedLoader(splits.train, micro_batch=6 // ranks, rank=rank, ranks=ranks)
        loader.set_position(0, 1)
        for x, _ in loader:
            for index, image in zip(loader.plan.indices, x, strict=True):
                assert torch.equal(image, whole[index])


def test_training_stops_at_a_damaged_image_unless_told_otherwise(tmp_path):
    harm(write_folder(tmp_path)[2])
    with pytest.raises(DamagedImageError, match=r"train/a/2\.png"):
        levels(data_of(tmp_path, damaged="stop"))


def test_images_to_evaluate_are_never_replaced(tmp_path):
    write_folder(tmp_path)
    harm(tmp_path / "test" / "a" / "0.png", *(tmp_path / "train" / "a").glob("*.png"))
    splits = data_of(tmp_path, validation_fraction=0.5)
    with pytest.raises(DamagedImageError, match=r"test/a/0\.png"):
        splits.test[0]
    with pytest.raises(DamagedImageError, match="train/a"):
        [splits.validation[i] for i in range(6)]


def test_unlabelled_and_extra_images_are_replaced_within_their_part(tmp_path):
    files = write_folder(tmp_path)
    (tmp_path / "more").mkdir()
    for i in range(3):
        (tmp_path / "more" / f"{i}.png").write_bytes(files[i].read_bytes())
    harm(tmp_path / "more" / "2.png", files[11])
    splits = data_of(
        tmp_path,
        unlabelled_path=tmp_path / "more",
        extra={"name": "imagefolder", "path": str(tmp_path / "test")},
        extra_fraction=0.25,
    )
    harm(tmp_path / "test" / "b" / "5.png")
    shown = [round(255 * float(splits.train[i][0].mean()) / 20) for i in (11, 14, 26)]
    assert shown == [0, 0, 0]


def test_kinds_of_images_that_are_refused_are_replaced_too(tmp_path):
    files = write_folder(tmp_path)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(files[0])  # transparent
    splits = data_of(tmp_path)
    files[1].unlink()
    found, loader = levels(splits)
    assert found[:3] == [2, 2, 2]
    assert len(loader.take_damaged()) == 2


def test_nothing_stands_for_them_where_all_are_damaged(tmp_path):
    harm(*write_folder(tmp_path))
    with pytest.raises(DataError, match="12 training images in a row are damaged"):
        data_of(tmp_path).train[0]


def test_other_errors_are_no_damage():
    class Lost(list):
        def __getitem__(self, index):
            raise DataError("the shard is gone")

    with pytest.raises(DataError, match="the shard is gone"):
        Readable(Lost([1, 2]))[0]
