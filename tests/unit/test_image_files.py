"""Every kind of image file is converted exactly, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dat_ds.data import FolderImages, build_data, evaluation_batches
from dat_ds.data.decoding import read_image
from dat_ds.data.transforms import AUGMENTATIONS
from dat_ds.data.unlabelled import IMAGE_SUFFIXES
from dat_ds.errors import DataError

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (3, 4), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (3, 4, 3), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (3, 4), dtype=np.uint16)
UNIT = RANDOM.random((3, 4), dtype=np.float32)
PALETTE = RANDOM.integers(0, 256, (4, 3), dtype=np.uint8)
INDICES = np.array([[0, 1, 2, 1], [2, 1, 0, 0], [1, 2, 2, 0]], dtype=np.uint8)  # never 3
ROTATED_A_QUARTER = Image.Exif()
ROTATED_A_QUARTER[0x0112] = 6


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def of(pixels: np.ndarray[Any, Any], mode: str | None = None) -> Image.Image:
    image = Image.fromarray(pixels)
    if mode in ("LA", "CMYK", "YCbCr"):  # bands, where fromarray would guess others
        return Image.merge(mode, [Image.fromarray(band) for band in np.moveaxis(pixels, 2, 0)])
    return image


def palette_image() -> Image.Image:
    image = Image.fromarray(INDICES).convert("P")
    image.putdata(INDICES.flatten().tolist())
    image.putpalette(PALETTE.flatten().tolist())
    return image


def png(rows: np.ndarray[Any, Any], bits: int, colour: int, transparent: bytes = b"") -> bytes:
    """A PNG file of raw rows, of kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    width = rows.shape[1] * 8 // bits // channels * rows.itemsize
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(
    data: bytes, size: tuple[int, int], bits: list[int], photometric: int, **more: int
) -> bytes:
    """An uncompressed little-endian TIFF file; ``more`` has tags as ``t339=2``."""
    width, height = size
    tags = {256: [width], 257: [height], 258: bits, 259: [1], 262: [photometric]}
    tags |= {273: [0], 277: [len(bits)], 278: [height], 279: [len(data)]}
    tags |= {int(key[1:]): [value] for key, value in more.items()}
    if tags.get(284) == [2]:  # one strip for each channel
        part = len(data) // len(bits)
        tags[273], tags[279] = [0] * len(bits), [part] * len(bits)
    end = 8 + 2 + 12 * len(tags) + 4
    extra = b""
    lists = {k: struct.pack(f"<{len(v)}I", *v) for k, v in tags.items() if len(v) > 1}
    start = end + sum(len(v) for v in lists.values())
    strips = len(tags[273])
    tags[273] = [start + i * len(data) // strips for i in range(strips)]
    if strips > 1:
        lists[273] = struct.pack(f"<{strips}I", *tags[273])
    entries = b""
    for key in sorted(tags):
        value = struct.pack("<I", tags[key][0])
        if key in lists:
            value = struct.pack("<I", end + len(extra))
            extra += lists[key]
        entries += struct.pack("<HHI", key, 4, len(tags[key])) + value
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + extra + data


def alpha(pixels: np.ndarray[Any, Any], value: int) -> np.ndarray[Any, Any]:
    """Pixels with an alpha channel of 255 but in one place."""
    channel = np.full((3, 4, 1), 255, np.uint8)
    channel[1, 2] = value
    return np.concatenate([pixels.reshape(3, 4, -1), channel], axis=2)


def twelve_bits(values: np.ndarray[Any, Any]) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())


BIG_ENDIAN = DEEP.astype(">u2")
TWO_BITS = np.array([[0b00011011], [0b11100100], [0b00000000]], dtype=np.uint8)
MIXED = PALETTE[INDICES]

