"""Figures of an evaluation and of a training run, from their JSON alone.

Colours are Okabe and Ito's, told apart by colour-blind readers; lines differ in marker and dash as
well, so that a grey print says the same.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dat_ds.evaluation.record import norm_in_words
from dat_ds.length import Length

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
LARGEST_CLASSES = 20
"""Classes that a figure shows; of more, those with the smallest accuracy."""

_DPI = 200
_LABEL, _TICK = 9, 8  # points


def length_in_words(value: float | str) -> str:
    """A length as it was written; else a short decimal, or in 255ths by quarters of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, Length):
        return str(value)
    steps = 255 * value
    if value != round(value, 3) and abs(4 * steps - round(4 * steps)) < 1e-4:
        return f"{round(4 * steps) / 4:g}/255"
    return f"{value:.4g}"


def as_png(figure: Figure) -> bytes:
    """A figure as a PNG file, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def radius_figure(curve: Mapping[str, Any], eps: float | None = None) -> Figure:
    """Accuracy against the radius, with its 95 % intervals.

    Args:
        curve: Of :func:`dat_ds.evaluation.curves.accuracy_against_radius`.
        eps: Radius of the threat model, which is marked.
    """
    radii = [float(radius) for radius in curve["radii"]]
    in_255ths = all("/255" in length_in_words(radius) for radius in radii[1:])
    scale, unit = (255, "1/255") if in_255ths else (1, "pixel units")
    figure, axis = _one_axis()
    shown = [scale * radius for radius in radii]
    _band(axis, shown, curve["intervals"], BLUE)
    axis.plot(shown, _percent(curve["accuracy"]), color=BLUE, marker="o", ms=4, lw=1.5)
    if eps is not None and 0 < eps <= max(radii):
        axis.axvline(scale * eps, color=GREY, lw=1, ls=":")
        axis.annotate(
            f"eps = {length_in_words(eps)}",
            (scale * eps, 100),
            xytext=(4, -2),
            textcoords="offset points",
            fontsize=_TICK,
            color=GREY,
            va="top",
        )
    axis.set_xlim(left=0)
    _label(axis, f"{norm_in_words(curve['norm'])} radius, in {unit}", "Accuracy (%)")
    return figure


def steps_figure(curve: Mapping[str, Any]) -> Figure:
    """Accuracy against the attack's steps, with its 95 % intervals.

    Args:
        curve: Of :func:`dat_ds.evaluation.curves.accuracy_against_steps`.
    """
    figure, axis = _one_axis()
    steps = curve["steps"]
    natural = 100 * curve["natural"] / curve["num_examples"]
    axis.axhline(natural, color=ORANGE, lw=1.2, ls="--", label="without an attack")
    _band(axis, steps, curve["intervals"], BLUE)
    shown = _percent(curve["accuracy"])
    axis.plot(steps, shown, color=BLUE, marker="o", ms=4, lw=1.5, label="under the attack")
    axis.set_xscale("log")
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.legend(fontsize=_TICK, frameon=False)
    _label(axis, "Steps of the attack", "Accuracy (%)")
    return figure


def class_figure(classes: Sequence[Mapping[str, Any]], robust: str) -> Figure:
    """Accuracy of each class without and under attack, with 95 % intervals.

    Args:
        classes: Of :func:`dat_ds.evaluation.curves.accuracy_by_class`.
        robust: Name of the accuracy under attack.
    """
    shown = sorted(classes, key=lambda row: (row["robust_acc"], row["natural_acc"]))
    shown = shown[:LARGEST_CLASSES][::-1]
    figure = Figure(figsize=(6.4, 0.9 + 0.27 * len(shown)), layout="constrained")
    axis = figure.subplots()
    lines = (("natural", ORANGE, "s", 0.14, "clean accuracy"), ("robust", BLUE, "o", -0.14, robust))
    for key, colour, marker, shift, label in lines:
        values = np.array(_percent(row[f"{key}_acc"] for row in shown))
        ends = 100 * np.array([row[f"{key}_interval"] for row in shown]).T
        axis.errorbar(
            values,
            np.arange(len(shown)) + shift,
            xerr=np.clip(np.abs(ends - values), 0, None),
            fmt=marker,
            ms=5,
            mfc="white" if key == "natural" else colour,
            color=colour,
            elinewidth=1,
            label=label,
        )
    axis.set_yticks(range(len(shown)), [_shortened(row["name"]) for row in shown])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlim(-2, 102)
    axis.grid(axis="x", color="0.9", lw=0.8)
    _tidy(axis)
    axis.set_xlabel("Accuracy (%)", fontsize=_LABEL)
    figure.legend(loc="outside upper center", ncols=2, fontsize=_TICK, frameon=False)
    return figure


def surface_figure(surface: Mapping[str, Any]) -> Figure:
    """Margin around one image; a black line is the border of its class.

    Args:
        surface: Of :func:`dat_ds.evaluation.curves.loss_surface`.
    """
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    axis = figure.subplots()
    along, across = surface["along"], surface["across"]
    margin = np.array(surface["margin"])
    levels = MaxNLocator(14).tick_values(*_ends(margin))
    filled = axis.contourf(along, across, margin, levels=levels, cmap="cividis")
    if margin.min() < 0 < margin.max():
        axis.contour(along, across, margin, levels=[0.0], colors="black", linewidths=2)
    for x, marker, name in ((0, "o", "image"), (1, "X", "adversarial image")):
        axis.plot(x, 0, marker=marker, ms=9, color="white", mec="black", ls="", label=name)
    bar = figure.colorbar(filled, ax=axis)
    bar.set_label("Margin: true logit - largest other logit", fontsize=_LABEL)
    bar.ax.tick_params(labelsize=_TICK)
    axis.set_xlabel("Along the adversarial perturbation", fontsize=_LABEL)
    axis.set_ylabel("Along a random one of the same length", fontsize=_LABEL)
    _tidy(axis)
    figure.legend(loc="outside upper center", ncols=2, fontsize=_TICK, frameon=False)
    return figure


def training_figure(
    rows: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Loss, accuracy, learning rate and seconds of a training run against its epochs.

    Args:
        rows: Rows of ``metrics.jsonl``; None and missing numbers leave gaps.
        validation: Rows of a record's ``validation``.
    """
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    (loss, accuracy), (rate, seconds) = figure.subplots(2, 2, sharex=True)
    _series(loss, rows, "loss", BLUE)
    _label(loss, "", "Training loss", zero_to_100=False)
    _series(accuracy, rows, "natural_acc", ORANGE, "--", 100, "clean, training batch")
    _series(accuracy, rows, "robust_acc", BLUE, "-", 100, "under attack, training batch")
    _validation(accuracy, validation)
    _label(accuracy, "", "Accuracy (%)")
    _series(rate, rows, "lr", BLUE)
    rate.set_ylim(bottom=0)
    _label(rate, "Epoch", "Learning rate", zero_to_100=False)
    _series(seconds, rows, "seconds_attack", BLUE, "-", 1, "attack")
    _series(seconds, rows, "seconds_update", ORANGE, "--", 1, "update")
    seconds.set_ylim(bottom=0)
    _label(seconds, "Epoch", "Seconds a step", zero_to_100=False)
    for axis in (accuracy, seconds):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=_TICK - 1, frameon=False)
    return figure


