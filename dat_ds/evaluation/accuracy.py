"""Natural and robust accuracy, sharded over ranks, with every sample's outcome kept.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dat_ds.attacks import SampleGenerator, ThreatModel, apgd, attack_mode, pgd
from dat_ds.config import EvaluationAttack, parse_evaluation_attack
from dat_ds.data import EvaluationBatches, evaluation_batches
from dat_ds.errors import DataError

Model = Callable[[Tensor], Tensor]
_APGD_LOSSES = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}


class Gather(Protocol):
    """Collects one picklable object per rank, in order of rank."""

    def __call__(self, value: object) -> list[object]:
        """Objects of all ranks."""
        ...


def _alone(value: object) -> list[object]:
    return [value]


@dataclass(frozen=True)
class Record:
    """Outcome of an evaluation.

    A sample counts as robust where it is classified correctly both without perturbation and under
    the attack: a misclassified image needs no attacker.

    Attributes:
        natural_acc: Fraction classified correctly without perturbation.
        robust_acc: Fraction robust, by name of the attack.
        num_examples: Images evaluated, over all ranks.
        outcomes: ``"natural"`` and each attack: one character per image in dataset order, ``"1"``
            correct or robust, ``"0"`` not.
        largest_perturbation: Largest distance of an adversarial image from its original in the
            threat model's norm, pixel units; by name of the attack.
    """

    natural_acc: float
    robust_acc: dict[str, float]
    num_examples: int
    outcomes: dict[str, str]
    largest_perturbation: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-serialisable values."""
        return {
            "natural_acc": self.natural_acc,
            "robust_acc": dict(self.robust_acc),
            "num_examples": self.num_examples,
            "outcomes": dict(self.outcomes),
            "largest_perturbation": dict(self.largest_perturbation),
        }


def evaluate(
    model: Model,
    data: Dataset[Any],
    threat: ThreatModel,
    attacks: Sequence[str],
    *,
    num_examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    rank: int = 0,
    ranks: int = 1,
    gather: Gather = _alone,
    num_workers: int = 0,
) -> Record:
    """Attack a model and count what it withstands.

    Every rank takes an equal share of the images and does the same number of forwards; outcomes
    do not depend on the number of ranks.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1], float32, to logits ``(B, K)``. A module is put in
            eval mode and frozen meanwhile.
        data: Map-style dataset of ``(x, y)``.
        threat: Allowed perturbations.
        attacks: Names such as ``"pgd-20"``, ``"pgd-50-10"`` (steps, restarts) or
            ``"apgd-dlr-100"``; see :func:`dat_ds.config.parse_evaluation_attack`.
        num_examples: First images of ``data``; None for all.
        batch_size: Images per forward and rank.
        seed: Seed of the random starts.
        device: Where images are sent. Default: where the module's parameters are, else the CPU.
        rank: This process.
        ranks: Number of processes.
        gather: Collects every rank's outcomes; called once, by all ranks.
        num_workers: Worker processes that read the images.

    Returns:
        The same record on every rank.

    Raises:
        ValueError: For an unknown attack name.
        DataError: If any rank met an image that cannot be read; on every rank.
    """
    parsed = [parse_evaluation_attack(name) for name in dict.fromkeys(attacks)]
    device = _device_of(model) if device is None else torch.device(device)
    batches = _Batches(
        evaluation_batches(
            data,
            batch_size=batch_size,
            rank=rank,
            ranks=ranks,
            num_examples=num_examples,
            num_workers=num_workers,
        )
    )
    names = ["natural", *(attack.name for attack in parsed)]
    outcomes: dict[str, list[Tensor]] = {name: [] for name in names}
    largest = dict.fromkeys(attacks, 0.0)
    with attack_mode(model):
        for x, y, indices in batches:
            count = len(x)
            if count == 0:  # this rank only keeps the others company
                x, y = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1)
            x, y = x.to(device), y.to(device)
            with torch.no_grad():
                natural = model(x).argmax(1) == y
            outcomes["natural"].append(natural[:count].cpu())
            for attack in parsed:
                first_index = indices[0] if indices else 0
                generator = SampleGenerator(seed, attack.steps, first_index)
                x_adv = run_attack(model, x, y, threat, attack, generator)
                with torch.no_grad():
                    robust = model(x_adv).argmax(1) == y
                outcomes[attack.name].append((robust & natural)[:count].cpu())
                if count:
                    distance = float(threat.distance(x_adv, x).max())
                    largest[attack.name] = max(largest[attack.name], distance)
    texts = {name: _to_text(parts) for name, parts in outcomes.items()}
    gathered = gather((batches.error, texts, largest))
    return _combine(names, gathered)


class _Batches:
    """Batches that end in empty ones where reading fails, so that all ranks stay in step.

    Attributes:
        error: What reading met; None where all went well.
    """

    def __init__(self, batches: EvaluationBatches) -> None:
        self._batches = batches
        self.error: str | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        count = 0
        iterator = iter(self._batches)
        while count < len(self._batches):
            count += 1
            if self.error is None:
                try:
                    yield next(iterator)
                    continue
                except DataError as error:
                    self.error = str(error)
            yield self._batches.empty_batch()


def run_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    attack: EvaluationAttack,
    generator: SampleGenerator,
) -> Tensor:
    """Adversarial images for ``x`` ``(B, C, H, W)`` by an evaluation attack."""
    if attack.method != "pgd":
        return apgd(
            model,
            x,
            y,
            threat=threat,
            steps=attack.steps,
            loss=_APGD_LOSSES[attack.method],
            restarts=attack.restarts,
            generator=generator,
        )
    return pgd(
        model,
        x,
        y,
        threat=threat,
        steps=attack.steps,
        step_size=attack.step_size(threat.eps),
        restarts=attack.restarts,
        generator=generator,
    )


def _to_text(parts: list[Tensor]) -> str:
    flags = torch.cat(parts).tolist() if parts else []
    return "".join("1" if flag else "0" for flag in flags)


def _combine(names: Sequence[str], gathered: list[object]) -> Record:
    """Join the shards, which are contiguous and in order of rank."""
    outcomes, largest = dict.fromkeys(names, ""), dict.fromkeys(names[1:], 0.0)
    for item in gathered:
        assert isinstance(item, tuple)
        error, texts, distances = item
        if error is not None:
            raise DataError(error)
        for name in names:
            outcomes[name] += texts[name]
        for name, distance in distances.items():
            largest[name] = max(largest[name], distance)
    count = len(outcomes["natural"])
    share = {name: text.count("1") / count if count else 0.0 for name, text in outcomes.items()}
    return Record(
        natural_acc=share.pop("natural"),
        robust_acc=share,
        num_examples=count,
        outcomes=outcomes,
        largest_perturbation=largest,
    )


def _device_of(model: Model) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")