EXACT: dict[str, tuple[bytes, np.ndarray[Any, Any]]] = {
    "1-bit PNG": (saved(of(GREY > 127), "PNG"), (GREY > 127) * np.uint8(255)),
    "1-bit PBM": (saved(of(GREY > 127), "PPM"), (GREY > 127) * np.uint8(255)),
    "2-bit grey PNG": (
        png(TWO_BITS, 2, 0),
        np.array([[0, 85, 170, 255], [255, 170, 85, 0], [0] * 4], np.uint8),
    ),
    "grey PNG": (saved(of(GREY), "PNG"), GREY),
    "grey BMP": (saved(of(GREY), "BMP"), GREY),
    "grey TIFF, white as 0": (tiff((255 - GREY).tobytes(), (4, 3), [8], 0), GREY),
    "palette PNG": (saved(palette_image(), "PNG"), MIXED),
    "palette PNG whose transparent colour is unused": (
        saved(palette_image(), "PNG", transparency=3),
        MIXED,
    ),
    "GIF": (saved(palette_image(), "GIF"), MIXED),
    "RGB PNG": (saved(of(COLOUR), "PNG"), COLOUR),
    "RGB PNG whose transparent colour is unused": (
        png(np.zeros((3, 12), np.uint8), 8, 2, struct.pack(">3H", 0, 0, 1)),
        np.zeros((3, 4, 3), np.uint8),
    ),
    "RGB BMP": (saved(of(COLOUR), "BMP"), COLOUR),
    "RGB PPM": (saved(of(COLOUR), "PPM"), COLOUR),
    "RGB TIFF": (saved(of(COLOUR), "TIFF"), COLOUR),
    "RGB TIFF, LZW": (saved(of(COLOUR), "TIFF", compression="tiff_lzw"), COLOUR),
    "RGB TIFF, channel by channel": (
        tiff(np.moveaxis(COLOUR, 2, 0).tobytes(), (4, 3), [8] * 3, 2, t284=2),
        COLOUR,
    ),
    "RGB WebP": (saved(of(COLOUR), "WEBP", lossless=True), COLOUR),
    "opaque RGBA PNG": (saved(of(alpha(COLOUR, 255)), "PNG"), COLOUR),
    "opaque RGBA TIFF, premultiplied": (
        tiff(alpha(COLOUR, 255).tobytes(), (4, 3), [8] * 4, 2, t338=1),
        COLOUR,
    ),
    "opaque grey and alpha PNG": (saved(of(alpha(GREY, 255), "LA"), "PNG"), GREY),
    "opaque grey and alpha TIFF, premultiplied": (
        tiff(alpha(GREY, 255).tobytes(), (4, 3), [8] * 2, 1, t338=1),
        GREY,
    ),
    "opaque RGBA WebP": (saved(of(alpha(COLOUR, 255)), "WEBP", lossless=True), COLOUR),
    "CMYK TIFF without black": (
        saved(of(np.dstack([255 - COLOUR, 0 * GREY]), "CMYK"), "TIFF"),
        COLOUR,
    ),
    "CMYK TIFF of black": (
        saved(of(np.dstack([COLOUR, 0 * GREY + 255]), "CMYK"), "TIFF"),
        0 * COLOUR,
    ),
    "16-bit grey PNG": (png(BIG_ENDIAN, 16, 0), DEEP / np.float32(65535)),
    "16-bit grey PNG by Pillow": (saved(of(DEEP), "PNG"), DEEP / np.float32(65535)),
    "16-bit grey PNG on its side": (
        saved(of(DEEP), "PNG", exif=ROTATED_A_QUARTER),
        np.rot90(DEEP, -1) / np.float32(65535),
    ),
    "16-bit grey TIFF": (saved(of(DEEP), "TIFF"), DEEP / np.float32(65535)),
    "16-bit grey TIFF, LZW": (
        saved(of(DEEP), "TIFF", compression="tiff_lzw"),
        DEEP / np.float32(65535),
    ),
    "16-bit PGM": (
        b"P5 4 3 65535\n" + BIG_ENDIAN.tobytes(),
        DEEP / np.float32(65535),
    ),
    "12-bit grey TIFF": (
        tiff(twelve_bits(DEEP >> 4), (4, 3), [12], 1),
        (DEEP >> 4) / np.float32(4095),
    ),
    "float TIFF": (saved(of(UNIT), "TIFF"), UNIT),
}

