"""Claims about datasets: what each format reads as, and what is refused."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dat_ds.data import DATASETS, DistributedLoader, SampleKey, build_data, evaluation_batches
from dat_ds.errors import DataError


def write_cifar(root, monkeypatch, name="CIFAR10"):
    """Lay down six tiny files per torchvision's format, with their checksums accepted."""
    kind = getattr(torchvision.datasets, name)
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    for file, _ in kind.train_list + kind.test_list:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        entry = {"data": pixels, key: [i % 10 for i in range(20)]}
        (folder / file).write_bytes(pickle.dumps(entry))
    classes = {kind.meta["key"]: [f"class{i}" for i in range(10 if name == "CIFAR10" else 100)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(classes))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return pickle.loads((folder / kind.test_list[0][0]).read_bytes())["data"]


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def write_folder(root, train=("cat", "dog"), test=("cat", "dog"), part="test"):
    rng = np.random.default_rng(0)
    for name, classes in (("train", train), (part, test)):
        for label in classes:
            (root / name / label).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / label / f"{i}.png")
    return root


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        build_data(*args, **kwargs)
    return str(caught.value)


def check_samples(splits):
    for split in (splits.train, splits.validation, splits.test):
        for index in range(min(len(split), 3)):
            x, y = split[index]
            assert x.shape == splits.image_shape
            assert x.dtype == torch.float32
            assert x.min() >= 0
            assert x.max() <= 1
            assert 0 <= y < splits.num_classes
    assert len(splits.mean) == len(splits.std) == splits.image_shape[0]


def test_digits_are_scaled_to_unit_range_and_split_by_fifths_and_tenths():
    splits = build_data("digits", augment="crop")
    check_samples(splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1294, 144, 359)
    assert (splits.image_shape, splits.num_classes, splits.name) == ((1, 8, 8), 10, "digits")
    assert splits.test.images.max() == 1
    assert splits.class_names == tuple("0123456789")


def test_the_test_split_of_digits_is_the_same_for_every_seed():
    one, other = (build_data("digits", seed=seed) for seed in (0, 9))
    assert torch.equal(one.test.images, other.test.images)
    assert one.mean == other.mean
    assert one.validation.indices != other.validation.indices


def test_mean_and_std_are_those_of_the_training_data():
    data = build_data("digits", validation_fraction=0.0)
    images = torch.stack([data.train[i][0] for i in range(len(data.train))]).double()
    assert data.mean == pytest.approx([images.mean().item()], rel=1e-9)
    assert data.std == pytest.approx([images.std(correction=0).item()], rel=1e-9)


def test_validation_is_disjoint_from_train_stratified_and_never_augmented():
    splits = build_data("digits", augment="crop", validation_fraction=0.2)
    train, validation = splits.train.dataset, splits.validation
    assert set(train.indices).isdisjoint(validation.indices)
    assert len(train) + len(validation) == len(train.dataset)
    counts = train.dataset.labels[validation.indices].bincount()
    expected = train.dataset.labels.bincount() * 0.2
    assert (counts - expected).abs().max() < 1
    assert torch.equal(validation[0][0], validation.dataset.images[validation.indices[0]])


def test_validation_fraction_zero_gives_an_empty_validation_split():
    splits = build_data("synthetic", validation_fraction=0.0)
    assert (len(splits.train), len(splits.validation)) == (512, 0)


@pytest.mark.parametrize(
    ("name", "kind", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)]
)
def test_cifar_is_read_from_the_files_of_torchvision(tmp_path, monkeypatch, name, kind, classes):
    test_pixels = write_cifar(tmp_path, monkeypatch, kind)
    splits = build_data(name, path=tmp_path, augment="crop_flip")
    check_samples(splits)
    assert (splits.num_classes, splits.image_shape) == (classes, (3, 32, 32))
    assert splits.class_names[0] == "class0"
    expected = torch.from_numpy(test_pixels[3].reshape(3, 32, 32)).float() / 255
    assert torch.equal(splits.test[3][0], expected)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_files_are_refused_with_how_to_get_them(tmp_path, name):
    text = refusal(name, path=tmp_path / "nowhere")
    assert f"dat.data.path='{tmp_path}/nowhere'" in text
    assert "batches.meta" in text or "meta" in text
    assert f"torchvision.datasets.{name.upper()}('{tmp_path}/nowhere', download=True)" in text


