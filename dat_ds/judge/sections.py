"""Sections of a report that are text and tables, from the evidence of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dat_ds.evaluation import figures, html
from dat_ds.evaluation.checks import ALARMS
from dat_ds.evaluation.curves import name_of
from dat_ds.evaluation.record import norm_in_words
from dat_ds.files import sha256_of
from dat_ds.judge.evidence import Evidence
from dat_ds.judge.words import (
    AGAIN,
    Section,
    count_of,
    data_in_words,
    interval_of,
    percent_of,
    short_of,
)

_ORDER = (*ALARMS, "ok", "skipped")


def lead_of(evidence: Evidence) -> str:
    """The numbers at the top, and a warning where checks call them into doubt."""
    evaluation = evidence.evaluation
    total = evaluation["num_examples"]
    entries = [*_accuracy_tiles(evidence), *_loss_tiles(evaluation)]
    if threat := evaluation.get("threat_model"):
        length = figures.length_in_words(threat["eps"])
        entries.append(
            (
                "Threat model",
                f"eps = {length}",
                [
                    f"{norm_in_words(threat['norm'])} norm",
                    f"pixel values in [{threat.get('lower', 0):g}, {threat.get('upper', 1):g}]",
                ],
            )
        )
    data = evaluation.get("data") or {}
    notes = [name] if (name := data_in_words(data)) else []
    if classes := evaluation.get("num_classes"):
        notes.append(f"{classes:,} classes")
    entries.append(("Images", f"{total:,}", notes))
    return _warning_of(evaluation.get("checks") or []) + html.tiles(entries)


def attacks_of(evidence: Evidence) -> Section:
    """How many images each attack was given and broke."""
    evaluation = evidence.evaluation
    attacks, total = evaluation["attacks"], evaluation["num_examples"]
    if not attacks:
        return ("attacks", "Attacks", html.missing("No attack was run. To run some:", AGAIN))
    in_order = evaluation.get("is_cumulative", True)
    header = ["Attack", "Attacked", "Broken", "Standing after", "Accuracy after"]
    keys = ("forwards", "backwards", "seconds")
    shown = [key for key in keys if any(attack.get(key) is not None for attack in attacks)]
    header += [key.capitalize() for key in shown]
    rows = []
    for attack in attacks:
        share = evaluation["robust_acc"][attack["name"]]
        standing = [f"{round(share * total):,}", percent_of(share)]
        rows.append([*_counts(attack), *standing, *(count_of(attack.get(key)) for key in shown)])
    caption = (
        "In order; each attack is given the images that no earlier one has broken. Forwards and "
        "backwards count images."
        if in_order
        else "Each attack is given every image that is classified correctly without an attack."
    )
    numbers = range(1, len(header))
    body = html.table(caption, header, rows, numbers=numbers)
    body += _stages_of(attacks)
    if (passes := evaluation.get("passes")) is not None:
        body += html.note(
            f"{count_of(passes)} passes of an image, forward and backward together "
            f"({count_of(round(passes / total))} for each of the images), in "
            f"{count_of(evaluation.get('seconds'))} seconds."
        )
    refused = sum(row.get("verified") is False for row in evidence.samples)
    if refused:
        body += html.note(
            f"{refused} more were misclassified during an attack but not when their image was "
            "shown alone in float32; they count as standing."
        )
    return ("attacks", "Attacks", body)


def checks_of(evidence: Evidence) -> Section:
    """The checks of the evaluation, those that call it into doubt first."""
    checks = evidence.evaluation.get("checks") or []
    if not checks:
        text = "The evaluation was not checked for masked gradients and the like. To check it:"
        return ("checks", "Checks", html.missing(text, AGAIN))
    ordered = sorted(checks, key=lambda check: _rank(check["status"]))
    alarms = [check for check in ordered if check["status"] in ALARMS]
    others = [check for check in ordered if check["status"] not in ALARMS]
    parts = []
    if alarms:
        caption = "Signs that the model only seems robust, or that the evaluation went wrong."
        rows = [[c["name"], c["status"], c["found"], c["meaning"], c["remedy"]] for c in alarms]
        header = ["Check", "Status", "Found", "What it means", "What to do"]
        parts.append(html.table(caption, header, rows, status=1, kind="prose"))
    if others:
        passed = sum(check["status"] == "ok" for check in others)
        caption = "Checks that raise no alarm."
        rows = [[c["name"], c["status"], c["found"]] for c in others]
        table = html.table(caption, ["Check", "Status", "Found"], rows, status=1, kind="prose")
        parts.append(html.collapsed(_counted(passed, len(others) - passed), table))
    return ("checks", "Checks", "".join(parts))


def _counted(passed: int, skipped: int) -> str:
    words = f"{passed} {'check' if passed == 1 else 'checks'} passed"
    return words if not skipped else f"{words}, {skipped} could not be made"


def pictures_of(evidence: Evidence) -> Section:
    """Images before and under attack."""
    examples = (evidence.curves or {}).get("examples")
    names = evidence.evaluation.get("class_names")
    found = []
    if examples is not None:
        changed = [
            f"{name_of(before, names)} becomes {name_of(after, names)}"
            for before, after in zip(examples["before"], examples["after"], strict=True)
            if before != after
        ]
        told = "; ".join(changed) if changed else "no prediction changes"
        count = len(examples["labels"])
        found.append(
            (
                evidence.folder / examples["file"],
                f"{count} images, their perturbations and adversarial images. Predictions: {told}.",
                f"{count} images of several classes under {examples['attack']}.",
            )
        )
    found.append(
        (
            evidence.run / "examples.png",
            "Test images, their perturbations and adversarial images, with the predicted classes.",
            "Test images of several classes after training, under the attack of the validation.",
        )
    )
    shown = [
        html.picture(path.read_bytes(), alt, caption)
        for path, alt, caption in found
        if path.is_file()
    ]
    if not shown:
        text = "There are no pictures of adversarial images. To draw them:"
        return ("pictures", "Pictures", html.missing(text, f"{AGAIN} --report"))
    return ("pictures", "Pictures", "".join(shown))


def provenance_of(evidence: Evidence) -> Section:
    """What made the numbers, and the files that hold them."""
    evaluation = evidence.evaluation
    threat, data = evaluation.get("threat_model"), evaluation.get("data") or {}
    rows: list[list[str]] = [["Target", str(evaluation["target"])]]
    if data:
        rows.append(["Data", ", ".join(str(value) for value in data.values() if value)])
    if threat:
        rows.append(["Threat model", _listed(threat)])
    for key in ("ensemble", "command", "seed", "ranks", "commit"):
        if evaluation.get(key) is not None:
            rows.append([key.capitalize(), str(evaluation[key])])
    for key in ("versions", "hardware"):
        if values := evaluation.get(key):
            rows.append([key.capitalize(), _listed(values)])
    body = html.table("Where the numbers come from.", ["What", "Value"], rows, kind="long")
    files = [[path.name, f"{path.stat().st_size:,}", sha256_of(path)] for path in evidence.files]
    caption = "The files that this page was made of."
    body += html.table(caption, ["File", "Bytes", "SHA-256"], files, numbers=[1], kind="long")
    if config := evaluation.get("config"):
        body += html.collapsed("The run's config", html.values_as_json(config))
    return ("provenance", "Provenance", body)


def _accuracy_tiles(evidence: Evidence) -> list[tuple[str, str, list[str]]]:
    evaluation, total = evidence.evaluation, evidence.evaluation["num_examples"]
    if evaluation["natural_acc"] is None:
        return []
    intervals = evaluation.get("intervals") or {}

    def tile(label: str, share: float, key: str, *notes: str) -> tuple[str, str, list[str]]:
        lines = [f"{round(share * total):,} of {total:,} images"]
        if key in intervals:
            lines.append(f"95 % CI: {interval_of(intervals[key])}")
        return (label[0].upper() + label[1:], percent_of(share), [*lines, *notes])

    tiles = [tile("Clean accuracy", evaluation["natural_acc"], "natural_acc")]
    worst, names = evidence.worst_case, ", ".join(evidence.attack_names)
    if worst is not None:
        notes = ["an upper bound: a stronger attack may find more"]
        if evidence.is_ensemble:
            notes.insert(0, f"worst case over the {evaluation['ensemble']} ensemble: {names}")
        elif len(evidence.attack_names) > 1:
            notes.insert(0, f"worst case over {names}")
        tiles.append(tile(evidence.worst_case_in_words(), worst, "all", *notes))
    return tiles


def _loss_tiles(evaluation: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Mean losses of a model that does not classify."""
    if evaluation.get("natural_loss") is None:
        return []
    losses = {"without an attack": evaluation["natural_loss"]}
    for name, value in (evaluation.get("robust_loss") or {}).items():
        losses[f"under {name}"] = value
    return [(f"Mean loss {name}", short_of(value), []) for name, value in losses.items()]


