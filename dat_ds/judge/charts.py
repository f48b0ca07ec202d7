"""Sections of a report that show figures.

Each takes the evidence of a folder and the album that its figures go to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dat_ds.evaluation import figures, html
from dat_ds.evaluation.curves import accuracy_by_class, name_of
from dat_ds.evaluation.record import norm_in_words
from dat_ds.evaluation.report import describe_training
from dat_ds.evaluation.samples import SAMPLES
from dat_ds.files import writing
from dat_ds.judge.evidence import CURVES, METRICS, Evidence
from dat_ds.judge.words import AGAIN, Section, interval_of, percent_of, short_of
from dat_ds.length import Length

_LOSSES = {"ce": "cross-entropy", "cw": "the margin", "dlr": "the DLR loss"}
_TRAIN = "dat-ds train --deepspeed_config FILE"
_OPEN_CLASSES = 20  # a longer table is opened by the reader


class Album:
    """Figures of a report: PNG files beside it, and inside it.

    Args:
        folder: For the files; made when the first is written.

    Raises:
        CheckpointError: If a file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, figure: Figure, alt: str, caption: str, kind: str = "") -> str:
        """Write a figure as ``NAME.png``; the HTML that shows it."""
        png = figures.as_png(figure)
        path = self._folder / f"{name}.png"
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
        return html.picture(png, alt, caption, kind)


def curves_of(evidence: Evidence, album: Album) -> Section:
    """Accuracy against radius and steps, and the margin around an image."""
    curves = evidence.curves
    if curves is None:
        text = f"There are no curves ({CURVES}). To measure them:"
        return ("curves", "Curves", html.missing(text, f"{AGAIN} --report"))
    drawn, tables = [], ""
    if radius := curves.get("against_radius"):
        drawn.append(_radius_of(radius, _eps_of(evidence), album))
        words = [figures.length_in_words(value) for value in radius["radii"]]
        tables += _table_of(radius, "Radius", words)
    if steps := curves.get("against_steps"):
        drawn.append(_steps_of(steps, _eps_of(evidence), album))
        tables += _table_of(steps, "Steps", [str(step) for step in steps["steps"]])
    body = html.side_by_side(drawn) + html.collapsed("The curves as tables", tables)
    if surface := curves.get("surface"):
        body += _surface_of(surface, evidence.evaluation.get("class_names"), album)
    return ("curves", "Curves", body)


def classes_of(evidence: Evidence, album: Album) -> Section:
    """Accuracy of each class."""
    if not evidence.samples:
        text = f"Accuracy by class needs the outcome of every sample ({SAMPLES}). To write it:"
        return ("classes", "By class", html.missing(text, AGAIN))
    name = evidence.worst_case_in_words()
    classes = accuracy_by_class(evidence.samples, evidence.evaluation.get("class_names"))
    worst = min(classes, key=lambda row: row["robust_acc"])
    best = max(classes, key=lambda row: row["robust_acc"])
    some = len(classes) > figures.LARGEST_CLASSES
    which = f"The {figures.LARGEST_CLASSES} classes with the smallest" if some else "By class:"
    figure = album.add(
        "accuracy_by_class",
        figures.class_figure(classes, name),
        f"Points for {len(classes)} classes: {name} from {percent_of(worst['robust_acc'])} "
        f"({worst['name']}) to {percent_of(best['robust_acc'])} ({best['name']}).",
        f"{which} {name}. Bars are 95 % intervals (Wilson).",
        "narrow",
    )
    header = ["Class", "Images", "Clean accuracy", name.capitalize(), "95 % interval"]
    rows = [
        [
            row["name"],
            row["num_examples"],
            percent_of(row["natural_acc"]),
            percent_of(row["robust_acc"]),
            interval_of(row["robust_interval"]),
            "-" if row["taken_for"] is None else f"{row['taken_for']} ({row['taken_count']})",
        ]
        for row in classes
    ]
    header.append("Most often taken for")
    caption = "The last column counts the images of the class that an attack broke."
    table = html.table(caption, header, rows, numbers=range(1, 5))
    if len(rows) > _OPEN_CLASSES:
        table = html.collapsed(f"All {len(rows)} classes", table)
    return ("classes", "By class", figure + table)


