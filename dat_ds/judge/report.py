"""``report.html`` of an evaluation or a run, and the curves that it shows."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.attacks import SampleGenerator, ThreatModel, apgd, attack_mode
from dat_ds.attacks.gradient import Model
from dat_ds.contracts import Gate, GatedModel, as_images, check_images
from dat_ds.data import evaluation_batches
from dat_ds.errors import DataError
from dat_ds.evaluation import draw_examples, html
from dat_ds.evaluation.accuracy import device_of
from dat_ds.evaluation.curves import (
    accuracy_against_radius,
    accuracy_against_steps,
    loss_surface,
    radii_of,
)
from dat_ds.evaluation.figures import length_in_words
from dat_ds.evaluation.pictures import of_several_classes
from dat_ds.evaluation.record import norm_in_words
from dat_ds.files import replace_text, write_json, writing
from dat_ds.judge import charts, sections
from dat_ds.judge.evidence import CURVES, read_evidence
from dat_ds.judge.words import data_in_words

logger = logging.getLogger("dat_ds")

FIGURES = "figures"
"""Folder of a report's figures, as PNG."""
_EXAMPLES_ATTACK = "apgd-ce-50"
_EXAMPLES = 8
_CANDIDATES = 32  # images of which one is chosen for the surface


def write_report(folder: Path, file: Path | None = None) -> Path:
    """Write a page that shows all that a folder holds; its figures as PNG into ``figures/``.

    Args:
        folder: Of an evaluation or a run.
        file: The page. Default: ``report.html`` in the folder.

    Returns:
        The page's path.

    Raises:
        DataError: For a folder without a result, or files that cannot be read.
        CheckpointError: If the page cannot be written.
    """
    evidence = read_evidence(folder)
    album = charts.Album(folder / FIGURES)
    path = folder / "report.html" if file is None else file
    target = str(evidence.evaluation["target"])
    text = html.page(
        f"Robustness of {Path(target).name or target}",
        _subtitle(evidence.evaluation),
        sections.lead_of(evidence),
        [
            sections.checks_of(evidence),
            sections.attacks_of(evidence),
            charts.curves_of(evidence, album),
            charts.classes_of(evidence, album),
            sections.pictures_of(evidence),
            charts.training_of(evidence, album),
            sections.provenance_of(evidence),
        ],
    )
    replace_text(path, text)
    return path


def measure_curves(
    model: Model,
    data: Dataset[Any],
    threat: ThreatModel,
    folder: Path,
    *,
    num_examples: int | None = 200,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Path:
    """Measure the curves of a report and draw adversarial images; on one rank.

    Writes ``curves.json``, and ``figures/examples.png`` for images of 1 or 3 channels.

    Args:
        model: Pixels to logits. A module is put in eval mode and frozen meanwhile.
        data: Map-style dataset of ``(x, y)``.
        threat: Allowed perturbations.
        folder: Where to write; it is there.
        num_examples: First images of ``data``; None for all.
        class_names: Names of the classes, from 0 on.
        seed: Seed of the random starts.
        batch_size: Images per forward.
        device: Where images are sent. Default: where the module's parameters are, else the CPU.

    Returns:
        The path of ``curves.json``.

    Raises:
        DataError: For images or labels that are none, or no image at all.
        ModelError: For outputs that are not logits.
    """
    started = time.perf_counter()
    gate = Gate("classes")
    device = device_of(model) if device is None else torch.device(device)
    x, y = _images(data, num_examples, batch_size, threat, gate)
    x, y = x.to(device), y.to(device)
    called = GatedModel(model, gate)
    with attack_mode(model):
        radii = radii_of(threat)
        values: dict[str, Any] = {
            "threat_model": {**dataclasses.asdict(threat), "eps": length_in_words(threat.eps)},
            "num_examples": len(x),
            "seed": seed,
            "against_radius": accuracy_against_radius(
                called, x, y, threat, radii, seed=seed, batch_size=batch_size
            ),
            "against_steps": accuracy_against_steps(
                called, x, y, threat, seed=seed, batch_size=batch_size
            ),
            "surface": _surface(called, x, y, threat, seed, batch_size),
            "examples": _examples(called, x, y, threat, folder, class_names, seed),
        }
    values["seconds"] = time.perf_counter() - started
    path = folder / CURVES
    write_json(path, values)
    logger.info("Curves: %s", path)
    return path


def _subtitle(evaluation: Mapping[str, Any]) -> str:
    """Data and threat model in a line."""
    words = [f"{evaluation['num_examples']:,} images"]
    if name := data_in_words(evaluation.get("data") or {}):
        words.append(f"of {name}")
    if threat := evaluation.get("threat_model"):
        words.append(
            f"under perturbations of {norm_in_words(threat['norm'])} norm up to "
            f"{length_in_words(threat['eps'])}"
        )
    return " ".join(words) + "."


def _images(
    data: Dataset[Any], num_examples: int | None, batch_size: int, threat: ThreatModel, gate: Gate
) -> tuple[Tensor, Tensor]:
    """The first images and their classes, of which the gate knows."""
    images, labels = [], []
    for x, y, _ in evaluation_batches(data, batch_size=batch_size, num_examples=num_examples):
        pixels = as_images(x)
        check_images(pixels, threat.lower, threat.upper)
        images.append(pixels)
        labels.append(gate.true_classes(y, len(pixels)))
    if not images:
        raise DataError("There is no image to measure curves on: the dataset is empty.")
    classes = torch.cat(labels)
    if (expected := gate.labels(classes, len(classes))) is not None:
        gate.expect(expected)  # the model's first outputs tell how many classes there are
    return torch.cat(images), classes


def _surface(
    model: Model, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, batch_size: int
) -> dict[str, Any] | None:
    """The surface around the first image that the attack breaks, else the first correct one."""
    x, y = x[:_CANDIDATES], y[:_CANDIDATES]
    generator = SampleGenerator(seed, 0, stream="choice of a surface")
    x_adv = apgd(model, x, y, threat=threat, steps=20, loss="cw", generator=generator)
    with torch.no_grad():
        correct = model(x).argmax(dim=1) == y
        broken = correct & (model(x_adv).argmax(dim=1) != y)
    rows = [*broken.nonzero().flatten().tolist(), *correct.nonzero().flatten().tolist()]
    if not rows:
        return None
    index = rows[0]
    found = loss_surface(model, x[index], int(y[index]), threat, seed=seed, batch_size=batch_size)
    return {"index": index, **found}


def _examples(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    folder: Path,
    class_names: Sequence[str] | None,
    seed: int,
) -> dict[str, Any] | None:
    """Draw images under attack; None where a picture cannot show their channels."""
    if x.shape[1] not in (1, 3):
        return None
    file = Path(FIGURES) / "examples.png"
    with writing(folder / file):
        (folder / file).parent.mkdir(exist_ok=True)
    shown = of_several_classes(y, _EXAMPLES)
    found = draw_examples(
        {"": model},
        x[shown],
        y[shown],
        threat,
        _EXAMPLES_ATTACK,
        folder / file,
        class_names=class_names,
        seed=seed,
    )
    return {"file": str(file), "attack": _EXAMPLES_ATTACK, **found[""]}
