"""Codecs by name, from the ``dat.compression`` section of a run config."""

from __future__ import annotations

import dataclasses
from typing import Any

from dat_ds.compression.base import Codec
from dat_ds.compression.natural import Natural
from dat_ds.compression.rounding import Int4, Int8, Qsgd
from dat_ds.compression.sign import Sign
from dat_ds.compression.topk import TopK

CODECS: dict[str, type[Codec]] = {
    kind.name: kind for kind in (Int8, Int4, Qsgd, Natural, TopK, Sign)
}


def codec_options(name: str) -> dict[str, Any]:
    """Options of a codec by name, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(CODECS[name])}


def build_codec(name: str, **options: Any) -> Codec:
    """Build a codec.

    Args:
        name: ``int8``, ``int4``, ``qsgd``, ``natural``, ``topk`` or ``sign``.
        options: That codec's own: ``block_size`` (not of ``natural``; None for one block),
            ``levels`` (``qsgd``), ``ratio`` (``topk``), ``scale`` (``sign``).

    Raises:
        ValueError: For an unknown name or option, or a value out of range.
    """
    if name not in CODECS:
        raise ValueError(f"compression.name={name!r} is not one of {', '.join(CODECS)}.")
    known = codec_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"codec {name!r} has no option {', '.join(unknown)}: {', '.join(known) or 'none'}."
        )
    return CODECS[name](**options)
