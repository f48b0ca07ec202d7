"""Gradient codecs, and the collectives that carry what they make."""

from dat_ds.compression.base import Codec, Payload
from dat_ds.compression.build import CODECS, build_codec, codec_options
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
    "Codec",
    "CompressedAllReduce",
    "CompressedReduceScatter",
    "NearestInt8",
    "Payload",
    "build_codec",
    "check_agreement",
    "codec_options",
    "finish_together",
    "gather_shares",
]
