"""Published results, trained and judged again: what was published beside what is measured.

All models of a table are judged by the same attacks on the same images, the published network too
where it is at hand.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dat_ds.bench.records import write_record
from dat_ds.bench.tables.runs import judged_by, markdown, record_of, run_of, spread, unknown_rows
from dat_ds.config import RunConfig
from dat_ds.data.method import name_of_data
from dat_ds.engine.launch import setup_ranks
from dat_ds.errors import ConfigError, DataError
from dat_ds.files import check_files
from dat_ds.judge.evaluate import Question, evaluate_target
from dat_ds.judge.target import open_case

CLEAN = "clean"
# A run that was trained earlier has a commit and versions of its own.
_KEPT = ("seed", "steps", "ranks", "config", "events", "commit", "versions", "hardware")


@dataclass(frozen=True)
class Reproduction:
    """A published result and the runs that stand beside it.

    Args:
        source: Author, venue, place in the text.
        image_shape: ``(C, H, W)`` of the images of the publication.
        published: Accuracies as fractions: ``"clean"``, names of evaluation attacks, ``"standard"``
            for an ensemble like AutoAttack.
        protocol: How the publication attacks, where it differs from the attack of that name.
        attacks: Evaluation attacks of the publication, on all test images.
        variants: What each run changes in the config that they share, by name.
        labels_from: The variant whose model labels the unlabelled images of another, by the
            latter's name. It stands earlier in ``variants``; seeds go together.
        judge: The ensemble that judges every model beside those attacks.
    """

    source: str
    image_shape: tuple[int, int, int]
    published: Mapping[str, float]
    attacks: tuple[str, ...]
    protocol: str = ""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"ours": {}})
    labels_from: Mapping[str, str] = field(default_factory=dict)
    judge: str = "standard"


@dataclass(frozen=True)
class Reference:
    """A published network.

    Args:
        target: As ``dat-ds eval`` takes it.
        imports: Modules that it needs.
    """

    target: str
    imports: Sequence[str] = ()


def reproduce(
    what: Reproduction,
    config: Path,
    folder: Path,
    *,
    data: Mapping[str, Any],
    seeds: int,
    num_examples: int,
    variants: Sequence[str] = (),
    reference: Reference | None = None,
    output: Path | None = None,
) -> str:
    """Train every variant with every seed, judge the models, and compare with what was published.

    A collective under a launcher.

    Args:
        what: The result.
        config: The run that all variants change.
        folder: For the runs; one that is there already is not trained again, on however many ranks
            it was.
        data: Keys of ``dat.data`` that say where the images are.
        seeds: Number of seeds, from 0 on.
        variants: Those to train and judge; none means all.
        num_examples: First test images that the ensemble attacks.
        reference: The published network, to be judged by the same attacks.
        output: JSON file; None writes nothing.

    Returns:
        A markdown table: accuracies in percent, mean and standard deviation over seeds. Empty on
        other ranks than 0.

    Raises:
        UserError: For mistakes in what was asked for, before the first training, and where a run
            was stopped.
    """
    chosen = list(variants or what.variants)
    _check_request(what, chosen, seeds=seeds, num_examples=num_examples)
    check_files(output=output)

    def run_folder(variant: str, seed: int) -> Path:
        return folder / _file_name(variant) / f"seed-{seed}"

    def changes_of(variant: str, seed: int) -> dict[str, Any]:
        labels = what.labels_from.get(variant)
        extra = {} if labels is None else {"pseudo_labels": str(run_folder(labels, seed))}
        return _changes(what, variant, seed, {**data, **extra})

    # Mistakes in what comes later are told before hours of training.
    runs = [run_of(config, changes_of(variant, 0)) for variant in chosen]
    _check_images(what, runs[0], reference)
    measured: dict[str, list[dict[str, Any]]] = {}
    for variant in chosen:
        measured[variant] = [
            _judged(
                run_folder(variant, seed),
                config,
                changes_of(variant, seed),
                what.judge,
                num_examples,
            )
            for seed in range(seeds)
        ]
    values: dict[str, Any] = {
        "source": what.source,
        "protocol": what.protocol,
        "published": dict(what.published),
        "judge": what.judge,
        "num_examples": num_examples,
        "measured": measured,
    }
    if reference is not None:
        values["reference"] = _judge_reference(what, runs[0], reference, num_examples, folder)
    ranks = setup_ranks()
    with ranks.together():
        if ranks.is_main:
            write_record(None if output is None else str(output), values, torch.device("cpu"))
    return table_of(values) if ranks.is_main else ""


def _check_request(
    what: Reproduction, variants: Sequence[str], *, seeds: int, num_examples: int
) -> None:
    problems = [
        f"--{key} {count}: give at least 1."
        for key, count in (("seeds", seeds), ("num_examples", num_examples))
        if count < 1
    ]
    problems += unknown_rows(variants, what.variants, "--variants ")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_images(what: Reproduction, run: RunConfig, reference: Reference | None) -> None:
    """See that the images are those of the publication, and that its network takes them."""
    name = name_of_data(run.dat.data)
    if reference is None:
        images = run.dat.data.read_test(run.dat.seed).images
    else:
        case = open_case(
            reference.target,
            data=name,
            threat=str(run.dat.threat_model),
            imports=reference.imports,
        )
        images = case.images
    if tuple(images.image_shape) != what.image_shape:
        raise DataError(
            f"--data {name}: its images have the shape (C, H, W) = {tuple(images.image_shape)}, "
            f"those of the publication {what.image_shape}. Name the images of the publication, "
            "such as --data npz:FILE."
        )
    if reference is not None:
        with torch.no_grad():
            case.target.model(images[0][0][None])


def _file_name(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", variant)


def _changes(
    what: Reproduction, variant: str, seed: int, data: Mapping[str, Any]
) -> dict[str, Any]:
    changes = dict(what.variants[variant])
    dat = dict(changes.get("dat", {}))
    dat["data"] = {**dat.get("data", {}), **data}
    return {**changes, "dat": {**dat, "seed": seed, "evaluation": judged_by(what.attacks)}}


def _judged(
    folder: Path, config: Path, changes: Mapping[str, Any], judge: str, num_examples: int
) -> dict[str, Any]:
    """What a run came to, under the attacks of the publication and the ensemble."""
    record = record_of(folder, config, changes)
    judged = evaluate_target(
        Question(target=str(folder), attacks=[judge], num_examples=num_examples)
    )
    return {
        **{key: record[key] for key in _KEPT},
        "seconds": record["seconds"]["train"],
        CLEAN: record["natural_acc"],
        **record["robust_acc"],
        judge: judged["robust_acc"]["all"],
    }


def _judge_reference(
    what: Reproduction, run: RunConfig, reference: Reference, num_examples: int, folder: Path
) -> dict[str, Any]:
    """Accuracies of the published network under the same attacks."""

    def ask(attacks: Sequence[str], count: int | None) -> dict[str, Any]:
        question = Question(
            target=reference.target,
            imports=reference.imports,
            data=name_of_data(run.dat.data),
            threat=str(run.dat.threat_model),
            attacks=attacks,
            num_examples=count,
            output=folder / "reference" / "+".join(attacks),
            checks=False,
        )
        return evaluate_target(question)

    accuracies: dict[str, Any] = {"target": reference.target}
    for name in what.attacks:
        found = ask([name], None)
        accuracies |= {CLEAN: found["natural_acc"], name: found["robust_acc"]["all"]}
    return accuracies | {what.judge: ask([what.judge], num_examples)["robust_acc"]["all"]}


def table_of(values: Mapping[str, Any]) -> str:
    """The table of a record.

    Args:
        values: As :func:`reproduce` writes them.
    """
    measured, reference = values["measured"], values.get("reference")
    rows = next(iter(measured.values()))[0]
    names = [key for key in rows if key not in (*_KEPT, "seconds")]
    columns = [
        f"`{n}`, first {values['num_examples']} %" if n == values["judge"] else f"{n} %"
        for n in names
    ]
    lines = []
    if values["published"]:
        published = [_percent(values["published"].get(name)) for name in names]
        lines.append(["published", *published, "", ""])
    if reference is not None:
        lines.append(["published network, here", *(_percent(reference[n]) for n in names), "", ""])
    for variant, runs in measured.items():
        seconds = f"{statistics.median(run['seconds'] for run in runs):.0f}"
        ranks = ", ".join(sorted({str(run["ranks"]) for run in runs}))
        scores = [spread([run[name] for run in runs], 2) for name in names]
        lines.append([variant, *scores, ranks, seconds])
    return markdown(["", *columns, "ranks", "train s"], lines)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
