"""Gradient codecs, and the collectives that carry what they make."""

from dat_ds.compression.build import CODECS, build_codec, codec_options
from dat_ds.compression.codecs import Codec, NearestInt8, Payload
from dat_ds.compression.collectives import (
    CompressedAllReduce,
    CompressedReduceScatter,
    check_agreement,
    finish_together,
    gather_shares,
)
from dat_ds.compression.traffic import current_kind, kind_of_traffic

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
    "current_kind",
    "finish_together",
    "gather_shares",
    "kind_of_traffic",
]
