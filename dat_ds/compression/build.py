"""The codecs by name, and building one from plain settings."""

from __future__ import annotations

from typing import Any

from dat_ds.compression.base import Codec, Compression, NoCompression
from dat_ds.compression.hadamard import HadamardInt8
from dat_ds.compression.natural import Natural
from dat_ds.compression.rounding import Int4, Int8, Qsgd
from dat_ds.compression.sign import Sign
from dat_ds.compression.topk import TopK
from dat_ds.method import Table, build_method, table_of

CODECS: Table[Codec] = table_of(
    "codec",
    Codec,  # type: ignore[type-abstract]  # the base of the table's classes
    [
        Int8,
        Int4,
        Qsgd,
        HadamardInt8,
        Natural,
        TopK,
        Sign,
    ],
)
"""The codecs: a new one is a file and a place in this list."""
COMPRESSIONS: Table[Compression] = table_of("codec", Compression, [NoCompression, *CODECS.values()])
"""The choices of ``dat.compression``."""


def build_codec(name: str, **options: Any) -> Codec:
    """Build a codec.

    Args:
        name: One of :data:`CODECS`.
        options: That codec's own; a ``block_size`` of None or 0 makes one block.

    Raises:
        ConfigError: A ``ValueError`` with all problems: an unknown name or option, a value out of
            range.
    """
    if options.get("block_size", 0) is None:
        options["block_size"] = 0
    return build_method(CODECS, {"name": name, **options}, "compression")