def test_npz_images_are_read_channels_last_or_grey(tmp_path):
    arrays = write_npz(tmp_path / "a.npz")
    splits = build_data("npz", path=tmp_path / "a.npz")
    check_samples(splits)
    assert (splits.image_shape, splits.num_classes) == ((3, 6, 5), 4)
    expected = torch.from_numpy(arrays["x_test"][2]).permute(2, 0, 1).float() / 255
    assert torch.equal(splits.test[2][0], expected)

    grey = {key: arrays[key][..., 0] for key in ("x_train", "x_test")}
    write_npz(tmp_path / "grey.npz", **grey)
    assert build_data("npz", path=tmp_path / "grey.npz").image_shape == (1, 6, 5)


def test_npz_also_accepts_images_and_labels_but_never_without_a_test_part(tmp_path):
    arrays = write_npz(tmp_path / "a.npz")
    named = {"images": arrays["x_train"], "labels": arrays["y_train"]}
    np.savez(tmp_path / "b.npz", **named)
    text = refusal("npz", path=tmp_path / "b.npz")
    assert "lacks the arrays test_images, test_labels" in text
    named |= {"test_images": arrays["x_test"], "test_labels": arrays["y_test"]}
    np.savez(tmp_path / "c.npz", **named)
    check_samples(build_data("npz", path=tmp_path / "c.npz"))


def test_all_problems_of_an_npz_are_reported_together(tmp_path):
    write_npz(
        tmp_path / "a.npz",
        x_train=np.zeros((40, 6, 5, 3), dtype=np.float32),
        y_train=np.zeros(39, dtype=np.int64),
        x_test=np.zeros((8, 3, 6, 5), dtype=np.uint8),
        y_test=np.zeros((8, 1)),
    )
    text = refusal("npz", path=tmp_path / "a.npz")
    assert "x_train is float32; images must be uint8" in text
    assert "x_train has 40 images but y_train has 39 labels" in text
    assert "x_test has shape (8, 3, 6, 5)" in text
    assert "y_test is float64 of shape (8, 1)" in text
    assert text.count("dat.data.path=") == 4


@pytest.mark.parametrize(
    ("dtype", "scale", "advice"),
    [
        (np.float32, 1 / 255, "Write (255 * x).round().astype(numpy.uint8)."),
        (np.float64, 1, "Write x.round().astype(numpy.uint8)."),
        (np.int64, 1, "Write x.astype(numpy.uint8)."),
        (np.uint16, 257, "If they use all 16 bits, write (x / 257).round().astype(numpy.uint8)."),
    ],
)
def test_arrays_of_another_dtype_are_refused_with_what_restores_them(
    tmp_path, dtype, scale, advice
):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    x = (pixels * np.float64(scale)).astype(dtype)
    write_npz(tmp_path / "a.npz", x_test=x, y_test=np.zeros(1, int))
    text = refusal("npz", path=tmp_path / "a.npz")
    assert f"x_test is {np.dtype(dtype)}; images must be uint8 in 0..255. {advice}" in text
    written = eval(advice.partition("rite ")[2].rstrip("."), {"x": x, "numpy": np})  # noqa: S307
    assert written.dtype == np.uint8
    assert np.array_equal(written, pixels)


@pytest.mark.parametrize(
    ("x", "advice"),
    [
        (np.zeros((8, 6, 5)) > 0, "Write 255 * x.astype(numpy.uint8)."),
        (np.full((8, 6, 5), -1.0), "Scale them to 0..255, round, and write x.astype(numpy.uint8)."),
        (np.full((8, 6, 5), np.nan), "Scale them to 0..255, round, and write"),
        (np.full((8, 6, 5), 300), "Scale them to 0..255, round, and write"),
        (np.zeros((8, 6, 5), complex), "Scale them to 0..255, round, and write"),
        (np.zeros((0, 6, 5)), "Scale them to 0..255, round, and write"),
        (np.zeros((8, 0, 5), np.uint8), "x_test has shape (8, 0, 5): images without a pixel."),
    ],
)
def test_arrays_that_are_no_images_are_refused_too(tmp_path, x, advice):
    write_npz(tmp_path / "a.npz", x_test=x)
    assert advice in refusal("npz", path=tmp_path / "a.npz")


