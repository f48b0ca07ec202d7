"""Claims about the readers of timm and of Hugging Face's datasets, and about class maps."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from dat_ds.config import load_config
from dat_ds.data import DistributedLoader, build_data, file_of
from dat_ds.data.decoding import read_image
from dat_ds.errors import ConfigError, DataError

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what the library caches of these files among them, and it silent."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    logging.getLogger("datasets").setLevel(logging.ERROR)


def pixels(seed: int, size=(20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(seed)).save(stream, kind)
    return stream.getvalue()


def write_folders(root: Path, parts=("train", "val"), classes=CLASSES, count=4) -> Path:
    for number, part in enumerate(parts):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                kind = ("PNG", "JPEG")[i % 2]
                data = encoded(100 * number + 10 * label + i, kind)
                (root / part / name / f"{i}.{kind.lower()}").write_bytes(data)
    return root


def build(name: str, path: Path, **keys):
    return build_data(
        name, path=path, **{"img_size": 16, "validation_fraction": 0, "augment": "none", **keys}
    )


def refusal(name: str, path: Path, **keys) -> str:
    with pytest.raises(DataError) as caught:
        build(name, path, **keys)
    return str(caught.value)


def samples_of(splits):
    """Stored images and labels of both parts."""
    parts = (splits.train.dataset.dataset, splits.test)
    return [part.raw(i) for part in parts for i in range(len(part))]


def same(left, right) -> bool:
    a, b = samples_of(left), samples_of(right)
    return len(a) == len(b) and all(
        torch.equal(x, other) and y == label for (x, y), (other, label) in zip(a, b, strict=True)
    )


def check_ids(splits):
    """Every sample once an epoch on 1, 2 and 3 ranks, and after a resume in its middle."""
    for ranks in (1, 2, 3):
        seen = []
        for rank in range(ranks):
            first, second = (
                DistributedLoader(splits.train, micro_batch=6 // ranks, rank=rank, ranks=ranks)
                for _ in range(2)
            )
            for _ in first:
                seen += first.plan.indices
                break
            second.load_state_dict(first.state_dict())
            for _ in second:
                seen += second.plan.indices
        assert sorted(seen) == list(range(len(splits.train)))


# ---- class maps


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("map.txt", "owl\ncat\ndog\n"),
        ("map.json", '["owl", "cat", "dog"]'),
        ("map.json", '{"cat": 1, "owl": 0, "dog": 2}'),
    ],
)
@pytest.mark.parametrize("name", ["imagefolder", "timm"])
def test_a_class_map_fixes_names_and_order(tmp_path, file, content, name):
    write_folders(tmp_path)
    (tmp_path / file).write_text(content)
    splits = build(name, tmp_path, class_map=str(tmp_path / file))
    assert splits.class_names == ("owl", "cat", "dog")
    for part in (splits.train.dataset.dataset, splits.test):
        for i in range(len(part)):
            assert splits.class_names[part[i][1]] == Path(file_of(part, i)).parent.name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds 0 names"),
        ("cat\n\nowl\n", "the name of class 1 is empty"),
        ("cat\ndog\ncat\n", "names cat more than once"),
        ("cat\ndog\n", "lacks the classes owl"),
        ("cat\ndog\nowl\nyak\n", "names classes without a folder in {p}/train: yak"),
    ],
)
def test_class_maps_that_do_not_fit_are_refused(tmp_path, content, words):
    write_folders(tmp_path)
    (tmp_path / "map.txt").write_text(content)
    text = refusal("imagefolder", tmp_path, class_map=str(tmp_path / "map.txt"))
    assert words.format(p=tmp_path) in text
    assert f"dat.data.class_map='{tmp_path}/map.txt'" in text


@pytest.mark.parametrize(
    "content", ["{", "3", '["a", 1]', '{"a": 0, "b": 2}', '{"a": "x"}', '{"a": true}']
)
def test_a_json_file_that_is_no_class_map_is_refused(tmp_path, content):
    write_folders(tmp_path)
    (tmp_path / "map.json").write_text(content)
    text = refusal("imagefolder", tmp_path, class_map=str(tmp_path / "map.json"))
    assert "is not a class map (" in text
    assert "is not a class map (No such file" in refusal("imagefolder", tmp_path, class_map="gone")


# ---- timm


def test_timms_folders_are_those_of_imagefolder(tmp_path):
    write_folders(tmp_path)
    one, other = build("timm", tmp_path), build("imagefolder", tmp_path)
    assert one.class_names == other.class_names == CLASSES
    assert same(one, other)
    check_ids(one)


def write_tars(root: Path, folders: Path) -> Path:
    root.mkdir(exist_ok=True)
    for part in ("train", "val"):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            tar.add(folders / part, arcname=".")
    return root


def test_timms_tars_hold_the_same(tmp_path):
    folders = write_folders(tmp_path / "folders")
    tars = write_tars(tmp_path / "tars", folders)
    splits = build("timm", tars, train_split="train.tar", test_split="val.tar")
    assert same(splits, build("timm", folders))
    assert file_of(splits.train, 0).startswith(f"{tars}/train.tar:")
    check_ids(splits)
    (tars / "train.tar").unlink()
    with pytest.raises(DataError, match=r"the shard .*train\.tar cannot be read any more"):
        list(DistributedLoader(splits.train, micro_batch=4, num_workers=1))


def test_a_folder_without_the_part_is_refused_where_timm_takes_all_images(tmp_path):
    write_folders(tmp_path, parts=("train", "test"))
    text = refusal("timm", tmp_path)
    assert f"dat.data.path='{tmp_path}' has no part 'validation', but test, train: " in text
    assert len(build("timm", tmp_path, test_split="test").test) == 12
    assert "is not a folder" in refusal("timm", tmp_path / "gone")


def test_a_class_without_an_image_in_one_part_is_refused(tmp_path):
    write_folders(tmp_path)
    shutil.rmtree(tmp_path / "val" / "dog")
    assert "Only in train: dog; only in validation: none" in refusal("timm", tmp_path)
    (tmp_path / "map.txt").write_text("\n".join(CLASSES))
    text = refusal("timm", tmp_path, class_map=str(tmp_path / "map.txt"))
    assert "no image in the part 'validation' of the classes dog" in text


def test_timms_torchvision_arrays_are_read_without_decoding(tmp_path, monkeypatch):
    kind = torchvision.datasets.FashionMNIST
    images = torch.randint(256, (20, 28, 28), dtype=torch.uint8)

    def load(self):
        return (images, torch.arange(20) % 10) if self.train else (images[:4], torch.arange(4))

    monkeypatch.setattr(kind, "_load_data", load)
    monkeypatch.setattr(kind, "_check_exists", lambda self: True)
    monkeypatch.setattr(kind, "_check_legacy_exist", lambda self: False)
    splits = build("timm", tmp_path, dataset="torch/fashion_mnist", img_size=None)
    assert splits.image_shape == (1, 28, 28)
    assert splits.class_names == tuple(kind.classes)
    assert torch.equal(splits.train.dataset.dataset.images[:, 0], images)
    assert splits.mean != (0.485, 0.456, 0.406)
    check_ids(splits)
    text = refusal("timm", tmp_path, dataset="torch/fashion_mnist", train_split="tain")
    assert "dat.data.train_split='tain' is the test part of 'torch/fashion_mnist'" in text


def test_nothing_is_downloaded_unless_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torchvision.datasets.MNIST, "download", lambda self: asked.append(self.root)
    )
    text = refusal("timm", tmp_path, dataset="torch/mnist")
    assert "or write dat.data.download=true to fetch its files" in text
    assert asked == []
    refusal("timm", tmp_path, dataset="torch/mnist", download=True)
    assert asked != []


def test_timms_torchvision_folders_are_files(tmp_path):
    write_folders(tmp_path)
    splits = build("timm", tmp_path, dataset="torch/image_folder", test_split="val")
    assert same(splits, build("imagefolder", tmp_path))
    text = refusal("timm", tmp_path, dataset="torch/image_folder", test_split="tst")
    assert "have 12 images in common" in text or "classes of the parts differ" in text


def write_food(root: Path) -> Path:
    """A small Food101, as its archive unpacks."""
    meta, images = root / "food-101" / "meta", root / "food-101" / "images"
    meta.mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        listing = {name: [f"{name}/{part}{i}" for i in range(4)] for name in CLASSES}
        (meta / f"{part}.json").write_text(json.dumps(listing))
        for label, (name, files) in enumerate(listing.items()):
            (images / name).mkdir(parents=True, exist_ok=True)
            for i, file in enumerate(files):
                data = encoded(100 * number + 10 * label + i, "JPEG")
                (images / f"{file}.jpg").write_bytes(data)
    return root


def test_torchvisions_files_are_read_by_the_class_s_name(tmp_path):
    write_food(tmp_path)
    splits = build("torchvision", tmp_path, dataset="food101")
    found = torchvision.datasets.Food101(tmp_path)
    assert splits.class_names == CLASSES == tuple(found.classes)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (12, 12, 3)
    for i in (0, 5, 11):
        file = file_of(splits.train, i)
        assert read_image(file, "").permute(1, 2, 0).tolist() == np.array(found[i][0]).tolist()
        assert splits.train[i][1] == found[i][1]
    check_ids(splits)
    text = refusal("torchvision", tmp_path, dataset="Food101", test_split="validation")
    assert "torchvision cannot open the part 'validation' (Unknown value 'validation'" in text


def test_torchvisions_arrays_are_those_of_the_class(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = np.arange(1, 21)[:, None] % 10 + 1  # 10 stands for the digit 0
    for part in ("train", "test", "extra"):
        pixels = images if part == "train" else 255 - images
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    kind = torchvision.datasets.SVHN
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    splits = build("torchvision", tmp_path, dataset="SVHN", img_size=None)
    found = kind(tmp_path)
    assert splits.image_shape == (3, 32, 32)
    assert torch.equal(splits.train[3][0], torch.from_numpy(found.data[3]) / 255)
    assert [splits.train[i][1] for i in range(20)] == found.labels.tolist()
    check_ids(splits)
    text = refusal("torchvision", tmp_path, dataset="SVHN", train_split="extra")
    assert "both parts are the same images" in text


def test_a_part_of_torchvision_without_classes_is_refused(tmp_path, monkeypatch):
    write_food(tmp_path)
    kind, begin = torchvision.datasets.Food101, torchvision.datasets.Food101.__init__

    def without_labels(self, root, split="train", **options):
        begin(self, root, split, **options)
        self._labels = None if split == "test" else self._labels

    monkeypatch.setattr(kind, "__init__", without_labels)
    assert "a part has images without a class" in refusal(
        "torchvision", tmp_path, dataset="Food101"
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dataset": "Nothing"}, "'Nothing' is not a dataset of torchvision: write the name of"),
        ({"dataset": "EuroSAT"}, "'EuroSAT' has no training and test part in torchvision"),
        ({"dataset": "SVHN"}, "or write dat.data.download=true to fetch its files"),
        ({}, "dataset is missing: 'torchvision' needs the name of a class"),
        ({"dataset": "EMNIST", "options": {"train": True}}, "options.train is not allowed"),
        ({"dataset": "EMNIST", "options": {"split": "x"}}, "Unknown value 'x' for argument split"),
        ({"dataset": "SVHN", "options": {"split": "extra"}}, "is dat.data.train_split and dat.dat"),
        ({"dataset": "QMNIST", "options": {"what": "nist"}}, "options.what is not allowed"),
    ],
)
def test_what_torchvision_cannot_open_is_refused(tmp_path, keys, words):
    assert words in refusal("torchvision", tmp_path, **keys)


@pytest.mark.parametrize("dataset", ["torch/nothing", "hfds/no/such"])
def test_names_that_timm_does_not_know_are_refused(tmp_path, dataset):
    assert f"dat.data.dataset={dataset!r}, dat.data.path=" in refusal(
        "timm", tmp_path, dataset=dataset
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dataset": "wds/a", "path": "p"}, "write dat.data.name='webdataset'"),
        ({"dataset": "tfds/mnist", "path": "p"}, "can only be read from its beginning on"),
        ({}, "dat.data.path is missing: 'timm' needs the folder"),
        ({"path": "p", "test_split": "train"}, "dat.data.test_split='train' is also"),
        ({"path": "p", "dataset": "torch/mnist", "class_map": "m"}, "dat.data.class_map='m' is"),
    ],
)
def test_timm_sections_that_make_no_sense_are_refused(keys, words):
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "dat": {"data": {"name": "timm", **keys}},
    }
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert words in str(caught.value)


# ---- Hugging Face


def rows(count: int, first: int = 0, **more) -> datasets.Dataset:
    kind = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    values = {
        "image": [{"bytes": encoded(first + i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    for name, (feature, column) in more.items():
        kind[name], values[name] = feature, column
    return datasets.Dataset.from_dict(values, features=datasets.Features(kind))


def write_parquet(root: Path, **more) -> Path:
    root.mkdir(exist_ok=True)
    rows(12, **more).to_parquet(root / "train-0.parquet")
    rows(4, 100, **more).to_parquet(root / "test-0.parquet")
    return root


def check_rows(splits, names=CLASSES):
    assert splits.class_names == names
    assert (len(splits.train), len(splits.test)) == (12, 4)
    source = splits.train.dataset.dataset
    assert source.labels.tolist() == [i % 3 for i in range(12)]
    for i in range(12):
        expected = torch.from_numpy(pixels(i)).permute(2, 0, 1)
        assert torch.equal(source.raw(i)[0], expected)


def test_parquet_is_read_from_a_folder_and_by_pattern(tmp_path):
    folder = write_parquet(tmp_path / "data")
    check_rows(found := build("huggingface", folder))
    assert file_of(found.test, 3) == f"{folder}:test:3"
    check_ids(found)
    keys = {
        "train_files": str(folder / "train-*.parquet"),
        "test_files": str(folder / "test-*.parquet"),
    }
    check_rows(build("huggingface", "parquet", **keys))


def test_arrow_and_saved_datasets_are_read(tmp_path):
    parts = {"train": rows(12), "validation": rows(4, 100)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    check_rows(build("huggingface", tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved" / "train").glob("*.arrow")
    (held,) = (tmp_path / "saved" / "validation").glob("*.arrow")
    check_rows(build("huggingface", "arrow", train_files=str(arrow), test_files=str(held)))


def test_folders_of_images_are_those_of_imagefolder(tmp_path):
    write_folders(tmp_path / "data", parts=("train", "test"))
    one = build("huggingface", tmp_path / "data")
    assert same(one, build("imagefolder", tmp_path / "data"))
    file = Path(file_of(one.train, 0).partition("(")[2].rstrip(")"))
    assert torch.equal(one.train.dataset.dataset.raw(0)[0], read_image(str(file), ""))


def test_shards_of_webdataset_are_read_by_the_library_too(tmp_path):
    for part, count in (("train", 12), ("test", 4)):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for i in range(count):
                for name, content in ((f"{i}.png", encoded(i)), (f"{i}.cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    keys = {f"{part}_files": str(tmp_path / f"{part}.tar") for part in ("train", "test")}
    check_rows(build("huggingface", "webdataset", **keys), None)


def test_splits_may_be_slices(tmp_path):
    (folder := tmp_path / "data").mkdir()
    rows(12).to_parquet(folder / "train.parquet")
    text = refusal("huggingface", folder)
    assert "has the splits train: write dat.data.test_split" in text
    keys = {"train_split": "train[:75%]", "test_split": "train[75%:]"}
    splits = build("huggingface", folder, **keys)
    assert (len(splits.train), len(splits.test)) == (9, 3)
    text = refusal("huggingface", folder, test_split="tset")
    assert "has no split 'tset', but train. Write one of them." in text


def test_columns_that_cannot_be_told_are_refused_with_those_there_are(tmp_path):
    more = {
        "fine": (datasets.ClassLabel(names=list("abc")), [0] * 12),
        "depth": (datasets.Image(), [None] * 12),
    }
    (folder := tmp_path / "data").mkdir()
    rows(12, **more).to_parquet(folder / "train.parquet")
    rows(12, **more).to_parquet(folder / "test.parquet")
    text = refusal("huggingface", folder)
    assert "has the columns image, depth of images: write dat.data.image_column" in text
    assert "has the columns label, fine of class labels or integers" in text
    assert (
        "Its columns: image (Image), label (ClassLabel), fine (ClassLabel), depth (Image)." in text
    )
    splits = build("huggingface", folder, image_column="image", label_column="fine")
    assert splits.class_names == ("a", "b", "c")
    text = refusal("huggingface", folder, image_column="imag", label_column="fine")
    assert "dat.data.image_column='imag' is not a column of" in text
    text = refusal("huggingface", folder, image_column="label", label_column="fine")
    assert "dat.data.image_column='label' of" in text
    assert "holds no images but" in text


def test_a_missing_column_is_refused(tmp_path):
    (folder := tmp_path / "data").mkdir()
    for part in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a"], "score": [0.5]}).to_parquet(
            folder / f"{part}.parquet"
        )
    text = refusal("huggingface", folder)
    assert "has no column of images" in text
    assert "has no column of class labels or integers" in text


def test_labels_of_text_need_a_class_map_which_also_reorders(tmp_path):
    (folder := tmp_path / "data").mkdir()
    word = (datasets.Value("string"), [CLASSES[i % 3] for i in range(12)])
    for part in ("train", "test"):
        rows(12, word=word).to_parquet(folder / f"{part}.parquet")
    text = refusal("huggingface", folder, label_column="word")
    assert "labels are integers, or names in dat.data.class_map" in text
    (tmp_path / "map.json").write_text(json.dumps(["owl", "cat", "dog"]))
    for column in ("word", "label"):
        keys = {"label_column": column, "class_map": str(tmp_path / "map.json")}
        splits = build("huggingface", folder, **keys)
        assert splits.class_names == ("owl", "cat", "dog")
        assert splits.test.labels.tolist() == [1, 2, 0] * 4
    (tmp_path / "map.json").write_text(json.dumps(["cat", "dog"]))
    text = refusal(
        "huggingface", folder, label_column="label", class_map=str(tmp_path / "map.json")
    )
    assert "lacks the classes owl" in text


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("huggingface", tmp_path) == (
        "dat.data.name='huggingface' needs the package 'datasets': pip install 'dat-ds[data]'."
    )


def test_the_hub_is_not_asked_without_permission(tmp_path, monkeypatch):
    import socket

    def fail(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    text = refusal("huggingface", "nobody/such-data")
    assert "write dat.data.download=true to fetch it" in text
    assert "network was asked" not in text


def test_rows_of_generated_images_can_be_extra(tmp_path):
    folder = write_parquet(tmp_path / "made")
    write_folders(tmp_path / "real", parts=("train", "test"))
    extra = {"name": "huggingface", "path": str(folder)}
    splits = build("imagefolder", tmp_path / "real", extra=extra, extra_fraction=0.5)
    assert splits.num_extra == 12
    y = [splits.train[i][1] for i in range(len(splits.train))]
    assert y[-12:] == [i % 3 for i in range(12)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_row_is_named(tmp_path, num_workers):
    (folder := tmp_path / "data").mkdir()
    data = rows(6).to_dict()
    data["image"][2]["bytes"] = b"no image"
    data["image"][4] = None
    damaged = datasets.Dataset.from_dict(data, features=rows(1).features)
    for part in ("train", "test"):
        damaged.to_parquet(folder / f"{part}.parquet")
    splits = build("huggingface", folder)
    with pytest.raises(DataError, match=rf"cannot read the image {folder}:train:2 "):
        list(DistributedLoader(splits.train, micro_batch=3, shuffle=False, num_workers=num_workers))
    with pytest.raises(DataError, match=rf"the row {folder}:train:4 has no image"):
        splits.train[4]
    splits = build("huggingface", folder, damaged="skip")
    loader = DistributedLoader(splits.train, micro_batch=3, num_workers=num_workers)
    assert sorted(int(y) for _, ys in loader for y in ys) == [0, 0, 0, 1, 2, 2]
    assert len(loader.take_damaged()) == 2
