"""Damaged data files are refused by name or read rightly: no traceback, no hang, no other pixels.

Small files of every reader are damaged byte by byte, in their headers, and as things of the file
system. The long form, with a table: ``python -m tests.properties.test_reader_fuzz 2000``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import socket
import struct
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

from dat_ds.data import build_data
from dat_ds.errors import DataError
from tests.isolation import Outcome, isolated, where

SHORT, BATCH, SECONDS = 60, 50, 60.0
UNPRIVILEGED = 65534
Random = random.Random
Pixels = np.ndarray[Any, Any]

# ---- whole files


def pixels(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def arrays() -> dict[str, Pixels]:
    return {
        "x_train": pixels(12, 6, 5, 3),
        "y_train": np.arange(12) % 3,
        "x_test": pixels(6, 6, 5, 3),
        "y_test": np.arange(6) % 3,
    }


def write_npz(folder: Path) -> dict[str, Any]:
    np.savez(folder / "data.npz", **arrays())
    return {"name": "npz", "path": str(folder / "data.npz")}


def write_compressed(folder: Path) -> dict[str, Any]:
    np.savez_compressed(folder / "data.npz", **arrays())
    return {"name": "npz", "path": str(folder / "data.npz")}


def write_images(folder: Path, suffix: str, **options: Any) -> None:
    for part, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            place = folder / part / label
            place.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(pixels(9 + i, 8, 3))
                image.save(place / f"{i}.{suffix}", **options)


def folder_of(suffix: str, **options: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        write_images(folder, suffix, **options)
        return {"name": "imagefolder", "path": str(folder), "img_size": 7}

    return write


def write_unlabelled(folder: Path) -> dict[str, Any]:
    np.savez(folder / "data.npz", images=pixels(6, 8, 8))
    return {"name": "digits", "unlabelled_path": str(folder / "data.npz")}


def write_cifar(folder: Path) -> dict[str, Any]:
    kind = torchvision.datasets.CIFAR10
    place = folder / kind.base_folder
    place.mkdir()
    for name, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]:
        (place / name).write_bytes(pixels(500).tobytes())
    return {"name": "cifar10", "path": str(folder)}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "npz": write_npz,
    "npz, compressed": write_compressed,
    "imagefolder, PNG": folder_of("png"),
    "imagefolder, JPEG": folder_of("jpg"),
    "imagefolder, BMP": folder_of("bmp"),
    "imagefolder, TIFF": folder_of("tif", compression="tiff_lzw"),
    "imagefolder, WebP": folder_of("webp", lossless=True),
    "imagefolder, PPM": folder_of("ppm"),
    "unlabelled npz": write_unlabelled,
    "cifar10": write_cifar,
}
CHECKED = ("npz", "npz, compressed", "imagefolder, PNG", "unlabelled npz", "cifar10")
"""Formats with checksums: other pixels than were written are a fault there."""

# ---- damages: each takes a file and says what it did


def flip(file: Path, rng: Random) -> str:
    content = bytearray(file.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 4, 40]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bits flipped at {places[:4]}"


def flip_in_the_header(file: Path, rng: Random) -> str:
    content = bytearray(file.read_bytes())
    places = [rng.randrange(min(120, len(content))) for _ in range(rng.choice([1, 2, 6]))]
    for place in places:
        content[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    file.write_bytes(content)
    return f"header bytes {places} changed"


def cut(file: Path, rng: Random) -> str:
    content = file.read_bytes()
    left = rng.choice([0, 1, 7, len(content) - 1, rng.randrange(len(content))])
    file.write_bytes(content[:left])
    return f"cut to {left} bytes"


def blank(file: Path, rng: Random) -> str:
    content = bytearray(file.read_bytes())
    start, length = rng.randrange(len(content)), rng.choice([4, 64, 4096])
    content[start : start + length] = bytes(len(content[start : start + length]))
    file.write_bytes(content)
    return f"{length} zeros from {start}"


def junk_behind(file: Path, rng: Random) -> str:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice([1, 100, 100_000])))
    return "junk behind"


def replaced(make: Callable[[Path], object], words: str) -> Callable[[Path, Random], str]:
    def damage(file: Path, rng: Random) -> str:
        del rng
        file.unlink()
        make(file)
        return words

    return damage


def make_socket(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(file.name)
    os.chdir(here)


def make_sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


def forbid(file: Path, rng: Random) -> str:
    place = rng.choice([file, file, file.parent])
    place.chmod(0)
    return f"no permission for {'the file' if place == file else 'its folder'}"


def link_back(file: Path, rng: Random) -> str:
    del rng
    (file.parent / "again").symlink_to(file.parent, target_is_directory=True)
    (file.parent / "once more").symlink_to(file.parent, target_is_directory=True)
    return "links to the folder itself"


def rename(file: Path, rng: Random) -> str:
    name = rng.choice(["Ä\U0001f600" + file.suffix, "a\nb" + file.suffix, "x" * 200 + file.suffix])
    file.rename(file.with_name(name))
    return f"named {name[:10]!r}"


def edit_npz(file: Path, rng: Random) -> str:
    """Arrays that are whole, and wrong."""
    with np.load(file) as kept:
        content = dict(kept)
    key = rng.choice(list(content))
    value = content[key]
    changes: dict[str, Callable[[], Any]] = {
        "labels of 10^9": lambda: np.full(len(value), 10**9),
        "labels of 2^62": lambda: np.full(len(value), 2**62),
        "labels beyond 2^63": lambda: np.full(len(value), 2**64 - 1, np.uint64),
        "negative labels": lambda: np.full(len(value), -5),
        "NaN": lambda: np.full(value.shape, np.nan),
        "objects": lambda: np.array([{"a": 1}] * len(value), dtype=object),
        "text": lambda: np.array(["a"] * len(value)),
        "dates": lambda: np.zeros(len(value), "datetime64[s]"),
        "records": lambda: np.zeros(len(value), [("a", "i4")]),
        "complex": lambda: value.astype(complex),
        "no dimension": lambda: np.array(3),
        "nothing": lambda: value[:0],
        "half of it": lambda: value[: len(value) // 2],
        "nine dimensions": lambda: value.reshape(*value.shape, *[1] * (9 - value.ndim)),
        "no pixel": lambda: np.zeros((len(value), 0, 5, 3), np.uint8),
        "big-endian": lambda: value.astype(value.dtype.newbyteorder(">")),
        "Fortran order": lambda: np.asfortranarray(value),
    }
    what = rng.choice(list(changes))
    content[key] = changes[what]()
    np.savez(file, **content)
    return f"{key} is {what}"


def edit_npz_header(file: Path, rng: Random) -> str:
    """A header that claims something else than what follows, in an archive that is whole."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    shape = rng.choice(
        ["(64000000000000,)", "(-1,)", "(1" + "0" * 5000 + ",)", "(" * 300, "()", "(3, 4)", "[1]"]
    )
    kind = rng.choice(["|u1", "<i8", "|O", "<f8", "|V9999999999", "?", "\0", "<U9999999"])
    header = f"{{'descr': {kind!r}, 'fortran_order': {rng.choice([0, True, False])}, 'shape': "
    text = (header + shape + ", }").encode("latin1")
    version = rng.choice([(1, 0), (2, 0), (3, 0), (9, 9)])
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    members[name] = b"\x93NUMPY" + bytes(version) + size + text + members[name][128:]
    with zipfile.ZipFile(file, "w", rng.choice([0, 8, 12, 14])) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return f"{name} has a header of {kind} {shape[:20]}"


