"""Our ensembles beside the official AutoAttack (pyautoattack): outcomes, model passes, seconds.

All attack the same images in one process, one after the other.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dat_ds.attacks import ThreatModel, parse_evaluation_attack
from dat_ds.attacks.ensemble import ENSEMBLES, attack_names
from dat_ds.bench.attack_strength import AUTOATTACK_NORMS
from dat_ds.bench.records import read_record, write_record
from dat_ds.errors import ConfigError
from dat_ds.evaluation.ensemble import EnsembleEvaluation
from dat_ds.evaluation.samples import Journal
from dat_ds.evaluation.watched import Passes
from dat_ds.judge.target import Case
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

OFFICIAL = "official"
PARTS = (OFFICIAL, *ENSEMBLES)
_OFFICIAL_BATCH = 250  # the tool's own default
_CASE = ("target", "data", "threat_model", "num_examples", "labels_correct")


class _Counting(nn.Module):
    """A model that counts the images that go through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, Passes()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.passes.count(logits)
        return logits


def bench_autoattack(
    case: Case, *, num_examples: int, parts: Sequence[str], seed: int = 0, output: str | None = None
) -> str:
    """Evaluate one model by each of the parts, and compare the outcomes sample by sample.

    Args:
        case: Model, images and threat model; the model is a module.
        num_examples: First images of the data.
        parts: ``"official"`` and names of our ensembles, in order.
        seed: Of the attacks.
        output: JSON file; parts that it holds of the same case are kept. None writes nothing.

    Returns:
        A markdown table.

    Raises:
        ConfigError: For unknown parts, a missing library, or a file that cannot be
            read or is of another case.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"--parts {' '.join(unknown)}: write some of {', '.join(PARTS)}.")
    if not isinstance(case.target.model, nn.Module):
        raise ConfigError(
            f"{case.target.name!r} is not a torch module, which the official tool needs."
        )
    if OFFICIAL in parts:
        _official_library()  # its absence before hours of the other parts
    count = min(num_examples, len(case.images))
    x, y = default_collate([case.images[i] for i in range(count)])
    with torch.no_grad():
        correct = torch.cat([case.target.model(b).argmax(1) for b in x.split(128)]) == y
    record: dict[str, Any] = {
        "target": case.target.name,
        "data": dict(case.data),
        "threat_model": case.threat.to_dict(),
        "num_examples": count,
        "labels_correct": _bits(correct),
        "parts": {},
    }
    record["parts"] = _kept(output, record)
    threat = case.threat.build()
    for part in parts:
        if part == OFFICIAL:
            found = _official(case.target.model, x, y, correct, threat, seed)
        else:
            found = _ours(part, case, threat, count, seed)
        record["parts"][part] = {**found, "threads": torch.get_num_threads()}
        write_record(output, record, torch.device("cpu"))
    return table_of_record(record)


def _kept(output: str | None, record: dict[str, Any]) -> dict[str, Any]:
    """Parts that a file of the same case holds already."""
    if output is None or not Path(output).exists():
        return {}
    before = read_record(output, "dat-ds bench autoattack")
    if [before.get(key) for key in _CASE] != [record[key] for key in _CASE]:
        raise ConfigError(f"--output {output} holds another case: choose another file.")
    kept: dict[str, Any] = before.get("parts", {})
    return kept


def _official_library() -> Any:
    try:
        return importlib.import_module("pyautoattack.autoattack")
    except ImportError:
        raise ConfigError("The official tool is not installed: pip install pyautoattack.") from None


def _official(
    model: nn.Module, x: Tensor, y: Tensor, correct: Tensor, threat: ThreatModel, seed: int
) -> dict[str, Any]:
    """Outcomes of AutoAttack's standard version, part by part."""
    counting = _Counting(model).eval()
    tool = _official_library().AutoAttack(
        counting, norm=AUTOATTACK_NORMS[threat.norm], eps=threat.eps, version="standard", seed=seed
    )
    names = list(tool.attacks_to_run)
    tool.version = "custom"  # one attack at a time from here on, with the standard settings
    standing = correct.clone()
    attacks = []
    for name in names:
        left = standing.nonzero().flatten()
        passes = counting.passes = Passes()
        started = time.perf_counter()
        if len(left):
            tool.attacks_to_run = [name]
            x_adv, _ = tool.run_standard_evaluation(x[left], y[left], batch_size=_OFFICIAL_BATCH)
            with torch.no_grad():
                batches = x_adv.split(_OFFICIAL_BATCH)
                standing[left] = torch.cat([counting(b).argmax(1) for b in batches]) == y[left]
        attacks.append(_attack(name, standing, passes, time.perf_counter() - started))
        logger.info("official %s: %.2f%% stand", name, 100 * attacks[-1]["robust_acc"])
    return _part(attacks, standing)


