"""Accuracies that were measured of a model, from ``evaluation.json`` or ``record.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dat_ds.errors import ExportError
from dat_ds.evaluation.checks import ALARMS
from dat_ds.evaluation.record import norm_in_words

RECORD_NAMES = ("evaluation.json", "record.json")
"""In the order in which they are looked for beside a model."""
_WORST_CASE = "all"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation found.

    Attributes:
        file: Name of the file.
        sha256: Of its bytes, in hexadecimal digits: the record's id.
        norm: Of the threat model: ``"linf"``.
        eps: As it was written: ``"8/255"``.
        data: Name of the dataset.
        num_examples: Images evaluated.
        natural_acc: Share classified correctly; None where the model does not classify.
        robust_acc: Share that stands after each attack, by its name.
        worst_case: Share that no attack of the ensemble broke; None where none was run.
        class_names: In the order of the outputs; None where they are not known.
        remarks: Checks of the evaluation that were not passed, in words.
        versions: Of the packages that it was made with.
    """

    file: str
    sha256: str
    norm: str
    eps: str
    data: str
    num_examples: int
    natural_acc: float | None
    robust_acc: Mapping[str, float]
    worst_case: float | None = None
    class_names: Sequence[str] | None = None
    remarks: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def threat(self) -> str:
        """The threat model in words."""
        return f"{norm_in_words(self.norm)}, eps {self.eps}"

    def rows(self) -> list[tuple[str, float]]:
        """What was measured, in words, and the accuracy in [0, 1]; no attack goes unnamed."""
        if self.natural_acc is None:
            return []
        rows = [("clean accuracy", self.natural_acc)]
        if self.worst_case is None:
            under = [(f"accuracy under {name}", acc) for name, acc in self.robust_acc.items()]
            return rows + [(f"{words} ({self.threat})", acc) for words, acc in under]
        attacks = ", ".join(self.robust_acc)
        words = f"robust accuracy, worst case over {attacks} ({self.threat})"
        return [*rows, (words, self.worst_case)]


def read_measured(file: Path) -> Measured:
    """Read a record.

    Args:
        file: ``evaluation.json`` or ``record.json``.

    Raises:
        ExportError: It is missing or no record.
    """
    try:
        content = file.read_bytes()
        values: dict[str, Any] = json.loads(content)
        return _measured(file.name, hashlib.sha256(content).hexdigest(), values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(
            f"'{file}' is not a record of an evaluation: {error!r}. Name the evaluation.json of "
            "dat-ds eval, or the record.json of a run."
        ) from None


def _measured(name: str, sha256: str, values: Mapping[str, Any]) -> Measured:
    dat = (values.get("config") or {}).get("dat", {})
    threat = values.get("threat_model") or dat["threat_model"]
    robust = {str(k): float(v) for k, v in (values.get("robust_acc") or {}).items()}
    worst = robust.pop(_WORST_CASE, None)
    remarks = [
        f"{check['name']}: {check['status']}. {check['found']} {check['meaning']}"
        for check in values.get("checks") or []
        if check["status"] in ALARMS
    ]
    return Measured(
        file=name,
        sha256=sha256,
        norm=threat["norm"],
        eps=str(threat["eps"]),
        data=str((values.get("data") or dat["data"])["name"]),
        num_examples=int(values["num_examples"]),
        natural_acc=values["natural_acc"],
        robust_acc=robust,
        worst_case=worst,
        class_names=values.get("class_names"),
        remarks=remarks,
        versions=values.get("versions") or {},
    )


def evaluated_model(file: Path) -> Path | None:
    """The model that an ``evaluation.json`` names as its target; None where it names none."""
    target = json.loads(file.read_text(encoding="utf-8")).get("target")
    return Path(target) if isinstance(target, str) else None