def test_npz_parts_of_different_image_shape_are_refused(tmp_path):
    write_npz(tmp_path / "a.npz", x_test=np.zeros((8, 5, 5, 3), dtype=np.uint8))
    assert "x_train has images of shape (6, 5, 3), x_test of (5, 5, 3)" in refusal(
        "npz", path=tmp_path / "a.npz"
    )


def test_an_unreadable_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    write_npz(tmp_path / "object.npz", y_train=np.array([None] * 40))
    for file in ("missing.npz", "text.npz", "array.npy", "object.npz"):
        text = refusal("npz", path=tmp_path / file)
        assert f"dat.data.path='{tmp_path / file}' is not a readable npz file" in text


def test_labels_out_of_range_are_refused_for_both_parts_together(tmp_path):
    write_npz(tmp_path / "a.npz", y_test=np.arange(8) - 1)
    text = refusal("npz", path=tmp_path / "a.npz", num_classes=3)
    assert "dat.data.num_classes=3, but the labels of the train part of " in text
    assert "a.npz run from -1 to 6" in text
    assert "Write dat.data.num_classes=7" in text


def test_num_classes_may_exceed_the_labels_in_the_data(tmp_path):
    write_npz(tmp_path / "a.npz")
    assert build_data("npz", path=tmp_path / "a.npz", num_classes=12).num_classes == 12


def test_classes_without_a_training_image_are_named(tmp_path, caplog):
    images, labels = np.zeros((12, 8, 8), np.uint8), np.array([0, 5, 2, 4] * 3)
    keys = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (images, labels) * 2, strict=True)))
    assert build_data("npz", path=tmp_path / "a.npz").num_classes == 6
    assert "2 of 6 classes have no training image: 1, 3." in caplog.text
    caplog.clear()
    build_data("npz", path=tmp_path / "a.npz", num_classes=6)
    assert caplog.text == ""
    np.savez(tmp_path / "more.npz", x=images[:4], y=np.arange(4))
    more = {"name": "npz", "path": str(tmp_path / "more.npz")}
    build_data("npz", path=tmp_path / "a.npz", extra=more, extra_fraction=0.5)
    assert caplog.text == "", "the other images have these classes"


def test_empty_splits_are_refused(tmp_path):
    empty = {"x_test": np.zeros((0, 6, 5, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)}
    write_npz(tmp_path / "a.npz", **empty)
    assert refusal("npz", path=tmp_path / "a.npz") == (
        f"The test part of {tmp_path}/a.npz has no images."
    )
    text = refusal("synthetic", num_train=4)
    assert "validation_fraction=0.1 of 4 images leaves the validation split empty" in text
    text = refusal("synthetic", num_train=4, validation_fraction=0.99)
    assert "leaves the training split empty" in text


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_imagefolder_yields_square_images_of_img_size(tmp_path, part, augment):
    write_folder(tmp_path, part=part)
    splits = build_data(
        "imagefolder", path=tmp_path, img_size=16, augment=augment, validation_fraction=0.25
    )
    check_samples(splits)
    assert splits.image_shape == (3, 16, 16)
    assert splits.class_names == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 8)


def test_imagefolder_is_224_unless_told_and_crops_from_the_whole_image(tmp_path):
    write_folder(tmp_path)
    splits = build_data("imagefolder", path=tmp_path, augment="resized_crop_flip")
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, 224, 224)

    red = np.zeros((10, 40, 3), dtype=np.uint8)
    red[:, :8, 0] = 255  # outside the central square, so visible only in the whole image
    for i in range(4):
        Image.fromarray(red).save(tmp_path / "train" / "cat" / f"{i}.png")
    splits = build_data(
        "imagefolder", path=tmp_path, img_size=8, augment="resized_crop_flip", validation_fraction=0
    )
    assert splits.train.dataset[0][0].max() == 0
    assert any(splits.train[SampleKey(epoch, 0)][0].max() > 0.5 for epoch in range(40))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_refused_by_name_from_any_process(tmp_path, num_workers):
    write_folder(tmp_path)
    file = tmp_path / "test" / "dog" / "2.png"
    file.write_bytes(file.read_bytes()[:200])
    test = build_data("imagefolder", path=tmp_path, img_size=8).test
    with pytest.raises(DataError) as caught:
        list(evaluation_batches(test, batch_size=4, num_workers=num_workers))
    assert str(caught.value).startswith(f"dat.data.path: cannot read the image {file} (")
    assert "Traceback" not in str(caught.value)