OUTSIDE = UNIT.copy()
OUTSIDE[1, 2] = 1.5
NEGATIVE, MISSING = OUTSIDE - 1.25, UNIT.copy()
MISSING[1, 2] = np.nan
TWO = {"save_all": True, "append_images": [of(255 - COLOUR)]}
CLEAR = "has transparent pixels, whose colour depends on what lies behind them: put it on"
EIGHT = "bits per channel, which Pillow does not convert exactly: save it with 8"

REFUSED: dict[str, tuple[bytes, str]] = {
    "RGBA PNG": (saved(of(alpha(COLOUR, 254)), "PNG"), CLEAR),
    "RGBA WebP": (saved(of(alpha(COLOUR, 0)), "WEBP", lossless=True), CLEAR),
    "grey and alpha PNG": (saved(of(alpha(GREY, 0), "LA"), "PNG"), CLEAR),
    "palette PNG": (saved(palette_image(), "PNG", transparency=1), CLEAR),
    "palette PNG, half transparent": (
        saved(palette_image(), "PNG", transparency=b"\xff\x80\xff\xff"),
        CLEAR,
    ),
    "GIF": (saved(palette_image(), "GIF", transparency=1), CLEAR),
    "RGB PNG, one colour": (png(np.zeros((3, 12), np.uint8), 8, 2, b"\0" * 6), CLEAR),
    "grey PNG, one level": (png(GREY, 8, 0, bytes([0, GREY[0, 0]])), CLEAR),
    "1-bit PNG, white": (saved(of(GREY > 127), "PNG", transparency=1), CLEAR),
    "16-bit grey PNG, one level": (png(BIG_ENDIAN, 16, 0, BIG_ENDIAN[0, :1].tobytes()), CLEAR),
    "RGB of 16 bits, PNG": (png(np.tile(BIG_ENDIAN, 3), 16, 2), f"mode 'RGB' with 16 {EIGHT}"),
    "RGBA of 16 bits, PNG": (png(np.tile(BIG_ENDIAN, 4), 16, 6), f"mode 'RGBA' with 16 {EIGHT}"),
    "grey and alpha of 16 bits, PNG": (png(np.tile(BIG_ENDIAN, 2), 16, 4), f"with 16 {EIGHT}"),
    "RGB of 16 bits, TIFF": (
        tiff(np.tile(DEEP, 3).tobytes(), (4, 3), [16] * 3, 2),
        f"mode 'RGB' with 16 {EIGHT}",
    ),
    "RGB of 16 bits, TIFF, channel by channel": (
        tiff(np.tile(DEEP, 3).tobytes(), (4, 3), [16] * 3, 2, t284=2),
        f"mode 'RGB' with 16 {EIGHT}",
    ),
    "RGB of 16 bits, PPM": (
        b"P6 4 3 65535\n" + np.tile(BIG_ENDIAN, 3).tobytes(),
        f"mode 'RGB' with 16 {EIGHT}",
    ),
    "RGB of 5 bits, BMP": (
        b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 62, 0, 54, 40, 4, 1, 1, 16, 0, 8, 0, 0, 0, 0)
        + bytes(8),
        f"mode 'RGB' with 5 {EIGHT}",
    ),
    "32-bit integers": (saved(of(DEEP.astype(np.int32)), "TIFF"), "'I', integers of unknown range"),
    "signed 16-bit integers": (
        tiff(DEEP.tobytes(), (4, 3), [16], 1, t339=2),
        "'I', integers of unknown range",
    ),
    "signed 8-bit integers": (
        tiff(GREY.tobytes(), (4, 3), [8], 1, t339=2),
        "'L', integers of unknown range",
    ),
    "16-bit grey, white as 0": (
        tiff(DEEP.tobytes(), (4, 3), [16], 0),
        "mode 'I;16' with white as 0: save it with black as 0",
    ),
    "float above 1": (saved(of(OUTSIDE), "TIFF"), "mode 'F' with values from "),
    "float below 0": (saved(of(NEGATIVE), "TIFF"), "to 0.25: scale it to [0, 1]"),
    "float NaN": (saved(of(MISSING), "TIFF"), "from nan to nan: scale it to [0, 1]"),
    "CIELAB": (saved(Image.new("LAB", (4, 3)), "TIFF"), "mode 'LAB', which has no exact"),
    "animated GIF": (saved(of(COLOUR), "GIF", **TWO), "holds 2 frames: save the one"),
    "animated WebP": (saved(of(COLOUR), "WEBP", **TWO), "holds 2 frames: save the one"),
    "animated PNG": (saved(of(COLOUR), "PNG", **TWO), "holds 2 frames: save the one"),
    "TIFF of two pages": (saved(of(COLOUR), "TIFF", **TWO), "holds 2 frames: save the one"),
    "empty": (b"", "cannot identify image file"),
    "text": (b"no image", "cannot identify image file"),
    "other format": (saved(of(COLOUR), "TGA"), "cannot identify image file"),
    "no width": (png(np.zeros((3, 0), np.uint8), 8, 0), "cannot identify image file"),
    "PNG cut short": (saved(of(COLOUR), "PNG")[:60], "Replace the file or remove it."),
    "JPEG cut short": (saved(of(COLOUR), "JPEG")[:-9], "Replace the file or remove it."),
    "WebP cut short": (saved(of(COLOUR), "WEBP")[:-9], "Replace the file or remove it."),
    "BMP cut short": (saved(of(COLOUR), "BMP")[:-9], "Replace the file or remove it."),
    "TIFF cut short": (saved(of(COLOUR), "TIFF")[:60], "Replace the file or remove it."),
    "GIF cut short": (saved(palette_image(), "GIF")[:-9], "Replace the file or remove it."),
}


