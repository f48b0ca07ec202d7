"""Claims about webdataset's shards: what they read as, in any order, and what is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dat_ds.data import DistributedLoader, build_data, evaluation_batches, file_of
from dat_ds.data.decoding import read_image
from dat_ds.data.readers.webdataset import expand_braces
from dat_ds.errors import DamagedImageError, DataError


def encoded(seed: int, suffix: str = "PNG", size=(20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, suffix)
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int, classes: int = 3, kind: str = "cls") -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for i in range(first, first + count):
        suffix = ("png", "jpg", "webp")[i % 3]
        files[f"d/{i:04d}.{suffix}"] = encoded(i, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        label = i % classes
        files[f"d/{i:04d}.{kind}"] = (
            str(label) if kind == "cls" else json.dumps({"label": label, "more": [1]})
        ).encode()
    return files


def write_set(root: Path, kind: str = "cls", per_shard: int = 5) -> Path:
    for number in range(3):
        files = samples(number * per_shard, per_shard, kind=kind)
        write_tar(root / f"train-{number:03d}.tar", files)
    write_tar(root / "val-000.tar", samples(100, 4, kind=kind))
    return root


def data_of(root: Path, **keys):
    return build_data("webdataset", path=root, img_size=16, **{"validation_fraction": 0, **keys})


def refusal(root: Path, **keys) -> str:
    with pytest.raises(DataError) as caught:
        data_of(root, **keys)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_shards_read_as_the_files_in_them(tmp_path: Path, kind: str) -> None:
    splits = data_of(write_set(tmp_path, kind), augment="none")
    assert (len(splits.train), len(splits.test), splits.num_classes) == (15, 4, 3)
    source = splits.train.dataset.dataset
    assert source.labels.tolist() == [i % 3 for i in range(15)]
    for i in range(15):
        name = f"{i:04d}.{('png', 'jpg', 'webp')[i % 3]}"
        (tmp_path / name).write_bytes(samples(i, 1)[f"d/{name}"])
        assert torch.equal(source.raw(i)[0], read_image(str(tmp_path / name), ""))
        assert file_of(splits.train, i) == f"{tmp_path}/train-{i // 5:03d}.tar:d/{name}"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_is_read_once_an_epoch_on_any_ranks_and_after_a_resume(tmp_path, ranks):
    splits = data_of(write_set(tmp_path))

    def loader(rank):
        workers = 1 if ranks == 2 else 0
        return DistributedLoader(
            splits.train, micro_batch=6 // ranks, rank=rank, ranks=ranks, num_workers=workers
        )

    for epoch in range(2):
        seen = []
        for rank in range(ranks):
            first, second = loader(rank), loader(rank)
            first.set_position(epoch, 0)
            for _, y in first:
                seen += first.plan.indices
                assert y.tolist() == [i % 3 for i in first.plan.indices]
                if first.plan.step == 1:
                    break
            second.load_state_dict(first.state_dict())
            for _ in second:
                seen += second.plan.indices
        assert sorted(seen) == list(range(15))


def test_patterns_expand_as_in_a_shell():
    assert list(expand_braces("a.tar")) == ["a.tar"]
    assert list(expand_braces("t-{08..11}.tar")) == [f"t-{n:02d}.tar" for n in range(8, 12)]
    assert list(expand_braces("{a,b}{2..1}")) == ["a2", "a1", "b2", "b1"]
    assert list(expand_braces("{9..10}")) == ["9", "10"]
    assert list(expand_braces("{x")) == ["{x"]


def test_named_shards_alone_are_read(tmp_path):
    write_set(tmp_path)
    splits = data_of(tmp_path, train_shards="train-{000..001}.tar", test_shards="train-002.tar")
    assert (len(splits.train), len(splits.test)) == (10, 5)
    text = refusal(tmp_path, train_shards="train-{001..004}.tar")
    assert f"names 2 file(s) that are not there: {tmp_path}/train-003.tar" in text
    text = refusal(tmp_path, test_shards="t?st.tar")
    assert text.startswith("dat.data.test_shards: there is no file t?st.tar in dat.data.path=")


def test_labels_may_be_names_of_a_class_map(tmp_path):
    names = ["owl", "cat", "dog"]
    files = {"1.png": encoded(1), "1.cls": b"cat", "2.png": encoded(2), "2.cls": b"2\n"}
    write_tar(tmp_path / "train.tar", files)
    write_tar(tmp_path / "test.tar", files)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    splits = data_of(tmp_path, class_map=str(tmp_path / "names.txt"))
    assert splits.class_names == tuple(names)
    assert splits.train.dataset.dataset.labels.tolist() == [1, 2]
    (tmp_path / "names.txt").write_text("owl\ncat\n")
    assert "has 2 names, but the labels in" in refusal(
        tmp_path, class_map=str(tmp_path / "names.txt")
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"1.png": b"x"}, "the sample of 1.png in the shard {p} has no label (cls or json)"),
        ({"1.cls": b"0"}, "has no image among its extensions cls"),
        (
            {"1.png": b"x", "1.jpg": b"x", "1.cls": b"0"},
            "has jpg and png image among its extensions cls, jpg, png: write "
            "dat.data.image_extension",
        ),
        ({"1.png": b"x", "1.cls": b"cat"}, "1.cls in the shard {p} holds 'cat', which is not a "),
        ({"1.png": b"x", "1.cls": b"-1"}, "they must be 0 or more"),
        ({"1.png": b"x", "1.json": b"[]"}, "1.json in the shard {p} is not a JSON object with "),
        ({"1.png": b"x", "1.json": b'{"label": null}'}, "holds 'None', which is not a label"),
        (
            [("1.png", b"x"), ("1.cls", b"0"), ("2.png", b"x"), ("2.cls", b"0"), ("1.txt", b"")],
            "the files of the sample 1 in the shard {p} do not stand side by side",
        ),
        ([("1.png", b"x"), ("1.png", b"x")], "1.png is twice in the shard {p}"),
        ({}, "There is no sample in {p}"),
        ({"README": b"x"}, "There is no sample in {p}"),
    ],
)
def test_samples_that_are_none_are_refused(tmp_path, files, words):
    shard = write_tar(tmp_path / "train.tar", files)
    write_tar(tmp_path / "test.tar", samples(0, 2))
    assert words.format(p=shard) in refusal(tmp_path)


@pytest.mark.parametrize("cut", [100, 700, 1500, "end"])
def test_a_shard_that_is_cut_short_is_refused(tmp_path, cut):
    write_set(tmp_path)
    shard = tmp_path / "train-001.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + 512  # the last label, padded: a cut between two samples
    shard.write_bytes(content[: end if cut == "end" else cut])
    text = refusal(tmp_path)
    assert str(shard) in text
    assert "cut short" in text or "not a tar file that can be read in any order" in text


def test_compressed_shards_are_refused(tmp_path):
    write_set(tmp_path)
    with tarfile.open(tmp_path / "train-001.tar", "w:gz"):
        pass
    assert "if it is compressed, unpack it" in refusal(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("harm", ["gone", "shrunk", "other"])
def test_a_shard_that_changes_under_a_run_is_named(tmp_path, harm, num_workers):
    splits = data_of(write_set(tmp_path))
    shard = tmp_path / "train-001.tar"
    if harm == "gone":
        shard.unlink()
    elif harm == "shrunk":
        os.truncate(shard, 4096)
    else:
        write_tar(shard, samples(50, 5))
        os.utime(shard, ns=(0, 0))
    loader = DistributedLoader(splits.train, micro_batch=5, num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    text = str(caught.value)
    assert text.startswith(f"dat.data.path: the shard {shard} ")
    assert {"gone": "cannot be read any more", "shrunk": "has 4096 bytes"}.get(harm, "") in text
    assert "--resume auto" in text
    assert not isinstance(caught.value, DamagedImageError), "no image stands for a lost shard"


def test_a_damaged_image_is_named_with_its_shard(tmp_path):
    files = samples(0, 3) | {"d/0001.jpg": b"no image"}
    write_tar(tmp_path / "train.tar", samples(0, 3))
    shard = write_tar(tmp_path / "test.tar", files)
    with pytest.raises(DamagedImageError, match=f"cannot read the image {shard}:d/0001.jpg"):
        list(evaluation_batches(data_of(tmp_path).test, batch_size=3))


def test_a_generated_set_in_shards_can_be_extra(tmp_path):
    write_set(tmp_path / "real")
    write_set(tmp_path / "made")
    splits = data_of(
        tmp_path / "real",
        extra={"name": "webdataset", "path": str(tmp_path / "made")},
        extra_fraction=0.5,
    )
    assert splits.num_extra == 15
    (tmp_path / "made" / "train-000.tar").unlink()
    with pytest.raises(DataError, match=r"^dat.data.extra.path: the shard .*made/train-000.tar"):
        list(DistributedLoader(splits.train, micro_batch=10))
