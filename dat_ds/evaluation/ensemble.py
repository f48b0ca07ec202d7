"""An ensemble of attacks on every sample that still stands, on any number of ranks.

What becomes of a sample does not depend on the ranks, the batch size or an interruption: random
numbers are a function of its index, a stage starts when all ranks have finished the one before, and
its batches are of a multiple of 32 samples, from which size on matrix products compute a row alike
whatever the other rows and the number of threads are. The up to 31 samples that remain are a batch
by themselves, the same one whatever the batch size, on one thread.

Shapes: images ``(B, C, H, W)``, ``K`` classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.attacks import SampleGenerator, ThreatModel, already_checked, attack_mode
from dat_ds.attacks.ensemble import Stage, stages_of
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import cw_margin
from dat_ds.attacks.named import EvaluationAttack
from dat_ds.attacks.passes.precision import Precision, shorter_floats
from dat_ds.contracts import Gate, GatedModel, check_finite
from dat_ds.data.sampler import SampleKey
from dat_ds.data.samples import Collator
from dat_ds.data.transforms import fetch_sample
from dat_ds.errors import ConfigError, DataError
from dat_ds.evaluation.accuracy import checked
from dat_ds.evaluation.samples import Journal, Sample, rounded
from dat_ds.evaluation.watched import ROWS, AllBroken, Passes, WatchedModel
from dat_ds.ranks import Ranks

_CACHED_BYTES = 2 << 30
_NATURAL = "natural"

Progress = Callable[[str, int, int], None]
"""``(label of the stage, samples done, samples of the stage)``."""


@dataclass(frozen=True)
class StageCost:
    """What a stage has found and cost, over all ranks.

    Args:
        attack: Name of the attack.
        label: Of the stage.
        attacked: Samples.
        broken: Samples that it broke.
        forwards: Images forward, those of verification included.
        backwards: Images backward.
        seconds: Of the slowest rank.
    """

    attack: str
    label: str
    attacked: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Outcome of an evaluation.

    Args:
        samples: In order of index.
        stages: In order, the unperturbed images first.
        num_classes: Of the model.
    """

    samples: list[Sample]
    stages: list[StageCost]
    num_classes: int

    @property
    def attacks(self) -> dict[str, StageCost]:
        """The stages of each attack as one, in order, by name; without the unperturbed images."""
        found: dict[str, StageCost] = {}
        for stage in self.stages[1:]:
            before = found.get(stage.attack)
            found[stage.attack] = (
                dataclasses.replace(stage, label=stage.attack)
                if before is None
                else dataclasses.replace(
                    before,
                    broken=before.broken + stage.broken,
                    forwards=before.forwards + stage.forwards,
                    backwards=before.backwards + stage.backwards,
                    seconds=before.seconds + stage.seconds,
                )
            )
        return found


class _Batch(NamedTuple):
    """Samples of a batch after a stage, and what it cost."""

    samples: list[Sample]
    forwards: int
    backwards: int
    seconds: float