def _warning_of(checks: Sequence[Mapping[str, Any]]) -> str:
    failed = sum(check["status"] == "failed" for check in checks)
    suspicious = sum(check["status"] == "suspicious" for check in checks)
    if failed + suspicious == 0:
        return ""
    counts = ((failed, "failed"), (suspicious, "suspicious"))
    words = " and ".join(f"{count} {status}" for count, status in counts if count)
    text = f"Of {len(checks)} checks: {words}. Read them before you quote these numbers."
    return html.banner(text, "failed" if failed else "suspicious")


def _stages_of(attacks: Sequence[Mapping[str, Any]]) -> str:
    """The stages, where an attack has several."""
    if not any(len(attack.get("stages") or ()) > 1 for attack in attacks):
        return ""
    rows = [
        [s["label"], s["attacked"], s["broken"], s["forwards"], s["backwards"], s["seconds"]]
        for attack in attacks
        for s in attack.get("stages") or ()
    ]
    shown = [[label, *(count_of(value) for value in values)] for label, *values in rows]
    header = ["Stage", "Attacked", "Broken", "Forwards", "Backwards", "Seconds"]
    table = html.table("In the order in which they ran.", header, shown, numbers=range(1, 6))
    return html.collapsed(f"All {len(rows)} stages", table)


def _counts(attack: Mapping[str, Any]) -> list[str]:
    return [attack["name"], count_of(attack["attacked"]), count_of(attack["broken"])]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _rank(status: str) -> int:
    return _ORDER.index(status) if status in _ORDER else len(_ORDER)
