"""Gradient codecs, and the collectives that carry what they make."""

from dat_ds.compression.base import Codec, Compression, NoCompression, Payload
from dat_ds.compression.build import CODECS, COMPRESSIONS, build_codec
from dat_ds.compression.collectives import (
    CompressedAllReduce,
    CompressedReduceScatter,
    check_agreement,
    finish_together,
    gather_shares,
)
from dat_ds.compression.rounding import NearestInt8

__all__ = [
    "CODECS",
    "COMPRESSIONS",
    "Codec",
    "CompressedAllReduce",
    "CompressedReduceScatter",
    "Compression",
    "NearestInt8",
    "NoCompression",
    "Payload",
    "build_codec",
    "check_agreement",
    "finish_together",
    "gather_shares",
]
