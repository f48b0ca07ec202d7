"""The result of a run as a file, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NEXT_STEP = "For classes, fine-tune it: --set dat.model.pretrained=RUN, with another objective."


def norm_in_words(norm: str) -> str:
    """``"l-infinity"`` for ``"linf"``."""
    return "l-infinity" if norm == "linf" else norm


def describe(record: Mapping[str, Any], twin: Mapping[str, Any] | None) -> str:
    """Clean and robust accuracy of a run and of its natural twin, in one or two sentences.

    Args:
        record: ``record.json`` of a run.
        twin: Record of its natural twin, evaluated alike; None where there is none.
    """
    dat = record["config"]["dat"]
    threat = dat["threat_model"]
    ball = f"{norm_in_words(threat['norm'])}, eps {threat['eps']}"
    trained = "naturally trained" if record["natural"] else "adversarially trained"
    if record["natural_acc"] is None:
        return _describe_losses(record, trained, f"({ball})")
    turned = dat["objective"]["name"] == "rotation"
    kind = "accuracy on the rotation of" if turned else "clean accuracy on"
    text = (
        f"The {trained} model: {kind} {record['num_examples']} test images "
        f"{record['natural_acc']:.1%}"
    )
    if not record["robust_acc"]:
        return text + "; it was not attacked (dat.evaluation.attacks is empty)."
    attack, robust = _weakest(record)
    text += f", robust accuracy {robust:.1%} ({attack}, {ball}; an upper bound)."
    if twin is not None:
        text += (
            f" Its natural twin: clean accuracy {twin['natural_acc']:.1%}, robust accuracy "
            f"{twin['robust_acc'][attack]:.1%}."
        )
    elif turned:
        text += f" {_NEXT_STEP}"
    elif not record["natural"]:
        text += " For a natural twin beside it: --set dat.evaluation.natural_twin=true."
    return text


def _describe_losses(record: Mapping[str, Any], trained: str, within: str) -> str:
    """The same for a model that does not classify."""
    objective = record["config"]["dat"]["objective"]["name"]
    text = (
        f"Mean {objective} loss of the {trained} model on {record['num_examples']} test images: "
        f"{record['natural_loss']:.4g}"
    )
    attacks = [f"{value:.4g} under {name}" for name, value in record["robust_loss"].items()]
    text += f", {', '.join(attacks)} {within}." if attacks else "."
    return f"{text} {_NEXT_STEP}"


def _weakest(record: Mapping[str, Any]) -> tuple[str, float]:
    """The attack that the model withstands least."""
    attack = min(record["robust_acc"], key=record["robust_acc"].__getitem__)
    return attack, record["robust_acc"][attack]
