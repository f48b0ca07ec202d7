"""Image files as pixels: every kind is converted exactly, or refused by name."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dat_ds.errors import DamagedImageError
from dat_ds.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_COLOURS = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "La", "PA", "RGBA", "RGBa"})
_SHORT_GREY = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_JPEG, _MARKER = b"\xff\xd8\xff", 0xFF
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_PLAIN_SEGMENTS = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # tables, restart interval, JFIF, comment
_START, _LARGEST_JPEG = 2**16, 2**28  # bytes; Pillow reads what it needs of a longer file
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2
_CLEAR = (
    "has transparent pixels, whose colour depends on what lies behind them: put it on a background "
    "and save it without transparency"
)

Pixels = np.ndarray[Any, Any]


class _UnfitError(Exception):
    """The message says what a file has, and what to do about it."""


def read_image(path: str, key: str) -> Tensor:
    """Read an image file as RGB, the right way up.

    Grey, black-and-white and palette images are converted exactly, CMYK and YCbCr by Pillow's
    formulas; 16-bit grey is divided by its largest value. An EXIF orientation is applied, a colour
    profile is not. Of a camera's MPO file the first image is read, as viewers do.

    Args:
        path: The file.
        key: Key of the config that named it, for the error text.

    Returns:
        ``(3, H, W)``: uint8 in 0..255; float32 in [0, 1] for 16-bit and float grey.

    Raises:
        DamagedImageError: The file is not an image, is damaged or too large, or is of a kind that
            has no exact conversion, such as transparent pixels, several frames, or colours of 16
            bits.
    """
    return _decoded(lambda: open_regular(path), path, key)


def decode_image(data: bytes, place: str, key: str) -> Tensor:
    """Pixels of an image in memory; exactly those that :func:`read_image` gives of its file.

    Args:
        data: Content of an image file.
        place: Where it is from, for the error text.
        key: Key of the config that named that, for the error text.

    Raises:
        DamagedImageError: As :func:`read_image`.
    """
    return _decoded(lambda: io.BytesIO(data), place, key)


def _decoded(opened: Callable[[], BinaryIO], place: str, key: str) -> Tensor:
    try:
        with opened() as stream:
            plain = _plain_jpeg(stream)
            return _by_pillow(stream) if plain is None else plain
    except _UnfitError as unfit:
        raise DamagedImageError(f"{key}: the image {place} {unfit}, or remove it.") from None
    # Pillow's decoders raise errors of every class for a damaged file.
    except Exception as error:
        # Of a stream Pillow tells an address in memory, which says nothing.
        reason = re.sub(r" ?<_io\.[^>]*>", "", str(error))
        raise DamagedImageError(
            f"{key}: cannot read the image {place} ({reason}). Replace the file or remove it."
        ) from error


def _by_pillow(stream: BinaryIO) -> Tensor:
    """Pixels of any kind of image."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # The others are about metadata, and would be repeated in every epoch.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=_FORMATS) as file:
            if file.format == "PNG":
                _compare_checksums(stream)
            _check_kind(file)
            # Asked for before decoding, which may drop it.
            largest = 4095 if _bits(file) == 12 else 65535
            ImageOps.exif_transpose(file, in_place=True)
            pixels = _grey(file, largest) if _is_deep(file) else _colours(file)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _plain_jpeg(stream: BinaryIO) -> Tensor | None:
    """Pixels of a plain JPEG by torchvision; None, the stream at its start, for all other images.

    Its decoder and Pillow's are the same library and give the same pixels, but Pillow copies them
    twice, and reads metadata that a plain file has not. Whatever is odd about a file is left to
    Pillow, and so is saying what is wrong with it.
    """
    data = stream.read(_START)
    if data.startswith(_JPEG):
        data += stream.read(_LARGEST_JPEG - _START)
        if len(data) < _LARGEST_JPEG and (channels := _plain_channels(data)):
            from torchvision.io import ImageReadMode, decode_jpeg

            mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
            with contextlib.suppress(RuntimeError):
                # A copy, since torch warns of a buffer that cannot be written to.
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                pixels: Tensor = decode_jpeg(encoded, mode=mode)
                return pixels if channels == 3 else pixels.expand(3, -1, -1)
    stream.seek(0)
    return None