def edit_png_size(file: Path, rng: Random) -> str:
    """Another width and height, with the checksum that goes with them."""
    content = bytearray(file.read_bytes())
    size = rng.choice([(60_000, 60_000), (2**31 - 1, 1), (0, 8), (8, 1000), (1, 1), (8000, 8000)])
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)
    return f"{size[0]} x {size[1]} pixels in its header"


def other_image(file: Path, rng: Random) -> str:
    """A whole image of another kind under the same name."""
    grey = pixels(8, 8)
    kinds: dict[str, Callable[[io.BytesIO], None]] = {
        "CMYK JPEG": lambda s: Image.fromarray(pixels(8, 8, 3)).convert("CMYK").save(s, "JPEG"),
        "palette PNG": lambda s: Image.fromarray(grey).convert("P").save(s, "PNG"),
        "16-bit PNG": lambda s: Image.fromarray(grey.astype(np.uint16) * 257).save(s, "PNG"),
        "animated GIF": lambda s: Image.fromarray(grey).save(
            s, "GIF", save_all=True, append_images=[Image.fromarray(255 - grey)]
        ),
        "animated PNG": lambda s: Image.fromarray(grey).save(
            s, "PNG", save_all=True, append_images=[Image.fromarray(255 - grey)]
        ),
        "animated WebP": lambda s: Image.fromarray(pixels(8, 8, 3)).save(
            s, "WEBP", save_all=True, append_images=[Image.fromarray(255 - pixels(8, 8, 3))]
        ),
        "transparent PNG": lambda s: Image.fromarray(pixels(8, 8, 4), "RGBA").save(s, "PNG"),
        "line of 60000 pixels": lambda s: Image.fromarray(pixels(1, 60_000)).save(s, "PNG"),
        "12 million pixels": lambda s: Image.new("RGB", (4000, 3000)).save(s, "PNG"),
        "400 million pixels": lambda s: Image.new("1", (20_000, 20_000)).save(s, "PNG"),
        "PDF": lambda s: Image.fromarray(grey).save(s, "PDF"),
        "ICO": lambda s: Image.fromarray(grey).save(s, "ICO"),
        "float TIFF": lambda s: Image.fromarray(grey.astype(np.float32)).save(s, "TIFF"),
        "PostScript": lambda s: Image.fromarray(grey).save(s, "EPS"),
    }
    what = rng.choice(list(kinds))
    stream = io.BytesIO()
    kinds[what](stream)
    file.write_bytes(stream.getvalue())
    return f"a {what} in its place"