def _validation(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    natural = [(row["epoch"], row["natural_acc"]) for row in rows if row.get("natural_acc")]
    robust = [
        (row["epoch"], min(row["robust_acc"].values())) for row in rows if row.get("robust_acc")
    ]
    for points, colour, marker, name in (
        (natural, ORANGE, "s", "clean, validation"),
        (robust, BLUE, "o", "under attack, validation"),
    ):
        if points:
            epochs, values = zip(*points, strict=True)
            face = "white" if marker == "s" else colour
            axis.plot(
                epochs, _percent(values), marker, ms=4, color=colour, mfc=face, ls="", label=name
            )


def _series(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    style: str = "-",
    scale: float = 1,
    label: str | None = None,
) -> None:
    values = [row.get(key) for row in rows]
    if any(value is not None for value in values):
        shown = [math.nan if value is None else scale * value for value in values]
        epochs = [row.get("epoch", row["step"]) for row in rows]
        axis.plot(epochs, shown, color=colour, lw=1.2, ls=style, label=label)


def _one_axis() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 3.3), layout="constrained")
    return figure, figure.subplots()


def _band(
    axis: Axes, x: Sequence[float], intervals: Sequence[Sequence[float]], colour: str
) -> None:
    low, high = zip(*intervals, strict=True)
    axis.fill_between(x, _percent(low), _percent(high), color=colour, alpha=0.18, lw=0)


def _label(axis: Axes, x: str, y: str, *, zero_to_100: bool = True) -> None:
    axis.set_xlabel(x, fontsize=_LABEL)
    axis.set_ylabel(y, fontsize=_LABEL)
    if zero_to_100:
        axis.set_ylim(-2, 102)
    axis.grid(axis="y", color="0.9", lw=0.8)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=_TICK)


def _percent(values: Any) -> list[float]:
    return [100 * value for value in values]


def _ends(values: Any) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 1, high + 1)


def _shortened(name: str, length: int = 24) -> str:
    # A dollar sign would begin a formula.
    short = name if len(name) <= length else name[: length - 1] + "\u2026"
    return short.replace("$", r"\$")
