"""Images in tar files, read by the place of each in its file: any order, any process."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dat_ds.data.decoding import decode_image
from dat_ds.data.images import StoredImages
from dat_ds.errors import DataError
from dat_ds.files import open_regular

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar file: its name, its first byte there, and its number of bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was scanned: path, bytes, and time of its last change (ns)."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: str, key: str) -> Shard:
        """The tar file as it is now.

        Raises:
            DataError: It is not there.
        """
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"{key}: cannot read the shard {path} ({error.strerror}).") from None
        return cls(path, found.st_size, found.st_mtime_ns)


def scan_tar(path: str, key: str) -> Iterator[Member]:
    """The files in a tar file, in its order; only headers are read.

    Args:
        path: The file, not compressed.
        key: Key of the config that named it, for messages.

    Raises:
        DataError: It cannot be read, is compressed, or is cut short.
    """
    try:
        with open_regular(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.__dict__["members"] = []  # or it keeps every header
                if member.issparse() or member.islnk() or member.issym():
                    raise DataError(
                        f"{key}: {member.name} in the shard {path} is a link or a sparse file: "
                        "write plain files into it."
                    )
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
            end, size = tar.offset, os.fstat(stream.fileno()).st_size
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{key}: {path} is not a tar file that can be read in any order ({reason}). Copy it "
            "again; if it is compressed, unpack it (gunzip)."
        ) from None
    # Cut at the end of a file it reads as a shorter one, but for two blocks of zeros.
    if size < end + _BLOCK:
        raise DataError(
            f"{key}: the shard {path} ends without the mark of its end: it is cut short, or was "
            "never closed. Copy it again, or write it with tarfile or tar."
        )


class TarImages(StoredImages):
    """Encoded images at places in tar files.

    Every read opens its file and compares it with what was scanned: worker processes share no
    position in a file, and a file that was exchanged is noticed.

    Args:
        shards: The tar files.
        shard: Number of each image's tar file, shape ``(N,)``.
        members: Place of each image in it.
        labels: Integer labels, shape ``(N,)``.
        img_size: As :class:`StoredImages`.
        key: Key of the config that named the files, for error texts.
        crop_share: As :class:`StoredImages`.
    """

    def __init__(
        self,
        shards: list[Shard],
        shard: list[int],
        members: list[Member],
        labels: Tensor,
        img_size: int,
        key: str,
        crop_share: float,
    ) -> None:
        super().__init__(labels, img_size, key, crop_share)
        self._shards = shards
        # Arrays, since the pages of a list of objects are copied by every worker that counts them.
        self._shard = torch.tensor(shard, dtype=torch.int64)
        self._places = torch.tensor([(m.offset, m.size) for m in members]).reshape(-1, 2)
        self._names = np.array([m.name.encode() for m in members], dtype=np.bytes_)

    def decode(self, index: int) -> Tensor:
        """Whole image at its place.

        Raises:
            DataError: The tar file is not the one that was scanned.
            DamagedImageError: The image cannot be read as pixels.
        """
        shard = self._shards[int(self._shard[index])]
        offset, size = self._places[index].tolist()
        try:
            with open_regular(shard.path) as stream:
                found = os.fstat(stream.fileno())
                if found.st_size == shard.size and found.st_mtime_ns == shard.changed:
                    data = os.pread(stream.fileno(), size, offset)
                    return decode_image(data, self.file_of(index), self.key)
                words = f"has {found.st_size} bytes, and had {shard.size}"
                if found.st_size == shard.size:
                    words = "was written again"
        except OSError as error:
            words = f"cannot be read any more ({error.strerror})"
        raise DataError(
            f"{self.key}: the shard {shard.path} {words} when this run looked for its images. Put "
            "it back as it was, and repeat the command (dat-ds train: with --resume auto)."
        )

    def file_of(self, index: int) -> str:
        """The tar file and the name in it."""
        shard = self._shards[int(self._shard[index])]
        return f"{shard.path}:{self._names[index].decode()}"