def training_of(evidence: Evidence, album: Album) -> Section:
    """The course of the training run."""
    rows = evidence.metrics
    if not rows:
        text = f"Training curves need {METRICS}, which training writes into the folder of a run:"
        return ("training", "Training", html.missing(text, _TRAIN))
    record = evidence.record or {}
    last = rows[-1]
    words = [f"{last['step']} optimizer steps"]
    if last.get("epoch") is not None:
        words.append(f"{last['epoch']:.4g} epochs")
    if dat := (record.get("config") or evidence.evaluation.get("config") or {}).get("dat"):
        words.append(f"training: {describe_training(dat)}")
    figure = album.add(
        "training",
        figures.training_figure(rows, record.get("validation") or ()),
        f"Four panels over the epochs: training loss, which ends at {short_of(last.get('loss'))}; "
        "accuracy; learning rate; seconds of attack and update in a step.",
        f"{', '.join(words)}. Accuracies are of the step's own batch; points are of the validation "
        "images.",
    )
    return ("training", "Training", figure)


def _radius_of(curve: Mapping[str, Any], eps: Length | None, album: Album) -> str:
    first, last = percent_of(curve["accuracy"][0]), percent_of(curve["accuracy"][-1])
    return album.add(
        "accuracy_against_radius",
        figures.radius_figure(curve, eps),
        f"Line that falls from an accuracy of {first} without an attack to {last} at radius "
        f"{figures.length_in_words(curve['radii'][-1])}.",
        f"Accuracy against the radius: {_attacks_in_words(curve)}, at each radius on the "
        f"images that withstand the smaller ones. {_band_of(curve)}",
    )


def _steps_of(curve: Mapping[str, Any], eps: Length | None, album: Album) -> str:
    first, last = percent_of(curve["accuracy"][0]), percent_of(curve["accuracy"][-1])
    radius = figures.length_in_words(curve["eps"] if eps is None else eps)
    return album.add(
        "accuracy_against_steps",
        figures.steps_figure(curve),
        f"Line that falls from an accuracy of {first} after {curve['steps'][0]} step(s) to {last} "
        f"after {curve['steps'][-1]}.",
        f"Accuracy in the course of one run of {_attacks_in_words(curve)}, eps = {radius}. Where "
        f"the line still falls at its end, attack with more steps. {_band_of(curve)}",
    )


def _surface_of(surface: Mapping[str, Any], names: Sequence[str] | None, album: Album) -> str:
    at_image, at_adversarial = (_margin_at(surface, place) for place in (0, 1))
    label = name_of(surface["label"], names)
    which = f"image {surface['index']}" if "index" in surface else "an image"
    return album.add(
        "margin_around_an_image",
        figures.surface_figure(surface),
        f"Map of the margin around {which}: {at_image:.3g} at the image, {at_adversarial:.3g} at "
        "the adversarial image.",
        f"Margin around {which} ({label}), in the plane of an adversarial and of a random "
        f"perturbation of the same {norm_in_words(surface['norm'])} length, "
        f"{figures.length_in_words(surface['length'])}. The black line is the border of its class.",
        "narrow",
    )


def _margin_at(surface: Mapping[str, Any], along: float) -> float:
    def nearest(values: Sequence[float], place: float) -> int:
        return min(range(len(values)), key=lambda i: abs(values[i] - place))

    row, column = nearest(surface["across"], 0), nearest(surface["along"], along)
    return float(surface["margin"][row][column])


def _table_of(curve: Mapping[str, Any], name: str, places: Sequence[str]) -> str:
    rows = [
        [place, f"{count:,}", percent_of(share), interval_of(interval)]
        for place, count, share, interval in zip(
            places, curve["standing"], curve["accuracy"], curve["intervals"], strict=True
        )
    ]
    header = [name, "Standing", "Accuracy", "95 % interval"]
    caption = f"Of {curve['num_examples']:,} images, {_attacks_in_words(curve)}."
    return html.table(caption, header, rows, numbers=range(1, 4))


def _attacks_in_words(curve: Mapping[str, Any]) -> str:
    attacks = curve.get("attacks") or [curve["attack"]]
    return " and then ".join(
        f"{attack['name'].upper()} on {_LOSSES.get(attack['loss'], attack['loss'])} with "
        f"{attack['steps']} steps"
        for attack in attacks
    )


def _band_of(curve: Mapping[str, Any]) -> str:
    return f"Band: 95 % interval (Wilson) of {curve['num_examples']:,} images."


def _eps_of(evidence: Evidence) -> Length | None:
    """The radius of the threat model, as it was written."""
    curves = evidence.curves or {}
    threat = evidence.evaluation.get("threat_model") or curves.get("threat_model")
    return None if threat is None else Length(threat["eps"])
