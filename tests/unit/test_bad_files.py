"""Files that are none, and data that are not what their headers say, are refused by name."""

from __future__ import annotations

import io
import logging
import os
import pickle
import socket
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dat_ds.commands import carry_out
from dat_ds.config import load_config
from dat_ds.data import build_data
from dat_ds.data.decoding import read_image
from dat_ds.data.unlabelled import image_files
from dat_ds.errors import ConfigError, DataError
from dat_ds.files import check_files, open_regular

pytestmark = pytest.mark.fast


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


OTHERS = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_is_no_file_is_refused_at_every_door(tmp_path: Path, words: str) -> None:
    path = tmp_path / "file.json"
    OTHERS[words](path)
    with pytest.raises(OSError, match=f"It is {words}, not a file"):
        open_regular(path)
    with pytest.raises(ConfigError, match=f"Cannot read the run config .*file.json.*{words}"):
        load_config(path)
    with pytest.raises(DataError, match=f"file.json' is not a readable npz .*{words}"):
        build_data("npz", path=path)
    with pytest.raises(DataError, match=f"key: cannot read the image .*file.json.*{words}"):
        read_image(str(path), "key")


def test_a_socket_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_socket(Path("s"))
    with pytest.raises(DataError, match="cannot read the image s "):
        read_image("s", "key")


def test_every_file_that_could_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_files(output=tmp_path / "numbers.json", csv="here.csv", plot=None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept.csv").touch()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    long = tmp_path / ("n" * 300) / "x.html"  # no file system has such a name
    files = {"output": tmp_path, "csv": tmp_path / "kept.csv", "html": long}
    with pytest.raises(ConfigError) as found:
        check_files(**files)
    assert str(found.value).splitlines() == [
        f"--output {tmp_path} is a folder: name a file.",
        f"--csv {tmp_path / 'kept.csv'} may not be written: name another file.",
        f"--html {long}: there is no folder {str(long.parent)!r}: make it.",
    ]
    monkeypatch.setattr("dat_ds.files.why_unwritable", lambda folder: "No space left on device")
    with pytest.raises(ConfigError, match=r"cannot be written .No space left on device.: name an"):
        check_files(plot=tmp_path / "new.png")


def test_a_config_larger_than_any_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="more than 16777216 bytes"):
        load_config(path)
    with pytest.raises(ConfigError, match="The run config: 2000 entries"):
        load_config({f"key{i}": 1 for i in range(2000)})


# ---- arrays


def write(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def array(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value, **options)
    return stream.getvalue()


def with_header(descr: str, shape: str, content: bytes) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


PARTS = {
    "x_train": array(np.zeros((12, 4, 4), np.uint8)),
    "y_train": array(np.arange(12) % 2),
    "x_test": array(np.zeros((4, 4, 4), np.uint8)),
    "y_test": array(np.arange(4) % 2),
}


def test_a_header_that_claims_terabytes_is_compared_with_the_file(tmp_path: Path) -> None:
    claims = with_header("|u1", "(64000000000000, 4, 4)", bytes(100))
    path = write(tmp_path / "a.npz", {**PARTS, "x_train": claims})
    with pytest.raises(DataError, match=r"x_train.npy has a header of uint8 .* and 100 bytes"):
        build_data("npz", path=path)


class Harmful:
    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    objects = array(np.array([Harmful()] * 12, dtype=object), allow_pickle=True)
    path = write(tmp_path / "a.npz", {**PARTS, "y_train": objects})
    with pytest.raises(DataError, match=r"a.npz' is not a readable npz file.*pickle"):
        build_data("npz", path=path)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(DataError, match=r"a.npz' is not a readable npz file"):
        build_data("npz", path=path)


@pytest.mark.parametrize("label", [10**9, 2**62])
def test_labels_that_would_be_a_billion_classes_are_refused(tmp_path: Path, label: int) -> None:
    labels = array(np.full(12, label))
    path = write(tmp_path / "a.npz", {**PARTS, "y_train": labels})
    with pytest.raises(DataError, match=rf"train part of .*a.npz run from {label} .*from 0, one"):
        build_data("npz", path=path)


def test_more_images_than_memory_is_one_message() -> None:
    with pytest.raises(DataError, match=r"dat.data.name='synthetic': the images do not fit"):
        build_data("synthetic", num_train=2**31 - 1, image_shape=(3, 10**6, 10**6))


# ---- images


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def folder(root: Path) -> Path:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            for i in range(2):
                save(root / part / label / f"{i}.png", Image.new("RGB", (8, 8), (i, 2, 3)))
    return root


def test_a_png_with_other_bytes_than_were_written_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(pixels))
    whole = path.read_bytes()
    start = whole.index(b"IDAT") + 4
    damaged = bytearray(whole)
    data = bytearray(zlib.compress(bytes(len(pixels) * (1 + 120)), 9))
    damaged[start : start + len(data)] = data  # a whole stream, of other pixels
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"cannot read the image .*a.png"):
        read_image(str(path), "key")


def test_a_line_of_pixels_is_not_blown_up(tmp_path: Path) -> None:
    root = folder(tmp_path)
    save(root / "test" / "cat" / "0.png", Image.new("L", (100_000, 1)))
    data = build_data("imagefolder", path=root, validation_fraction=0)
    with pytest.raises(DataError, match=r"0.png has 1 x 100000 pixels: .* Crop it, or remove it"):
        data.test[0]


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path)
    shut = str(root / "train" / "cat")
    real = os.scandir

    def refuses(path: Any = ".") -> Any:
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", shut)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match=rf"cannot read the folder {shut} \(Permission denied\)"):
        build_data("imagefolder", path=root)


def test_links_that_lead_back_are_named_and_others_followed(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    more = save(tmp_path / "elsewhere" / "x.png", Image.new("L", (8, 8)))
    (root / "train" / "cat" / "more").symlink_to(more.parent, target_is_directory=True)
    assert len(image_files(root / "train", "key")) == 5
    for name in ("again", "once more"):
        (root / "train" / "cat" / name).symlink_to(root / "train", target_is_directory=True)
    with pytest.raises(DataError, match=r"key: the symbolic link .*train/cat/(again|once more) "):
        image_files(root / "train", "key")


# ---- what costs much


def test_attacks_of_very_many_passes_are_noted() -> None:
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
    attack = {"name": "pgd", "steps": 101, "restarts": 5}
    evaluation = {"attacks": ["square-5000", "pgd-20000"]}
    run = load_config({**optimizer, "dat": {"attack": attack, "evaluation": evaluation}})
    assert [note for note in run.notes if "passes" in note] == [
        "dat.attack: 101 steps x 5 restarts are 505 passes of the model for every batch",
        "dat.evaluation: 'pgd-20000': 20000 steps x 1 restarts are 20000 passes of the model for "
        "every batch",
    ]
    assert not load_config({**optimizer, "dat": {}}).notes


def test_a_lack_of_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def takes_too_much() -> int:
        torch.empty(2**60)
        return 0

    assert carry_out(takes_too_much) == 1
    logging.getLogger("dat_ds").handlers.clear()
    message = capsys.readouterr().err
    assert message.startswith("dat-ds: error: Out of memory: ")
    assert message.count("\n") == 1

    def fails_otherwise() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        carry_out(fails_otherwise)