def written(folder: Path, data: bytes) -> str:
    # What a file is, its content says, not its suffix.
    path = folder / "image.png"
    path.write_bytes(data)
    return str(path)


def expected(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    whole = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(whole)).permute(2, 0, 1)


@pytest.mark.parametrize("kind", EXACT)
def test_a_file_is_read_exactly(kind: str, tmp_path: Path) -> None:
    data, pixels = EXACT[kind]
    image = read_image(written(tmp_path, data), "dat.data.path")
    assert image.dtype == (torch.float32 if pixels.dtype == np.float32 else torch.uint8)
    assert torch.equal(image, expected(pixels))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_is_refused_by_name_and_kind(kind: str, tmp_path: Path) -> None:
    data, words = REFUSED[kind]
    file = written(tmp_path, data)
    with pytest.raises(DataError) as caught:
        read_image(file, "dat.data.path")
    text = str(caught.value)
    assert text.startswith("dat.data.path: ")
    assert text.count(file) >= 1
    assert words in text
    assert text.endswith("remove it.")
    assert "\n" not in text


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_a_photo_is_turned_as_its_orientation_says(
    orientation: int, turn: Callable[[Any], Any], format: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif} if format != "WEBP" else {"exif": exif.tobytes()}
    options |= {"lossless": True} if format == "WEBP" else {}
    file = written(tmp_path, saved(of(COLOUR), format, **options))
    assert torch.equal(read_image(file, ""), expected(turn(COLOUR)))


def test_a_jpeg_is_turned_too_and_of_a_cameras_mpo_the_first_image_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    large = of(np.repeat(np.repeat(COLOUR, 8, 0), 8, 1))
    for format in ("JPEG", "MPO"):
        options = {"save_all": True, "append_images": [of(COLOUR)]} if format == "MPO" else {}
        plain = saved(large, "JPEG", quality=95)
        turned = saved(large, format, quality=95, exif=exif, **options)
        with Image.open(io.BytesIO(plain)) as image:
            pixels = np.array(image)
        assert torch.equal(
            read_image(written(tmp_path, turned), ""), expected(np.rot90(pixels, -1))
        )


def test_cmyk_of_a_jpeg_is_not_inverted(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), np.uint8) + np.array([200, 20, 60, 40], np.uint8)
    image = read_image(written(tmp_path, saved(of(ink, "CMYK"), "JPEG", quality=100)), "")
    light = (255 - ink[0, 0, :3].astype(float)) * (255 - 40) / 255
    assert (image[:, 8, 8].double() - torch.from_numpy(light)).abs().max() < 3


