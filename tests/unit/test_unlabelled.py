"""Unlabelled images: hidden labels, further images, pseudo-labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from dat_ds.data import build_data, classes_of, pseudo_label
from dat_ds.errors import DataError


def labels(dataset) -> torch.Tensor:
    return torch.tensor([dataset[i][1] for i in range(len(dataset))])


def test_labels_are_hidden_in_equal_parts_per_class() -> None:
    whole = build_data("digits")
    part = build_data("digits", labelled_fraction=0.25)
    y = labels(part.train)
    assert len(part.train) == len(whole.train) == 1294
    assert part.mixture is not None
    known = y[y >= 0]
    assert (y[y < 0] == -1).all()
    assert len(known) == 1294 - round(0.75 * 1294)
    quarter = labels(whole.train).bincount() / 4
    assert ((known.bincount() - quarter).abs() < 1).all()
    # The same images, each once.
    sums = [sorted(float(s[0].double().sum()) for s in data.train) for data in (whole, part)]
    assert sums[0] == sums[1]
    assert len(part.validation) == len(whole.validation)


def test_they_can_be_left_out() -> None:
    part = build_data("digits", labelled_fraction=0.25, drop_unlabelled=True)
    assert part.mixture is None
    assert len(part.train) == 1294 - round(0.75 * 1294)
    assert (labels(part.train) >= 0).all()


def test_pseudo_labels_are_told_from_labels() -> None:
    classes = torch.arange(10)
    given = pseudo_label(classes)
    assert (given < -1).all()
    y = torch.cat([classes, given, torch.tensor([-1])])
    assert torch.equal(classes_of(y), torch.cat([classes, classes, torch.tensor([-1])]))
    splits = build_data("digits", labelled_fraction=0.5, augment="crop")
    mixture = splits.mixture
    guesses = torch.arange(mixture.num_unlabelled) % 10
    mixture.label(guesses)
    y = labels(splits.train)
    assert torch.equal(classes_of(y[y < 0]), guesses)
    with pytest.raises(ValueError, match="3 pseudo-labels for 647 images"):
        mixture.label(torch.zeros(3))


def test_labelled_images_can_be_repeated() -> None:
    splits = build_data("digits", labelled_fraction=0.1, labelled_repeats=5)
    y = labels(splits.train)
    assert (y >= 0).sum() == 5 * 129
    assert (y < 0).sum() == 1294 - 129


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_further_images_come_from_an_npz_file(tmp_path: Path) -> None:
    images = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8)
    path = save_npz(tmp_path / "more.npz", images=images)
    splits = build_data("digits", unlabelled_path=path)
    assert splits.mixture.num_unlabelled == 5
    x, y = splits.train[1294 + 2]
    assert y == -1
    assert torch.equal((255 * x[0]).round().byte(), torch.from_numpy(images[2]))


def make_folder(root: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("train/a/1.png", "train/b/2.png", "test/a/1.png", "test/b/2.png"):
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
            root / "data" / name
        )
    for name in ("more/1.png", "more/deep/er/2.JPG"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (30, 25, 3), dtype=np.uint8)).save(root / name)
    (root / "more" / "notes.txt").write_text("no image")
    return root / "more"


def test_further_images_come_from_a_folder_at_any_depth(tmp_path: Path) -> None:
    more = make_folder(tmp_path)
    splits = build_data(
        "imagefolder",
        path=tmp_path / "data",
        img_size=16,
        validation_fraction=0,
        augment="resized_crop_flip",
        unlabelled_path=more,
    )
    x, y = default_collate([splits.train[i] for i in range(len(splits.train))])
    assert x.shape == (4, 3, 16, 16)
    assert y.tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: save_npz(p / "a.npz", x=np.zeros((2, 8, 8), np.uint8)),
            "lacks the array 'images'",
        ),
        (lambda p: save_npz(p / "a.npz", images=np.zeros((2, 8, 8))), "images is float64"),
        (
            lambda p: save_npz(p / "a.npz", images=np.zeros((2, 9, 9, 3), np.uint8)),
            r"has images of shape \[3, 9, 9\] \(channels, height, width\), the labelled ones have "
            r"\[1, 8, 8\]: convert them.",
        ),
        (
            lambda p: save_npz(p / "a.npz", images=np.zeros((2, 9, 9), np.uint8)),
            "write dat.data.img_size=8, or convert them.",
        ),
        (lambda p: p, "holds no image file"),
        (lambda p: p / "none.npz", "is not a readable npz file"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        build_data("digits", unlabelled_path=make(tmp_path))
    assert "dat.data.unlabelled_path=" in str(error.value)
