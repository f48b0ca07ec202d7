"""Natural and robust accuracy or loss, sharded over ranks, with every sample's outcome kept.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dat_ds.attacks import (
    InnerLoss,
    SampleGenerator,
    ThreatModel,
    already_checked,
    attack_mode,
)
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.named import EvaluationAttack, run_attack, stream_of
from dat_ds.config import parse_evaluation_attack
from dat_ds.contracts import Gate, GatedModel, as_images, check_finite, check_images
from dat_ds.data import EvaluationBatches, evaluation_batches
from dat_ds.errors import ConfigError, DataError, ModelError, UserError
from dat_ds.evaluation.task import Task


class GatherObjects(Protocol):
    """Collects one picklable object per rank, in order of rank."""

    def __call__(self, value: object) -> list[object]:
        """Objects of all ranks."""
        ...


def _alone(value: object) -> list[object]:
    return [value]


_CLASSIFICATION = Task(inputs=lambda x, y, generator: (x, y))


@dataclass(frozen=True)
class Record:
    """Outcome of an evaluation.

    A sample counts as robust where it is classified correctly both without perturbation and under
    the attack: a misclassified image needs no attacker.

    Attributes:
        natural_acc: Fraction classified correctly without perturbation; None where the model does
            not classify.
        robust_acc: Fraction robust, by name of the attack; empty where it does not classify.
        num_examples: Images shown, over all ranks.
        outcomes: ``"natural"`` and each attack: one character per image in dataset order, ``"1"``
            correct or robust, ``"0"`` not.
        largest_perturbation: Largest distance of an adversarial image from its original in the
            threat model's norm, pixel units; by name of the attack.
        natural_loss: Mean loss without perturbation; None where the model classifies.
        robust_loss: Mean loss under each attack.
    """

    natural_acc: float | None
    robust_acc: dict[str, float]
    num_examples: int
    outcomes: dict[str, str]
    largest_perturbation: dict[str, float]
    natural_loss: float | None = None
    robust_loss: dict[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, Any]:
        """Accuracies, losses where they were measured, and the number of images."""
        means = {
            "natural_acc": self.natural_acc,
            "robust_acc": dict(self.robust_acc),
            "num_examples": self.num_examples,
        }
        if self.natural_loss is not None:
            means |= {"natural_loss": self.natural_loss, "robust_loss": dict(self.robust_loss)}
        return means

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-serialisable values."""
        return {
            **self.means(),
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
    gather: GatherObjects = _alone,
    num_workers: int = 0,
    task: Task | None = None,
) -> Record:
    """Attack a model and count what it withstands.

    Every rank takes an equal share of the images and does the same number of forwards; outcomes
    do not depend on the number of ranks.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1], float32, to logits ``(B, K)``. A module is put in
            eval mode and frozen meanwhile.
        data: Map-style dataset of ``(x, y)``.
        threat: Allowed perturbations.
        attacks: Names such as ``"pgd-20"``, ``"pgd-50-10"`` (steps, restarts),
            ``"apgd-dlr-100"`` or ``"MODULE:CLASS"`` of an attack of your own; see
            :func:`dat_ds.attacks.parse_evaluation_attack`.
        num_examples: First images of ``data``; None for all.
        batch_size: Images per forward and rank.
        seed: Seed of the random starts.
        device: Where images are sent. Default: where the module's parameters are, else the CPU.
        rank: This process.
        ranks: Number of processes.
        gather: Collects every rank's outcomes; called once, by all ranks.
        num_workers: Worker processes that read the images.
        task: Evaluation task of the model; None: it classifies the images. A loss that compares
            the images of a batch depends on ``batch_size`` and ``ranks``.

    Returns:
        The same record on every rank.

    Raises:
        ValueError: For an unknown attack name.
        ConfigError: For an attack of another norm, one that compares more classes than there
            are, or one of your own that leaves the ball.
        DataError: If any rank met an image or a label that cannot be read, or is none; on every
            rank.
        ModelError: For outputs that are not logits.
    """
    parsed = [parse_evaluation_attack(name) for name in dict.fromkeys(attacks)]
    if misfits := [m for attack in parsed if (m := attack.problem_with(threat.norm)) is not None]:
        raise ConfigError("\n".join(misfits))
    device = device_of(model) if device is None else torch.device(device)
    task = _CLASSIFICATION if task is None else task
    gate = Gate("classes" if task is _CLASSIFICATION else "own")
    called = GatedModel(model, gate, refuses_damage=False)
    batches = _Batches(
        evaluation_batches(
            data,
            batch_size=batch_size,
            rank=rank,
            ranks=ranks,
            num_examples=num_examples,
            num_workers=num_workers,
        ),
        lambda x, y: checked(x, y, model, gate, threat),
        alone=ranks == 1,
    )
    if len(cast(Any, data)) == 0:
        raise DataError("There is no image to evaluate: the dataset is empty.")

    def judge(images: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = called(images)
        try:
            check_finite(outputs)
        except ModelError as error:
            batches.tell(error)
        return _judged(outputs, y, task.loss)

    names = ["natural", *(attack.name for attack in parsed)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    largest = dict.fromkeys(attacks, 0.0)
    with attack_mode(model), already_checked():
        for x, y, indices in batches:
            count = len(x) * task.num_views
            if count == 0:  # this rank only keeps the others company
                x, y = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1)
            first_index = indices[0] if indices else 0
            views = SampleGenerator(seed, 0, first_index, stream="evaluation views")
            x, y = task.inputs(x.to(device), y.to(device), views)
            is_first = gate.num_classes is None
            natural = judge(x)
            if is_first and gate.reads_classes:  # how many classes there are is known only now
                _check_classes(parsed, gate.num_classes)
                if problem := gate.problem_of(y):
                    batches.tell(DataError(problem))
                    y = torch.zeros_like(y)
            found["natural"].append(natural[:count].cpu())
            for attack in parsed:
                generator = stream_of(attack, seed, first_index * task.num_views)
                try:
                    x_adv = run_attack(called, x, y, threat, attack, generator, task.loss)
                except ConfigError as error:  # one of the user's own left the ball
                    batches.tell(error)
                    x_adv = x
                robust = judge(x_adv)
                robust = robust & natural if task.loss is None else robust
                found[attack.name].append(robust[:count].cpu())
                if count:
                    distance = float(threat.distance(x_adv, x).max())
                    largest[attack.name] = max(largest[attack.name], distance)
    values = {name: torch.cat(parts).tolist() if parts else [] for name, parts in found.items()}
    gathered = gather((batches.error, values, largest))
    return _combine(names, gathered, task)


def _check_classes(attacks: Sequence[EvaluationAttack], num_classes: int | None) -> None:
    """Refuse attacks whose losses compare more classes than there are.

    Raises:
        ConfigError: With all of them.
    """
    found = () if num_classes is None else (a.problem_with_classes(num_classes) for a in attacks)
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ConfigError("\n".join(problems))


def _judged(outputs: Tensor, y: Tensor, loss: InnerLoss | None) -> Tensor:
    """Each image's loss, or whether it is classified correctly ``(B,)``."""
    if loss is None:
        return outputs.argmax(1) == y
    return loss(outputs.double(), y.double() if y.is_floating_point() else y)


def checked(
    x: Tensor, y: Tensor, model: Model, gate: Gate, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """Images and class indices of a batch.

    Raises:
        DataError: For what are not images, or no labels that one class alone can be right for.
    """
    x = as_images(x, model)
    check_images(x, threat.lower, threat.upper)
    return x, gate.true_classes(y, len(x)) if gate.reads_classes else y


class _Batches:
    """Batches that end in empty ones where reading fails, so that all ranks stay in step.

    Args:
        batches: This rank's.
        check: Makes images and labels of them, or raises DataError.
        alone: Whether there are no other ranks, so that an error is raised at once.

    Attributes:
        error: The first error; None where there was none.
    """

    def __init__(
        self,
        batches: EvaluationBatches,
        check: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        alone: bool,
    ) -> None:
        self._batches = batches
        self._alone = alone
        self._check = check
        self.error: str | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        count = 0
        iterator = iter(self._batches)
        while count < len(self._batches):
            count += 1
            if self.error is None:
                try:
                    x, y, indices = next(iterator)
                    x, y = self._checked(x, y, indices)
                except DataError as error:
                    self.tell(error)
                else:
                    yield x, y, indices
                    continue
            yield self._batches.empty_batch()

    def tell(self, error: UserError) -> None:
        """Raise an error, or keep the first where other ranks expect as many forwards."""
        if self._alone:
            raise error
        self.error = self.error or str(error)

    def _checked(self, x: Tensor, y: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A checked batch; the error names the first sample that is at fault by itself."""
        try:
            return self._check(x, y)
        except DataError:
            for row, index in enumerate(indices):
                try:
                    self._check(x[row : row + 1], y[row : row + 1])
                except DataError as error:
                    raise DataError(f"Sample {index}: {error}") from None
            raise


def _combine(names: Sequence[str], gathered: list[object], task: Task) -> Record:
    """Join the shards, which are contiguous and in order of rank."""
    values: dict[str, list[float]] = {name: [] for name in names}
    largest = dict.fromkeys(names[1:], 0.0)
    for item in gathered:
        assert isinstance(item, tuple)
        error, of_rank, distances = item
        if error is not None:
            raise DataError(error)
        for name in names:
            values[name] += of_rank[name]
        for name, distance in distances.items():
            largest[name] = max(largest[name], distance)
    count = len(values["natural"])
    means = {name: sum(found) / count if count else 0.0 for name, found in values.items()}
    natural = means.pop("natural")
    classifies = task.loss is None
    texts = {n: "".join("1" if flag else "0" for flag in found) for n, found in values.items()}
    return Record(
        natural_acc=natural if classifies else None,
        robust_acc=means if classifies else {},
        num_examples=count,
        outcomes=texts if classifies else {},
        largest_perturbation=largest,
        natural_loss=None if classifies else natural,
        robust_loss={} if classifies else means,
    )


def device_of(model: Model) -> torch.device:
    """Where a module's parameters are; the CPU for other callables."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")