def test_ycbcr_is_converted_as_in_a_jpeg(tmp_path: Path) -> None:
    image = read_image(written(tmp_path, saved(of(COLOUR, "YCbCr"), "TIFF")), "")
    y, cb, cr = np.moveaxis(COLOUR.astype(float), 2, 0)
    light = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)]
    light.append(y + 1.772 * (cb - 128))
    assert (image.double() - torch.from_numpy(np.stack(light).clip(0, 255))).abs().max() <= 1


@pytest.mark.parametrize("pixels", [5, 11])
def test_a_huge_image_is_refused(
    pixels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow warns above its limit, here of 12 pixels, and fails above twice the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    file = written(tmp_path, saved(of(COLOUR), "PNG"))
    with pytest.raises(DataError, match=f"cannot read the image {file} .*12 pixels"):
        read_image(file, "dat.data.path")


def test_damaged_metadata_is_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\0\0\x00\xff\0\0"
    assert read_image(written(tmp_path, saved(of(COLOUR), "JPEG", exif=exif)), "").shape == (
        3,
        3,
        4,
    )
    assert not recwarn.list


def folder_of(root: Path, files: list[bytes]) -> Path:
    for part in ("train", "test"):
        for i, data in enumerate(files):
            path = root / part / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_resized_images_of_every_depth_stay_in_range(tmp_path: Path, augment: str) -> None:
    white = np.full((9, 7), 65535, np.uint16)
    noise = RANDOM.choice(np.array([0, 65535], np.uint16), (40, 30))
    files = [saved(of(pixels), "PNG") for pixels in (white, noise)]
    files += [saved(of((pixels >> 8).astype(np.uint8)), "PNG") for pixels in (white, noise)]
    data = build_data(
        "imagefolder",
        path=folder_of(tmp_path, files),
        img_size=16,
        augment=augment,
        validation_fraction=0.0,
    )
    for split in (data.train, data.test):
        x = torch.stack([split[i][0] for i in range(4)])
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1


def test_workers_read_what_this_process_reads_and_refuse_in_its_words(tmp_path: Path) -> None:
    files = [data for data, _ in EXACT.values()]
    test = build_data("imagefolder", path=folder_of(tmp_path, files), img_size=8).test
    here, there = (
        torch.cat([x for x, _, _ in evaluation_batches(test, batch_size=8, num_workers=workers)])
        for workers in (0, 2)
    )
    assert len(here) == len(files)
    assert torch.equal(here, there)
    refused = Path(test.files[-1])
    refused.write_bytes(REFUSED["RGBA PNG"][0])
    texts = []
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            list(evaluation_batches(test, batch_size=8, num_workers=workers))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"dat.data.path: the image {refused} {CLEAR}")


def test_an_unlabelled_folder_is_named_by_its_own_key(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", [saved(of(COLOUR), "PNG")] * 4)
    more = tmp_path / "more"
    more.mkdir()
    (more / "grey.pgm").write_bytes(EXACT["16-bit PGM"][0])
    (more / "folder.png").mkdir()
    splits = build_data(
        "imagefolder", path=root, img_size=8, unlabelled_path=more, validation_fraction=0.0
    )
    assert splits.mixture is not None
    assert splits.mixture.num_unlabelled == 1
    (more / "grey.pgm").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^dat.data.unlabelled_path: cannot read the image .*pgm"):
        splits.train[4]


def test_the_documented_lines_put_a_transparent_image_on_white(tmp_path: Path) -> None:
    file = written(tmp_path, saved(of(alpha(COLOUR, 0)), "PNG"))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    page = page.partition("\n## Image files\n")[2]
    exec(page.partition("```python\n")[2].partition("```")[0], {"file": file})
    on_white = COLOUR.copy()
    on_white[1, 2] = 255
    assert torch.equal(read_image(file, ""), expected(on_white))


def test_the_suffixes_are_those_of_torchvision() -> None:
    assert torchvision.datasets.folder.IMG_EXTENSIONS == IMAGE_SUFFIXES


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    files = [saved(of(np.full((8, 8), level, np.uint16)), "PNG") for level in (1000, 1001)]
    data = FolderImages([(written(tmp_path, file), 0) for file in files], 8)
    assert data[0][0].mean().item() == pytest.approx(1001 / 65535, rel=1e-6)
