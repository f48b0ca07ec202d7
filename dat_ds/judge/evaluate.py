"""Evaluating a model under an ensemble of attacks, on one or many ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from dat_ds.attacks import parse_evaluation_attack
from dat_ds.attacks.ensemble import ENSEMBLES, attack_names
from dat_ds.attacks.passes.precision import Precision
from dat_ds.engine.launch import setup_ranks
from dat_ds.errors import ConfigError
from dat_ds.evaluation.checks import ALARMS, check_outcome
from dat_ds.evaluation.ensemble import EnsembleEvaluation, Outcome, Progress, StageCost
from dat_ds.evaluation.environment import commit, hardware, versions
from dat_ds.evaluation.samples import (
    EVALUATION,
    Journal,
    clear_progress,
    open_folder,
    parse_ranges,
    ranges_of,
    wilson_interval,
    write_samples,
)
from dat_ds.files import sha256_of, write_json
from dat_ds.judge.doctor import examine
from dat_ds.judge.report import measure_curves, write_report
from dat_ds.judge.target import Case, open_case
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_CHECKED = 128  # images that the checks of the model look at
_DRAWN = 200  # of those that were evaluated, for the curves of a report


@dataclass(frozen=True, kw_only=True)
class Question:
    """An evaluation as it was asked for.

    Args:
        target: See :func:`dat_ds.judge.target.open_case`, as for the next four.
        data: Images.
        threat: Ball.
        overrides: Keys over the config.
        imports: Modules to import.
        attacks: Names of attacks and ensembles, in order.
        num_examples: First images of the data; None for all.
        indices: Images of the data, such as ``"0-99,200"``, in the place of the first ones.
        batch_size: Images of a forward at most.
        seed: Of the attacks' random numbers.
        prefilter: Precision of a first pass of the first attack, which float32 confirms.
        output: Folder of the results; None for the run's own, or one named after the target.
        checks: Whether the model is checked for faults that make the result doubtful.
        report: Whether curves are measured and a page is written.
    """

    target: str
    data: str | None = None
    threat: str | None = None
    overrides: Sequence[str] = ()
    imports: Sequence[str] = ()
    attacks: Sequence[str] = ("standard",)
    num_examples: int | None = None
    indices: str | None = None
    batch_size: int = 128
    seed: int = 0
    prefilter: Precision | None = None
    output: Path | None = None
    checks: bool = True
    report: bool = False

    def __post_init__(self) -> None:
        """Refuse counts below 1.

        Raises:
            ConfigError: For the first.
        """
        for key in ("batch_size", "num_examples"):
            count = getattr(self, key)
            if count is not None and count < 1:
                raise ConfigError(f"--{key} {count}: give at least 1.")


def evaluate_target(question: Question) -> dict[str, Any]:
    """Evaluate a model and write ``evaluation.json`` and ``samples.jsonl``; a collective.

    An evaluation that was interrupted goes on where it stood; one that is finished is read.

    Args:
        question: What is asked for.

    Returns:
        Contents of ``evaluation.json``.

    Raises:
        UserError: For every mistake in what was asked for, on all ranks.
    """
    ranks = setup_ranks()
    with ranks.together():
        case = open_case(
            question.target,
            data=question.data,
            threat=question.threat,
            overrides=question.overrides,
            imports=question.imports,
            device=ranks.device,
        )
        names = _names_of(question, case)
        indices = _indices_of(question, len(case.images))
        output = _output_of(question, case)
        plan = _plan(question, case, names, indices)
        is_finished = ranks.is_main and open_folder(output, plan)
    if ranks.gather(is_finished)[0]:
        logger.info("%s holds this evaluation already: remove the folder to repeat it.", output)
        finished: dict[str, Any] = json.loads((output / EVALUATION).read_text(encoding="utf-8"))
        with ranks.together():
            if ranks.is_main and question.report:
                _report(question, case, indices, output)
        return finished
    with _progress_bar(ranks) as bar:
        evaluation = EnsembleEvaluation(
            model=case.target.model,
            data=cast("Dataset[Any]", case.images),
            threat=case.threat.build(),
            attacks=[parse_evaluation_attack(name) for name in names],
            indices=indices,
            batch_size=question.batch_size,
            seed=question.seed,
            ranks=ranks,
            journal=Journal(output, ranks.rank),
            prefilter=question.prefilter,
            progress=bar,
        )
        outcome = evaluation.run()
    record = _record(question, case, indices, outcome, ranks)
    with ranks.together():
        if ranks.is_main:
            write_samples(output, outcome.samples)
            record["checks"] = _findings(question, case, record, outcome, ranks)
            write_json(output / EVALUATION, record)
            clear_progress(output)
            _announce(record, output)
            if question.report:
                _report(question, case, indices, output)
    return record


def _findings(
    question: Question, case: Case, record: dict[str, Any], outcome: Outcome, ranks: Ranks
) -> list[dict[str, Any]]:
    """Findings of the checks of the result and, where they are wanted, of the model."""
    findings = check_outcome(record, [sample.to_dict() for sample in outcome.samples])
    if question.checks:
        findings += examine(case, _CHECKED, seed=question.seed, device=ranks.device, seconds=60)
    return [finding.to_dict() for finding in findings]


def _report(question: Question, case: Case, indices: Sequence[int], output: Path) -> None:
    measure_curves(
        case.target.model,
        Subset(cast("Dataset[Any]", case.images), list(indices[:_DRAWN])),
        case.threat.build(),
        output,
        class_names=case.class_names,
        seed=question.seed,
        batch_size=question.batch_size,
    )
    logger.info("Report: %s", write_report(output))


def _names_of(question: Question, case: Case) -> list[str]:
    """Names of the attacks with ensembles written out."""
    try:
        return attack_names(question.attacks, case.threat.build())
    except ValueError as error:
        ensembles = ", ".join(ENSEMBLES)
        raise ConfigError(f"--attacks: {error} Ensembles are {ensembles}.") from None


def _indices_of(question: Question, count: int) -> list[int]:
    """The samples that are evaluated, ascending."""
    if question.indices is None:
        wanted = question.num_examples
        return list(range(count if wanted is None else min(wanted, count)))
    if question.num_examples is not None:
        raise ConfigError("--indices and --num_examples: give one of them.")
    try:
        indices = parse_ranges(question.indices)
    except ValueError as error:
        raise ConfigError(f"--indices: {error}") from None
    if indices[-1] >= count:
        raise ConfigError(
            f"--indices {question.indices}: the data have the samples 0 to {count - 1}."
        )
    return indices


def _output_of(question: Question, case: Case) -> Path:
    if question.output is not None:
        return question.output
    if case.target.run is not None and Path(question.target).is_dir():
        return Path(question.target) / "evaluation"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", question.target).strip("-")
    return Path("evaluations") / name


def _plan(
    question: Question, case: Case, names: Sequence[str], indices: Sequence[int]
) -> dict[str, Any]:
    """Everything that the outcomes depend on."""
    path = Path(case.data.get("path", ""))
    return {
        "model": case.target.digest or case.target.name,
        "data": {**case.data, "sha256": sha256_of(path) if path.is_file() else None},
        "threat_model": case.threat.to_dict(),
        "attacks": list(names),
        "indices": ranges_of(indices),
        "seed": question.seed,
        "prefilter": question.prefilter,
    }


def _record(
    question: Question, case: Case, indices: Sequence[int], outcome: Outcome, ranks: Ranks
) -> dict[str, Any]:
    """Contents of ``evaluation.json``."""
    samples, count = outcome.samples, len(outcome.samples)
    natural = sum(sample.correct for sample in samples)
    robust, standing = {}, natural
    for name, attack in outcome.attacks.items():
        standing -= attack.broken
        robust[name] = standing / count
    run = case.target.run
    names = list(question.attacks)
    return {
        "target": question.target,
        "model_sha256": case.target.digest,
        "threat_model": case.threat.to_dict(),
        "data": dict(case.data),
        "ensemble": names[0] if len(names) == 1 and names[0] in ENSEMBLES else None,
        "attacks": _attacks(outcome),
        "natural_acc": natural / count,
        "robust_acc": {**robust, "all": standing / count},
        "intervals": {
            "natural_acc": wilson_interval(natural, count),
            "all": wilson_interval(standing, count),
        },
        "num_examples": count,
        "indices": ranges_of(indices),
        "num_classes": outcome.num_classes,
        "class_names": case.class_names,
        "passes": sum(stage.forwards + stage.backwards for stage in outcome.stages),
        "seconds": sum(stage.seconds for stage in outcome.stages),
        "prefilter": _prefilter(question, outcome),
        "checks": [],
        "seed": question.seed,
        "batch_size": question.batch_size,
        "ranks": ranks.count,
        "versions": versions(),
        "hardware": hardware(ranks.device),
        "commit": commit(),
        "config": None if run is None else run.to_dict(),
    }


def _attacks(outcome: Outcome) -> list[dict[str, Any]]:
    """Findings and costs by attack, each with its stages."""
    found = []
    for name, total in outcome.attacks.items():
        stages = [_cost(stage) for stage in outcome.stages if stage.attack == name]
        costs = _cost(total)
        del costs["label"]
        found.append({"name": name, **costs, "stages": stages})
    return found


def _cost(stage: StageCost) -> dict[str, Any]:
    costs = dataclasses.asdict(stage)
    del costs["attack"]
    return costs


def _prefilter(question: Question, outcome: Outcome) -> dict[str, Any] | None:
    """What the passes in fewer bits have saved: float32 passes of the samples they broke."""
    if question.prefilter is None:
        return None
    suffix = f" in {question.prefilter}"
    early = [stage for stage in outcome.stages if stage.label.endswith(suffix)]
    labels = {stage.label.removesuffix(suffix) for stage in early}
    confirmed = [stage for stage in outcome.stages if stage.label in labels]
    attacked = sum(stage.attacked for stage in confirmed)
    passes = sum(stage.forwards + stage.backwards for stage in confirmed)
    broken = sum(stage.broken for stage in early)
    return {
        "precision": question.prefilter,
        "broken": broken,
        "passes": sum(stage.forwards + stage.backwards for stage in early),
        "float32_passes_saved": round(broken * passes / attacked) if attacked else None,
    }


def _announce(record: dict[str, Any], output: Path) -> None:
    threat, count = record["threat_model"], record["num_examples"]
    low, high = record["intervals"]["all"]
    for attack in record["attacks"]:
        logger.info(
            "%-14s broke %d of %d; %.2f%% of all stand (%d passes, %.1f s)",
            attack["name"],
            attack["broken"],
            attack["attacked"],
            100 * record["robust_acc"][attack["name"]],
            attack["forwards"] + attack["backwards"],
            attack["seconds"],
        )
    for check in record["checks"]:
        if check["status"] in ALARMS:
            logger.warning(
                "Doubtful, %s: %s. %s To do: %s",
                check["name"],
                check["found"],
                check["meaning"],
                check["remedy"],
            )
    kind = f"the ensemble {record['ensemble']}" if record["ensemble"] else "these attacks"
    logger.info(
        "Of %d images %.2f%% are classified correctly; %.2f%% (95%% interval %.2f to %.2f) "
        "withstand %s within %s eps %s.",
        count,
        100 * record["natural_acc"],
        100 * record["robust_acc"]["all"],
        100 * low,
        100 * high,
        kind,
        threat["norm"],
        threat["eps"],
    )
    logger.info("Record: %s", output / EVALUATION)


@contextlib.contextmanager
def _progress_bar(ranks: Ranks) -> Iterator[Progress]:
    """A bar that shows the stage and how many of its samples are done."""
    with tqdm(disable=None if ranks.is_main else True, unit="image", leave=False) as bar:
        shown = ""

        def tell(label: str, done: int, total: int) -> None:
            nonlocal shown
            if label != shown:
                shown = label
                bar.reset(total)
                bar.set_description(label)
            bar.update(done - bar.n)

        yield tell
