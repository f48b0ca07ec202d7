"""The result of a run as a file, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe(record: Mapping[str, Any], twin: Mapping[str, Any] | None) -> str:
    """What a model withstands, in one or two sentences, and what a natural one does.

    Args:
        record: ``record.json`` of a run.
        twin: Record of its natural twin, evaluated alike; None where there is none.
    """
    threat = record["config"]["dat"]["threat_model"]
    norm = {"linf": "l-infinity", "l2": "l2"}[threat["norm"]]
    trained = "naturally trained" if record["natural"] else "adversarially trained"
    text = (
        f"Of {record['num_examples']} test images, the {trained} model classifies "
        f"{record['natural_acc']:.1%} correctly"
    )
    if not record["robust_acc"]:
        return text + "; it was not attacked (dat.evaluation.attacks is empty)."
    attack, robust = _weakest(record)
    text += f", and {robust:.1%} whatever {attack} does within {norm} distance {threat['eps']}."
    if twin is not None:
        text += (
            f" Its naturally trained twin: {twin['natural_acc']:.1%}, and "
            f"{twin['robust_acc'][attack]:.1%} under the same attack."
        )
    elif not record["natural"]:
        text += " For a natural twin beside it: --set dat.evaluation.natural_twin=true."
    return text


def _weakest(record: Mapping[str, Any]) -> tuple[str, float]:
    """The attack that the model withstands least."""
    attack = min(record["robust_acc"], key=record["robust_acc"].__getitem__)
    return attack, record["robust_acc"][attack]