def _plain_channels(data: bytes) -> int:
    """Channels of a JPEG, 1 or 3; 0 unless it has 8 bits, a usual size, and no odd metadata.

    Of the segments before the frame's (ITU T.81, B.1.1.3), those of JFIF, tables and comments are
    plain; EXIF may turn the image, Adobe's may change its colours, and others may hold more images.
    """
    from PIL import Image

    place = 2
    while place + 10 <= len(data) and data[place] == _MARKER:
        kind = data[place + 1]
        if kind in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, place + 4)
            largest = Image.MAX_IMAGE_PIXELS
            usual = height > 0 and (largest is None or height * width <= largest)
            return channels if bits == 8 and usual and channels in (1, 3) else 0
        if kind not in _PLAIN_SEGMENTS:
            return 0
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _compare_checksums(stream: BinaryIO) -> None:
    """Raise for a PNG file that is not as it was written, which decoding alone may not notice."""
    from PIL import Image

    place = stream.tell()
    stream.seek(0)
    with Image.open(stream, formats=("PNG",)) as file:
        file.verify()
    stream.seek(place)


def _is_deep(file: Image) -> bool:
    """Whether the image is grey with more than 8 bits."""
    return file.mode in _SHORT_GREY or file.mode in ("I", "F")


def _check_kind(file: ImageFile) -> None:
    """Refuse what the header alone shows to have no exact conversion."""
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":
        raise _UnfitError(f"holds {frames} frames: save the one that is meant as a file of its own")
    kind, tags = f"has mode {file.mode!r}", getattr(file, "tag_v2", {})
    # Pillow itself widens 16-bit grey of PPM (and PNG, in earlier versions) to 32-bit integers.
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) or (file.mode == "I" and file.format == "TIFF"):
        raise _UnfitError(
            f"{kind}, integers of unknown range: save it as 8-bit or unsigned 16-bit grey"
        )
    if _is_deep(file):
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise _UnfitError(f"{kind} with white as 0: save it with black as 0")
    elif file.mode not in _COLOURS:
        raise _UnfitError(f"{kind}, which has no exact conversion: save it as 8-bit RGB")
    elif (bits := _bits(file)) != 8:
        raise _UnfitError(
            f"{kind} with {bits} bits per channel, which Pillow does not convert exactly: save it "
            "with 8, for example by ImageMagick's 'mogrify -depth 8 FILE'"
        )


def _bits(file: ImageFile) -> int:
    """Bits per channel as stored; 8 for fewer, where Pillow widens them exactly."""
    if file.format == "TIFF":
        stored: tuple[int, ...] = getattr(file, "tag_v2", {}).get(_BITS, (1,))
        return max(8, *stored)
    # How Pillow tells its decoder of a raw mode such as "RGB;16B", and of the largest value of PPM.
    arguments = file.tile[0].args if file.tile else ()
    raw_mode, *rest = (arguments,) if isinstance(arguments, str) else (arguments or ("",))
    if file.format == "PPM" and rest:
        return max(8, int(rest[-1]).bit_length())
    if file.format == "BMP" and raw_mode in ("BGR;15", "BGR;16"):
        return 5
    return 16 if str(raw_mode).endswith((";16B", ";16L")) else 8


def _grey(file: Image, largest: int) -> Pixels:
    """Float32 ``(H, W, 3)`` in [0, 1] of an image with more than 8 bits."""
    values = np.asarray(file)
    if file.mode == "F":
        unit = values.astype(np.float32)
        if not (np.isfinite(unit).all() and unit.min() >= 0 and unit.max() <= 1):
            raise _UnfitError(
                f"has mode 'F' with values from {unit.min():g} to {unit.max():g}: scale it to "
                "[0, 1]"
            )
    else:
        if (values == file.info.get("transparency")).any():
            raise _UnfitError(_CLEAR)
        unit = values.astype(np.float32) / np.float32(largest)
    return np.repeat(unit[..., None], 3, axis=2)


def _colours(file: Image) -> Pixels:
    """Uint8 ``(H, W, 3)`` of an image of 8 bits or less; opaque alpha is dropped."""
    if not file.has_transparency_data:
        return np.array(file.convert("RGB"))
    # Pillow knows no direct way from premultiplied grey.
    pixels = np.array((file.convert("LA") if file.mode == "La" else file).convert("RGBA"))
    if pixels[..., 3].min() < 255:
        raise _UnfitError(_CLEAR)
    return pixels[..., :3]