def _ours(ensemble: str, case: Case, threat: ThreatModel, count: int, seed: int) -> dict[str, Any]:
    """Outcomes of an ensemble of ours."""
    names = attack_names([ensemble], threat)
    outcome = EnsembleEvaluation(
        model=case.target.model,
        data=cast("Dataset[Any]", case.images),
        threat=threat,
        attacks=[parse_evaluation_attack(name) for name in names],
        indices=range(count),
        batch_size=128,
        seed=seed,
        ranks=Ranks.of_default_group(torch.device("cpu")),
        journal=Journal(None, 0),
    ).run()
    attacks = []
    for name in names:
        total = outcome.attacks[name]
        passes = Passes(total.forwards, total.backwards)
        after = names[: names.index(name) + 1]
        standing = [s.correct and s.broken_by not in after for s in outcome.samples]
        attacks.append(_attack(name, torch.tensor(standing), passes, total.seconds))
        logger.info("%s %s: %.2f%% stand", ensemble, name, 100 * attacks[-1]["robust_acc"])
    return _part(attacks, torch.tensor([sample.stands for sample in outcome.samples]))


def _attack(name: str, standing: Tensor, passes: Passes, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "robust_acc": float(standing.double().mean()),
        "standing": _bits(standing),
        "forwards": passes.forwards,
        "backwards": passes.backwards,
        "seconds": seconds,
    }


def _part(attacks: list[dict[str, Any]], standing: Tensor) -> dict[str, Any]:
    return {
        "robust_acc": float(standing.double().mean()),
        "standing": _bits(standing),
        "passes": sum(attack["forwards"] + attack["backwards"] for attack in attacks),
        "seconds": sum(attack["seconds"] for attack in attacks),
        "attacks": attacks,
    }


def _bits(flags: Tensor) -> str:
    return "".join("1" if flag else "0" for flag in flags.tolist())


def table_of_record(record: dict[str, Any]) -> str:
    """Markdown: one row for each part, and the samples on which it and the first disagree."""
    parts = record["parts"]
    threat = record["threat_model"]
    clean = record["labels_correct"].count("1") / record["num_examples"]
    lines = [
        f"{record['target']}, {threat['norm']} eps {threat['eps']}, {record['num_examples']} "
        f"images, {100 * clean:.2f} % classified correctly",
        "",
        "| | stand % | passes | seconds | stand here, not there | stand there, not here |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    reference = next(iter(parts.values()))
    for name, part in parts.items():
        pairs = list(enumerate(zip(part["standing"], reference["standing"], strict=True)))
        more = [i for i, (here, there) in pairs if here > there]
        fewer = [i for i, (here, there) in pairs if here < there]
        lines.append(
            f"| {name} | {100 * part['robust_acc']:.2f} | {part['passes']} | "
            f"{part['seconds']:.1f} | {_listed(more)} | {_listed(fewer)} |"
        )
    return "\n".join(lines)


def _listed(indices: list[int]) -> str:
    return f"{len(indices)}: {', '.join(map(str, indices))}" if indices else "0"
