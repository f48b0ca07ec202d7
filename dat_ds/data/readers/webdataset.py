"""Shards of samples in tar files, in the layout of webdataset."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from dat_ds.data.method import StoredDataset
from dat_ds.data.readers.classes import listed, read_class_map
from dat_ds.data.readers.source import IMAGENET_STATISTICS, Part, Source, raise_all
from dat_ds.data.tars import Member, Shard, TarImages, scan_tar
from dat_ds.errors import DataError
from dat_ds.files import open_regular

IMAGE_EXTENSIONS: tuple[str, ...] = (
    "jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "bmp", "tif", "tiff", "gif",
)  # fmt: skip
_LABEL_EXTENSIONS: tuple[str, ...] = ("cls", "json")
_TEST_SHARDS = ("test*.tar", "val*.tar")
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # up to the first dot, as webdataset cuts it
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LONGEST_LABEL = 2**20
_MOST_SHARDS = 10**6


@dataclass(frozen=True, kw_only=True)
class WebDataset(StoredDataset):
    """Samples in tar files, in the layout of webdataset: ``0001.jpg`` beside ``0001.cls``.

    A part is read in any order, by the place of each image in its file.
    """

    name: ClassVar[str] = "webdataset"

    train_shards: str = "train*.tar"
    """Tar files of the training images, in ``path``: with ``*`` and ``?``, and ranges such as
    ``train-{000..146}.tar``."""
    test_shards: str | None = None
    """Likewise of the test images. Default: ``test*.tar``, or else ``val*.tar``."""
    image_extension: str | None = None
    """Extension of the images. Default: the one that each sample has."""
    label_extension: str | None = None
    """Extension of the labels: text with an integer, or JSON. Default: ``cls``, or else
    ``json``."""
    label_field: str = "label"
    """Key of the label where it is in JSON."""
    class_map: str | None = None
    """File with the names of the classes in order: one name a line, or JSON. Labels may then be
    names."""

    def read(self, seed: int) -> Source:
        """The shards of both parts."""
        train, test = self.read_train(seed), self.read_test(seed)
        return Source(
            train.images, test.images, IMAGENET_STATISTICS, train.class_names, train.num_classes
        )

    def read_train(self, seed: int) -> Part:
        """The training shards."""
        return self._part(self._found("train_shards", (self.train_shards,)))

    def read_test(self, seed: int) -> Part:
        """The test shards."""
        patterns = _TEST_SHARDS if self.test_shards is None else (self.test_shards,)
        return self._part(self._found("test_shards", patterns))

    def _found(self, key: str, patterns: tuple[str, ...]) -> list[str]:
        """The tar files of the first pattern that has any."""
        root = str(self.path)
        for pattern in patterns:
            files = list(_files_of(root, pattern, key))
            if files:
                return files
        raise DataError(
            f"dat.data.{key}: there is no file {' or '.join(patterns)} in dat.data.path={root!r}. "
            f"Write dat.data.{key}, such as 'train-{{000..146}}.tar'."
        )

    def _part(self, files: list[str]) -> Part:
        names = None if self.class_map is None else read_class_map(self.class_map)
        place = {} if names is None else {name: label for label, name in enumerate(names)}
        shards = [Shard.of(file, "dat.data.path") for file in files]
        owners: list[int] = []
        members: list[Member] = []
        labels: list[int] = []
        for number, shard in enumerate(shards):
            with open_regular(shard.path) as stream:
                for sample in _samples(shard.path):
                    image, label = self._chosen(sample, shard.path)
                    members.append(image)
                    owners.append(number)
                    content = os.pread(
                        stream.fileno(), min(label.size, _LONGEST_LABEL), label.offset
                    )
                    labels.append(self._label(content, label, shard.path, place))
        problems = []
        if not members:
            problems.append(f"There is no sample in {listed(files)}.")
        if names is not None and members and (high := max(labels)) >= len(names):
            problems.append(
                f"dat.data.class_map={self.class_map!r} has {len(names)} names, but the labels in "
                f"{listed(files)} run to {high}: add the missing names."
            )
        raise_all(problems)
        images = TarImages(
            shards,
            owners,
            members,
            torch.tensor(labels),
            self.side,
            "dat.data.path",
            self.crop_share,
        )
        return Part(images, names, 0 if names is None else len(names))

    def _chosen(self, sample: dict[str, Member], shard: str) -> tuple[Member, Member]:
        """Image and label of a sample.

        Raises:
            DataError: It has none, or several.
        """
        kinds = IMAGE_EXTENSIONS if self.image_extension is None else (self.image_extension,)
        images = [extension for extension in kinds if extension in sample]
        wanted = _LABEL_EXTENSIONS if self.label_extension is None else (self.label_extension,)
        labels = [extension for extension in wanted if extension in sample]
        first = next(iter(sample.values())).name
        if len(images) != 1:
            raise DataError(
                f"dat.data.path: the sample of {first} in the shard {shard} has "
                f"{' and '.join(images) or 'no'} image among its extensions {listed(sample)}: "
                "write dat.data.image_extension, one that every sample has."
            )
        if not labels:
            raise DataError(
                f"dat.data.path: the sample of {first} in the shard {shard} has no label "
                f"({' or '.join(wanted)}) among its extensions {listed(sample)}: write "
                "dat.data.label_extension, one that every sample has."
            )
        return sample[images[0]], sample[labels[0]]

    def _label(self, content: bytes, member: Member, shard: str, place: dict[str, int]) -> int:
        """The label that a file holds.

        Raises:
            DataError: It holds none.
        """
        found: Any = content.decode("utf-8", "replace").strip()
        if member.name.endswith(".json"):
            try:
                found = json.loads(content)[self.label_field]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise DataError(
                    f"dat.data.label_field={self.label_field!r}: {member.name} in the shard "
                    f"{shard} is not a JSON object with that key ({error!r})."
                ) from None
        if isinstance(found, str) and found in place:
            return place[found]
        if isinstance(found, str) and found.isascii() and found.removeprefix("-").isdigit():
            found = int(found)
        if type(found) is int and abs(found) < 2**31:
            return found
        named = "" if not place else " or a name in dat.data.class_map"
        raise DataError(
            f"dat.data.path: {member.name} in the shard {shard} holds {str(found)[:50]!r}, which "
            f"is not a label: write an integer from 0 on{named}."
        )


def _samples(shard: str) -> Iterator[dict[str, Member]]:
    """Files of each sample by extension: those with the same name up to the first dot."""

    def key_of(member: Member) -> str | None:
        name = member.name.rpartition("/")[2]
        found = None if name.startswith(("._", "__")) else _NAME.fullmatch(member.name)
        return None if found is None else found[1]

    seen: set[str] = set()
    for key, group in itertools.groupby(scan_tar(shard, "dat.data.path"), key_of):
        if key is None:
            continue
        if key in seen:
            raise DataError(
                f"dat.data.path: the files of the sample {key} in the shard {shard} do not stand "
                "side by side, or there are two of that name: sort them, as tar --sort=name does."
            )
        seen.add(key)
        sample: dict[str, Member] = {}
        for member in group:
            extension = member.name[len(key) + 1 :].lower()
            if extension in sample:
                raise DataError(f"dat.data.path: {member.name} is twice in the shard {shard}.")
            sample[extension] = member
        yield sample


def _files_of(root: str, pattern: str, key: str) -> Iterator[str]:
    """Files that a pattern names, in order.

    Raises:
        DataError: A file is named without ``*`` and is not there.
    """
    missing = []
    for name in itertools.islice(expand_braces(pattern), _MOST_SHARDS):
        path = os.path.join(root, name)
        if glob.has_magic(name):
            yield from sorted(glob.glob(os.path.join(glob.escape(root), name)))
        elif Path(path).exists():
            yield path
        else:
            missing.append(path)
    if missing:
        raise DataError(
            f"dat.data.{key}={pattern!r} names {len(missing)} file(s) that are not there: "
            f"{listed(missing)}. Copy them, or name those that are."
        )


def expand_braces(pattern: str) -> Iterator[str]:
    """Names that a pattern with ``{000..146}`` and ``{a,b}`` stands for, as shells expand it."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    if not (opened and closed):
        yield pattern
        return
    found = _RANGE.fullmatch(inside)
    choices: Iterator[str] = iter(inside.split(","))
    if found is not None:
        first, last = int(found[1]), int(found[2])
        width = len(found[1]) if found[1].startswith("0") or len(found[1]) == len(found[2]) else 0
        step = 1 if last >= first else -1
        choices = (str(n).zfill(width) for n in range(first, last + step, step))
    for choice in choices:
        for tail in expand_braces(after):
            yield before + choice + tail