def test_imagefolder_without_its_folders_or_images_is_refused(tmp_path):
    text = refusal("imagefolder", path=tmp_path)
    assert f"lacks the folders {tmp_path}/train, {tmp_path}/test" in text
    write_folder(tmp_path, test=())
    (tmp_path / "test" / "cat").mkdir(parents=True)
    assert f"no dataset in {tmp_path}/test" in refusal("imagefolder", path=tmp_path)


def test_imagefolder_with_other_classes_in_the_test_part_is_refused(tmp_path):
    write_folder(tmp_path, train=("cat", "dog", "owl"), test=("cat", "dgo"))
    text = refusal("imagefolder", path=tmp_path)
    assert "Only in train: dog, owl; only in test: dgo." in text


def test_synthetic_images_are_reproducible_class_dependent_and_sized_as_asked():
    kwargs = {"num_train": 40, "num_test": 12, "num_classes": 5, "image_shape": (2, 6, 7)}
    one, again, other = (build_data("synthetic", seed=s, **kwargs) for s in (0, 0, 1))
    check_samples(one)
    assert (len(one.train), len(one.validation), len(one.test)) == (36, 4, 12)
    assert (one.num_classes, one.image_shape) == (5, (2, 6, 7))
    assert torch.equal(one.test.images, again.test.images)
    assert not torch.equal(one.test.images, other.test.images)
    x = one.test.images.float()
    same, different = (x[0] - x[5]).abs().mean(), (x[0] - x[1]).abs().mean()
    assert same < different


def test_img_size_resizes_images_held_in_memory():
    splits = build_data("digits", img_size=16, augment="crop")
    check_samples(splits)
    assert splits.image_shape == (1, 16, 16)


def test_an_unknown_name_is_refused_with_the_closest_and_the_valid_ones():
    text = refusal("cifar_10")
    assert text == (
        "dat.data.name='cifar_10' is not valid (did you mean 'cifar10'?). "
        f"Write one of {', '.join(map(repr, DATASETS))}."
    )


def test_all_problems_of_the_arguments_are_reported_together():
    text = refusal(
        "digits",
        path="/data",
        validation_fraction=1.0,
        augment="crops",
        img_size=0,
        num_classes=0,
        num_train=5,
        image_shape=(3, 32),
    )
    for part in (
        "dat.data.augment='crops' is not valid (did you mean 'crop'?). Write one of 'none', 'flip'",
        "dat.data.validation_fraction=1.0 is not valid: write a number in [0, 1).",
        "dat.data.img_size=0 is not valid: write a number above 0.",
        "dat.data.num_classes=0 is not valid: write a number from 2 to 1048576.",
        "dat.data.image_shape=[3, 32] is not a setting of the dataset 'digits', but of synthetic: ",
        "dat.data.path='/data' is not a setting of the dataset 'digits': ",
        "dat.data.num_train=5 is not a setting of the dataset 'digits', but of synthetic: ",
    ):
        assert part in text
    assert "dat.data.image_shape=[3, 32] is not valid: write channels, height, width" in refusal(
        "synthetic", image_shape=(3, 32)
    )


@pytest.mark.parametrize("name", ["cifar10", "npz", "imagefolder"])
def test_a_dataset_on_disk_needs_a_path(name):
    assert "dat.data.path is missing: " in refusal(name)


def test_consecutive_epochs_of_the_whole_pipeline_differ_and_repeat_from_the_seed():
    def epochs(seed):
        splits = build_data("digits", augment="crop", seed=seed, validation_fraction=0.9)
        loader = DistributedLoader(splits.train, micro_batch=len(splits.train), seed=seed)
        return [x.clone() for _ in range(3) for x, _ in loader]

    first = epochs(0)
    assert all(torch.equal(x, again) for x, again in zip(first, epochs(0), strict=True))
    assert not any(torch.equal(x, following) for x, following in pairwise(first))