@dataclass
class EnsembleEvaluation:
    """Evaluation of a model under an ensemble of attacks.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1], float32, to logits ``(B, K)``.
        data: Map-style dataset of ``(x, y)``.
        threat: Allowed perturbations.
        attacks: In order; each attacks the samples that none before has broken.
        indices: Samples of ``data``, ascending.
        batch_size: Images of a forward at most, taken up to a multiple of 32.
        seed: Of the attacks' random numbers.
        ranks: The processes.
        journal: Keeps what is found.
        prefilter: Precision in which the first attack runs once before; what it breaks counts
            where a float32 forward confirms it. None: no such attack.
        progress: Told of every batch, on rank 0.
    """

    model: Model
    data: Dataset[Any]
    threat: ThreatModel
    attacks: Sequence[EvaluationAttack]
    indices: Sequence[int]
    batch_size: int
    seed: int
    ranks: Ranks
    journal: Journal
    prefilter: Precision | None = None
    progress: Progress | None = None
    _gate: Gate = field(default_factory=lambda: Gate("classes"), init=False)
    _cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    _cached_bytes: int = field(default=0, init=False)

    def run(self) -> Outcome:
        """Carry it out, or go on with it; a collective of the ranks.

        Raises:
            DataError: For an image or a label that cannot be read or is none, on all ranks.
            ModelError: For outputs that are not finite logits.
            ConfigError: For an attack that is not defined for so few classes.
        """
        self._called = GatedModel(self.model, self._gate, refuses_damage=False)
        self._known = self._read_journal()
        with attack_mode(self.model), already_checked():
            samples, costs = self._natural()
            num_classes = self._count_classes()
            self._check_classes(num_classes)
            for stage, precision in self._stages(num_classes):
                samples, cost = self._stage(stage, precision, samples)
                costs.append(cost)
        ordered = [samples[index] for index in self.indices]
        return Outcome(ordered, costs, num_classes)

    # ---- stages

    def _stages(self, num_classes: int) -> Iterator[tuple[Stage, Precision | None]]:
        parts = [stages_of(attack, self.threat, num_classes) for attack in self.attacks]
        if self.prefilter is not None and parts:
            for stage in parts[0]:
                label = f"{stage.label} in {self.prefilter}"
                yield dataclasses.replace(stage, label=label), self.prefilter
        for part in parts:
            for stage in part:
                yield stage, None

    def _natural(self) -> tuple[dict[int, Sample], list[StageCost]]:
        def judge(indices: list[int], passes: Passes) -> list[Sample]:
            x, y = self._images(indices)
            with torch.no_grad():
                logits = self._called(x)
            passes.count(logits)
            problem = self._gate.problem_of(y)
            if problem is not None:
                raise DataError(problem)
            check_finite(logits)
            predicted = logits.argmax(1).tolist()
            margins = [rounded(-margin) for margin in cw_margin(logits.double(), y).tolist()]
            return [
                Sample(index, int(y[i]), predicted[i], margins[i], margins[i])
                for i, index in enumerate(indices)
            ]

        found, cost = self._divided(_NATURAL, _NATURAL, list(self.indices), judge)
        return {sample.index: sample for sample in found}, [cost]

    def _stage(
        self, stage: Stage, precision: Precision | None, samples: dict[int, Sample]
    ) -> tuple[dict[int, Sample], StageCost]:
        def attack(indices: list[int], passes: Passes) -> list[Sample]:
            return self._attack(stage, precision, [samples[i] for i in indices], passes)

        standing = [index for index in self.indices if samples[index].stands]
        found, cost = self._divided(stage.attack, stage.label, standing, attack)
        broken = sum(not sample.stands for sample in found)
        return (
            {**samples, **{sample.index: sample for sample in found}},
            dataclasses.replace(cost, broken=broken),
        )

    def _attack(
        self,
        stage: Stage,
        precision: Precision | None,
        before: list[Sample],
        passes: Passes,
    ) -> list[Sample]:
        """One batch of a stage."""
        indices = [sample.index for sample in before]
        x, y = self._images(indices)
        generator = SampleGenerator(
            self.seed, 0, indices=indices, stream=f"evaluation {stage.label}"
        )
        plain: contextlib.AbstractContextManager[Model] = contextlib.nullcontext(self._called)
        with plain if precision is None else shorter_floats(self._called, precision) as model:
            watched = WatchedModel(model, self._called, x, y, self.threat, passes)
            with contextlib.suppress(AllBroken):
                x_adv = stage.run(watched, x, y, generator)
                with torch.no_grad():
                    watched(x_adv)
        return [_after(stage, sample, watched, row) for row, sample in enumerate(before)]

    # ---- dividing the work

    def _divided(
        self,
        attack: str,
        label: str,
        indices: list[int],
        judge: Callable[[list[int], Passes], list[Sample]],
    ) -> tuple[list[Sample], StageCost]:
        """What ``judge`` makes of the samples, each batch by one rank; a collective."""
        known = self._known.get(label, [])
        done = {sample.index: sample for batch in known for sample in batch.samples}
        left = [index for index in indices if index not in done]
        own = shared_batches(left, self._rows, self.ranks.count)[self.ranks.rank]
        found: list[_Batch] = []
        with self.ranks.together():
            for part in own:
                passes, started = Passes(), time.perf_counter()
                with _threads(1 if len(part) < ROWS else torch.get_num_threads()):
                    samples = judge(part, passes)
                seconds = time.perf_counter() - started
                found.append(_Batch(samples, passes.forwards, passes.backwards, seconds))
                self._keep(label, found[-1])
                attacked = sum(len(batch.samples) for batch in found) * self.ranks.count
                self._tell(label, len(done) + attacked, indices)
        shards = cast("list[list[_Batch]]", self.ranks.gather(found))
        every = [*known, *(batch for shard in shards for batch in shard)]
        done |= {sample.index: sample for batch in every for sample in batch.samples}
        earlier = sum(batch.seconds for batch in known)
        slowest = max(sum(batch.seconds for batch in shard) for shard in shards)
        return [done[index] for index in indices], StageCost(
            attack,
            label,
            attacked=len(indices),
            forwards=sum(batch.forwards for batch in every),
            backwards=sum(batch.backwards for batch in every),
            seconds=earlier + slowest,
        )

    @property
    def _rows(self) -> int:
        return -(-max(self.batch_size, 1) // ROWS) * ROWS

    def _tell(self, label: str, done: int, indices: list[int]) -> None:
        if self.progress is not None and self.ranks.is_main:
            self.progress(label, min(done, len(indices)), len(indices))

    def _keep(self, label: str, batch: _Batch) -> None:
        samples, *cost = batch
        rows = [list(dataclasses.astuple(sample)) for sample in samples]
        self.journal.add(
            {"stage": label, "cost": cost, "num_classes": self._gate.num_classes, "rows": rows}
        )

    def _read_journal(self) -> dict[str, list[_Batch]]:
        """Batches that an interrupted evaluation has finished, by stage; a collective."""
        known: dict[str, list[_Batch]] = {}
        for entry in self.journal.earlier(self.ranks):
            samples = [Sample(*row) for row in entry["rows"]]
            known.setdefault(entry["stage"], []).append(_Batch(samples, *entry["cost"]))
            self._gate.num_classes = entry["num_classes"]
        return known

    def _check_classes(self, num_classes: int) -> None:
        """Refuse attacks that are not defined for so few classes."""
        # A targeted attack leaves out the targets that are not there.
        untargeted = (attack for attack in self.attacks if not attack.num_targets)
        found = (attack.problem_with_classes(num_classes) for attack in untargeted)
        problems = [problem for problem in found if problem is not None]
        if problems:
            raise ConfigError("\n".join(problems))

    def _count_classes(self) -> int:
        """Classes of the model, which a rank without an image does not know; a collective."""
        counts = [count for count in self.ranks.gather(self._gate.num_classes) if count is not None]
        self._gate.num_classes = cast(int, counts[0])
        return cast(int, counts[0])

    # ---- images

    def _images(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images and class indices."""
        pairs = [self._image(index) for index in indices]
        if len({tuple(x.shape) for x, _ in pairs}) > 1:
            raise DataError(
                f"Samples {indices[0]} to {indices[-1]} are images of several shapes: give "
                "dat.data.img_size."
            )
        x = torch.stack([x for x, _ in pairs]).to(self.ranks.device)
        return x, torch.stack([y for _, y in pairs]).to(self.ranks.device)

    def _image(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self._cache:
            return self._cache[index]
        sample = fetch_sample(self.data, SampleKey(0, index))
        try:
            x, y = checked(*Collator()([sample], [index]), self.model, self._gate, self.threat)
            pair = x[0], y[0]
        except DataError as error:
            text = str(error)
            raise DataError(
                text if text.startswith("Sample") else f"Sample {index}: {text}"
            ) from None
        size = x.numel() * x.element_size()
        if self._cached_bytes + size <= _CACHED_BYTES:
            self._cache[index] = pair
            self._cached_bytes += size
        return pair


def shared_batches(indices: Sequence[int], rows: int, ranks: int) -> list[list[list[int]]]:
    """Batches of the samples for each rank, with about as many samples for each.

    Args:
        indices: Samples.
        rows: Most samples of a batch, a multiple of 32.
        ranks: Number of ranks.

    Returns:
        The batches of each rank. Every batch is of a multiple of 32 samples but for the one of
        the last up to 31 samples.
    """
    blocks = len(indices) // ROWS
    # As many batches as ranks, or a multiple of it, where there are blocks enough.
    count = min(blocks, -(-blocks * ROWS // (rows * ranks)) * ranks)
    ends = [ROWS * (blocks * i // count) for i in range(count + 1)] if count else [0]
    batches = [list(indices[a:b]) for a, b in itertools.pairwise(ends)]
    if rest := list(indices[blocks * ROWS :]):
        batches.append(rest)
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for batch in sorted(batches, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(batch)
    return shares


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _after(stage: Stage, sample: Sample, watched: WatchedModel, row: int) -> Sample:
    """A sample after a stage."""
    margin = rounded(float(watched.margin[row]))
    if not bool(watched.broken[row]):
        is_denied = sample.verified is False or bool(watched.denied[row])
        return dataclasses.replace(
            sample, margin=min(sample.margin, margin), verified=False if is_denied else None
        )
    return dataclasses.replace(
        sample,
        margin=margin,
        broken_by=stage.attack,
        stage=stage.label,
        step=int(watched.step[row]),
        predicted_under_attack=int(watched.predicted[row]),
        distance=rounded(float(watched.distance[row])),
        verified=True,
    )
