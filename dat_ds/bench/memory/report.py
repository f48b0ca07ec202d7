"""Tables of predicted and measured memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.bench.memory.moments import ATTACK, MOMENTS, REDUCTION, START, STEP, UPDATE, terms_of

_MIB = 2**20
MEASURED = {START: (START,), ATTACK: (ATTACK,), UPDATE: (UPDATE, REDUCTION), STEP: (STEP,)}
"""Moments that are measured together, by the name under which they are."""


def describe(values: Mapping[str, Any]) -> str:
    """A table of terms by phase for each number of ranks, and the measurement beside it."""
    lines = [
        f"{values['num_parameters'] / 1e6:.1f}M parameters, "
        f"ZeRO-{values['config']['zero_optimization']['stage']}. "
        "Predicted MiB of a rank at the peak of each phase:",
    ]
    for each in values["predicted"]:
        ledger = each["ledger"]
        for place, name in (("device", values["device"]), ("host", "host")):
            if any(ledger[place].values()):
                lines += ["", *_table(ledger[place], each, name)]
        if each["largest"] is not None:
            lines += ["", _fit(values, each)]
    if values["measured"]:
        lines += ["", *_comparison(values)]
    lines += ["", *values["notes"]] if values["notes"] else []
    return "\n".join(lines)


def _table(moments: Mapping[str, Any], each: Mapping[str, Any], place: str) -> list[str]:
    names = [name for name in MOMENTS if name in moments]
    count = f"{each['ranks']} rank{'s' * (each['ranks'] != 1)}, micro-batch {each['micro_batch']}"
    lines = [f"| {count}, {place} | " + " | ".join(names) + " |", "|" + " --- |" * (1 + len(names))]
    for term in terms_of(moments):
        cells = [_mib(moments[name].get(term, 0)) for name in names]
        lines.append(f"| {term} | {' | '.join(cells)} |")
    totals = [sum(moments[name].values()) for name in names]
    lines.append(f"| **total** | {' | '.join(map(_mib, totals))} |")
    lines += ["", f"Peak: {max(totals) / 2**30:.2f} GiB ({names[totals.index(max(totals))]})."]
    return lines


def _mib(size: int) -> str:
    return "-" if size == 0 else f"{size / _MIB:.1f}" if size < 10 * _MIB else f"{size / _MIB:.0f}"


def _fit(values: Mapping[str, Any], each: Mapping[str, Any]) -> str:
    """Whether it fits a GPU."""
    largest, micro_batch, gib = each["largest"], each["micro_batch"], values["gpu_gib"]
    limit = f"{gib:g} GiB, of which {values['outside_gib']:g} are left for CUDA and NCCL"
    if largest >= micro_batch:
        return f"It fits {limit}; the largest micro-batch that does is {largest}."
    if largest:
        return f"It does not fit {limit}: write train_micro_batch_size_per_gpu={largest}."
    return (
        f"It does not fit {limit}, with any batch: take more ranks or a higher ZeRO stage, offload "
        'the optimizer ("offload_optimizer": {"device": "cpu"}), or write smaller '
        "zero_optimization.reduce_bucket_size and stage3_prefetch_bucket_size."
    )


def _comparison(values: Mapping[str, Any]) -> list[str]:
    """Measured peaks of every rank beside the predicted ones."""
    measured = values["measured"]
    moments = values["predicted"][0]["ledger"]["device"]
    totals = {name: sum(terms.values()) for name, terms in moments.items()}
    lines = [
        f"Measured on {len(measured)} rank{'s' * (len(measured) != 1)}, two optimizer steps, MiB:",
        "",
        "| phase | predicted | " + " | ".join(f"rank {i}" for i in range(len(measured))) + " |",
        "|" + " --- |" * (2 + len(measured)),
    ]
    for name, together in MEASURED.items():
        if not all(name in each["device"] for each in measured):
            continue
        predicted = max(totals[moment] for moment in together if moment in totals)
        peaks = [f"{each['device'][name] / _MIB:.0f}" for each in measured]
        lines.append(f"| {name} | {predicted / _MIB:.0f} | {' | '.join(peaks)} |")
    highest = max(max(each["device"].values()) for each in measured)
    error = max(totals.values()) / highest - 1
    lines += ["", f"Peak predicted {100 * error:+.1f} % of the measured one."]
    return lines
