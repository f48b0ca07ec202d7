"""Claims about JPEG files that torchvision decodes: Pillow's pixels, and Pillow for all others."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dat_ds.data import decoding
from dat_ds.data.decoding import decode_image
from dat_ds.data.transforms import random_resized_crop, resize_center_crop
from dat_ds.errors import DamagedImageError

pytestmark = pytest.mark.fast


def picture(mode: str = "RGB", size: tuple[int, int] = (45, 61), seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, as a photograph has."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    stream = io.BytesIO()
    (picture() if image is None else image).save(stream, "JPEG", **options)
    return stream.getvalue()


PLAIN = {
    "4:4:4": jpeg(subsampling=0, quality=95),
    "4:2:2": jpeg(subsampling=1),
    "4:2:0": jpeg(subsampling=2, quality=30),
    "progressive": jpeg(progressive=True),
    "optimised": jpeg(optimize=True),
    "restarts": jpeg(restart_marker_blocks=2),
    "comment": jpeg(comment=b"a comment"),
    "grey": jpeg(picture("L")),
    "one pixel": jpeg(picture(size=(1, 1))),
    "a row": jpeg(picture(size=(1, 300))),
    "large": jpeg(picture(size=(375, 500)), quality=97),
    "tail": jpeg() + b"bytes behind the end",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_have_pillows_pixels(name: str) -> None:
    fast = decoding._plain_jpeg(io.BytesIO(PLAIN[name]))
    slow = decoding._by_pillow(io.BytesIO(PLAIN[name]))
    assert fast is not None, "it was left to Pillow"
    assert fast.dtype == torch.uint8
    assert torch.equal(fast, slow)
    assert torch.equal(decode_image(PLAIN[name], "a", "b"), slow)


def test_what_becomes_of_the_pixels_does_not_depend_on_the_decoder() -> None:
    """Their layout in memory differs, and resizing must not notice."""
    for name in ("4:2:0", "grey", "large"):
        fast = decoding._plain_jpeg(io.BytesIO(PLAIN[name]))
        slow = decoding._by_pillow(io.BytesIO(PLAIN[name]))
        assert torch.equal(resize_center_crop(fast, 32), resize_center_crop(slow, 32))
        for seed in range(5):
            crops = [
                random_resized_crop(x, (32, 32), torch.Generator().manual_seed(seed))
                for x in (fast, slow)
            ]
            assert torch.equal(*crops)


def with_segment(data: bytes, kind: int, content: bytes) -> bytes:
    return data[:2] + bytes([0xFF, kind]) + struct.pack(">H", 2 + len(content)) + content + data[2:]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


OTHERS = {
    "turned": jpeg(exif=exif(6)),
    "exif": jpeg(exif=exif(1)),
    "cmyk": jpeg(picture("CMYK")),
    "adobe": with_segment(jpeg(), 0xEE, b"Adobe\0\x64\0\0\0\0\1"),
    "profile": jpeg(icc_profile=b"a colour profile"),
    "png": b"",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_is_left_to_pillow(name: str) -> None:
    stream = io.BytesIO(OTHERS[name])
    assert decoding._plain_jpeg(stream) is None
    assert stream.tell() == 0


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decoding._plain_jpeg(io.BytesIO(jpeg())) is None
    with pytest.raises(DamagedImageError, match="decompression bomb"):
        decode_image(jpeg(), "a", "b")


@pytest.mark.parametrize("length", [2, 3, 20, 160, 400, 623, 0.5, 0.9, -3])
@pytest.mark.parametrize("name", ["4:2:0", "progressive", "grey"])
def test_a_file_that_is_cut_short_is_refused(name: str, length: float) -> None:
    data = PLAIN[name]
    cut = data[: int(length * len(data)) if 0 < length < 1 else int(length)]
    with pytest.raises(DamagedImageError, match=r"b: cannot read the image a \("):
        decode_image(cut, "a", "b")


def test_random_damage_is_refused_or_read_as_pillow_reads_it() -> None:
    """What Pillow refuses is refused, and what it reads has its size."""
    rng = np.random.default_rng(0)
    data = PLAIN["4:2:2"]
    outcomes = set()
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(2, len(data), 3):
            broken[place] = rng.integers(256)
        try:
            slow = decoding._by_pillow(io.BytesIO(bytes(broken)))
        except Exception:
            slow = None
        try:
            fast = decode_image(bytes(broken), "a", "b")
        except DamagedImageError:
            fast = None
        outcomes.add((slow is None, fast is None))
        if slow is not None and fast is not None:
            assert torch.equal(fast, slow)
    assert (False, True) not in outcomes
    assert (True, False) not in outcomes
    assert len(outcomes) == 2