BYTES = [flip, flip, flip, flip_in_the_header, flip_in_the_header, cut, cut, blank, junk_behind]
THINGS = [
    replaced(os.mkfifo, "a FIFO in its place"),
    replaced(make_socket, "a socket in its place"),
    replaced(Path.mkdir, "a folder in its place"),
    replaced(lambda file: file.symlink_to(file), "a link to itself"),
    replaced(lambda file: file.symlink_to("nowhere"), "a dangling link"),
    replaced(lambda file: file.symlink_to("/dev/zero"), "a device in its place"),
    replaced(make_sparse, "a sparse TiB in its place"),
    forbid,
    link_back,
    rename,
]


def damages_of(reader: str) -> list[Callable[[Path, Random], str]]:
    own: list[Callable[[Path, Random], str]] = []
    if "npz" in reader:
        own = [edit_npz, edit_npz, edit_npz_header, edit_npz_header]
    elif "imagefolder" in reader:
        own = [other_image, other_image, *([edit_png_size] if "PNG" in reader else [])]
    return [*BYTES, *THINGS, *own * 2]


# ---- one case


def digest(options: dict[str, Any]) -> str:
    """All pixels and labels that a dataset gives."""
    splits = build_data(options.pop("name"), **options)
    found = hashlib.sha256(repr((splits.num_classes, splits.mean, splits.std)).encode())
    for split in (splits.train, splits.validation, splits.test):
        for i in range(len(split)):  # type: ignore[arg-type]
            x, y = split[i]
            if not (x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1):
                raise AssertionError(f"pixels from {x.min()} to {x.max()}")
            found.update(x.numpy().tobytes() + str(y).encode())
    return found.hexdigest()


def case(seed: int) -> tuple[str, str, str]:
    """Reader, outcome and words of one damage."""
    rng = Random(seed)
    reader = rng.choice(list(READERS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        options = READERS[reader](folder)
        whole = "" if reader == "cifar10" else digest(dict(options))
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        file = rng.choice(files)
        damage = rng.choice(damages_of(reader))
        story = f"seed {seed}: {reader}: {file.relative_to(folder)}: {damage(file, rng)}"
        try:
            with unprivileged() if "no permission" in story else contextlib.nullcontext():
                kind, words = judged(reader, options, whole, file)
        finally:
            for place in (file.parent, file):  # so that the folder can be removed
                if os.path.lexists(place) and not place.is_symlink():
                    place.chmod(0o700)
    return reader, kind, f"{story}: {words}"


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Inside, this process is not a superuser, whom no permission keeps out."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(user)


def judged(reader: str, options: dict[str, Any], whole: str, file: Path) -> Outcome:
    path = options.get("path") or options["unlabelled_path"]
    try:
        found = digest(dict(options))
    except DataError as error:
        text = str(error)
        named = str(file) in text or str(file.parent) in text or path in text
        if "imagefolder" in reader and re.search(r"cannot read the image|has mode|holds", text):
            named = str(file.parent) in text
        if not named:
            return "file not named", text
        return "refused", text
    except Exception as error:
        return "traceback", where(error)
    if found == whole:
        return "read as written", ""
    return "read otherwise", ""


def cases(seeds: list[int]) -> Outcome:
    """Cases one after another, in words that :func:`tried` takes apart."""
    return "done", json.dumps([case(seed) for seed in seeds])


@dataclasses.dataclass
class Table:
    """What became of the files, by reader."""

    outcomes: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)

    def add(self, reader: str, kind: str, story: str) -> None:
        self.outcomes.setdefault(reader, Counter())[kind] += 1
        changed = kind == "read otherwise" and reader in CHECKED and not meant(story)
        if changed or kind not in ("refused", "read as written", "read otherwise"):
            self.faults.append(f"{kind}: {story}")

    def __str__(self) -> str:
        kinds = sorted({kind for counts in self.outcomes.values() for kind in counts})
        lines = [" | ".join(["reader", *kinds])]
        for reader, counts in sorted(self.outcomes.items()):
            lines.append(" | ".join([reader, *(str(counts[kind]) for kind in kinds)]))
        total = sum(counts.total() for counts in self.outcomes.values())
        return "\n".join([*lines, f"{total} files, {len(self.faults)} faults", *self.faults])


def meant(story: str) -> bool:
    """Whether the data are others and whole, so that reading them otherwise is right."""
    return any(words in story for words in (" is ", "in its place", "in its header", "named"))


def tried(count: int, first: int = 0) -> Table:
    table = Table()
    for start in range(first, first + count, BATCH):
        seeds = list(range(start, min(start + BATCH, first + count)))
        for group in parted(seeds):
            for found in group:
                table.add(*found)
    return table


def parted(seeds: list[int]) -> Iterator[list[tuple[str, str, str]]]:
    """The outcomes of seeds; one by one where all together do not come back."""
    kind, words = isolated(cases, seeds, seconds=SECONDS if len(seeds) == 1 else 4 * SECONDS)
    if kind == "done":
        yield [tuple(found) for found in json.loads(words)]
    elif len(seeds) == 1:
        yield [("any", kind, f"seed {seeds[0]}: {words}")]
    else:
        for seed in seeds:
            yield from parted([seed])


def test_a_damaged_file_is_refused_by_name_or_read_rightly() -> None:
    table = tried(SHORT)
    assert not table.faults, str(table)
    kinds = sum(table.outcomes.values(), Counter())
    assert kinds["refused"] > SHORT // 4, "the damages break something"
    assert kinds["read as written"] > 0, "some files stay whole"


if __name__ == "__main__":
    print(tried(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
