"""The ``"dat"`` section of a run config, one frozen dataclass per part.

Parts that choose a method are that method: their keys stand with it, in its own file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dat_ds.attacks import ATTACKS, Attack, ThreatModel, parse_evaluation_attack
from dat_ds.attacks.threat import Norm
from dat_ds.compression import COMPRESSIONS, Compression
from dat_ds.data import DATASETS, DatasetMethod
from dat_ds.finetuning import FinetuningConfig
from dat_ds.length import Length
from dat_ds.method import (
    Section,
    Trait,
    above,
    at_least,
    chosen_from,
    fraction,
    option,
)
from dat_ds.models.method import MODELS, ModelMethod
from dat_ds.objectives import OBJECTIVES, Objective
from dat_ds.optim import OPTIMIZERS, SCHEDULES, OptimizerMethod, ScheduleMethod


@dataclass(frozen=True, kw_only=True)
class ThreatModelConfig(Section):
    """Allowed perturbations; lengths are pixel units in [0, 1]."""

    norm: Norm = "linf"
    """Norm of the ball."""
    eps: Length = at_least(0, Length("8/255"))
    """Radius of the ball, in pixel units: 0.03 or ``"8/255"``."""
    lower: float = 0.0
    """Smallest pixel value."""
    upper: float = 1.0
    """Largest pixel value."""

    def __str__(self) -> str:
        """The ball as ``--threat`` takes it, such as ``linf:8/255``."""
        return f"{self.norm}:{self.eps}"

    def problems(self) -> Iterator[str]:
        """A ball that is none."""
        try:
            self.build()
        except ValueError as error:
            yield str(error)

    def build(self) -> ThreatModel:
        """The threat model."""
        return ThreatModel(self.norm, float(self.eps), self.lower, self.upper)


@dataclass(frozen=True, kw_only=True)
class WeightPerturbationConfig(Section):
    """Adversarial weight perturbation (``awp``) or sharpness-aware minimisation (``sam``).

    Costs one more forward and backward a micro-step.
    """

    name: Literal["none", "awp", "sam"] = option(
        "none",
        traits={
            Trait.NEEDS_ADVERSARIAL: lambda v: v == "awp",
            Trait.TAKES_GRADIENTS_APART: lambda v: v != "none",
        },
    )
    """Kind of weight perturbation."""
    radius: float | None = at_least(0, None)
    """``awp``: length relative to each layer's weights, default 0.005; ``sam``: default 0.05."""
    scope: Literal["global", "local"] = "global"
    """Whose gradient decides: all ranks' (one more all-reduce), or each rank's own."""
    start: float = fraction(0.0)
    """Share of the run before the first perturbation."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    """Watches single-step training for catastrophic overfitting.

    Every so many steps, images of the batch are attacked by the training attack and by a multi-step
    probe. The guard fires when accuracy under the training attack exceeds accuracy under the probe
    by more than ``largest_gap`` (a sign of catastrophic overfitting).
    """

    action: Literal["none", "stop", "rollback", "strengthen"] | None = option(
        None,
        traits=dict.fromkeys(
            (Trait.COMPARES_ACCURACIES, Trait.COMPARES_WITH_STRONGER), lambda v: v != "none"
        ),
    )
    """Action when it fires: end the run, return to the last checkpoint and go on with more
    attack steps, or go on with more attack steps from here. Default: ``rollback`` for the
    single-step attacks, else ``none``."""
    every_steps: int = above(0, 50)
    """Optimizer steps between two checks."""
    probe_steps: int = above(0, 10)
    """PGD steps of the probe."""
    num_images: int = above(0, 64)
    """Images per rank and check."""
    largest_gap: float = fraction(0.3)
    """Largest allowed excess of accuracy under the training attack over that under the probe, as a
    fraction (0.3: 30 points)."""
    stronger_steps: int = above(1, 7)
    """PGD steps of the training attack after ``rollback`` or ``strengthen``."""


@dataclass(frozen=True, kw_only=True)
class OverfittingConfig(Section):
    """Watches validation for robust overfitting (Rice et al., ICML 2020, arXiv 2002.11569).

    A validation has fallen where its robust accuracy is below the best one before it by more than
    chance allows: where the Wilson 95 % intervals of both, for the number of validation images, do
    not meet. The best model is kept in any case.
    """

    action: Literal["none", "warn", "stop"] = "warn"
    """What follows: a warning, or the end of training, after which the best model is evaluated
    as at the end of the schedule."""
    patience: int = above(0, 3)
    """Validations in a row that have to have fallen."""
    margin: float | None = fraction(None)
    """A fall of more than this much, as a fraction (0.02: 2 points), in the place of intervals
    that do not meet."""


@dataclass(frozen=True, kw_only=True)
class NumericsConfig(Section):
    """What follows where numbers are not finite, explode, or differ between ranks."""

    nonfinite: Literal["stop", "skip"] | None = None
    """After a step whose loss or gradient is not finite: end the run, or leave the step out on all
    ranks and go on, which DeepSpeed does but for float32 and bfloat16 autocast at ZeRO-0. Default:
    ``skip`` in float16, where overflow is part of the loss scaling, else ``stop``."""
    most_skipped: int = above(0, 10)
    """Steps in a row that may be left out before the run ends; in float16 those at the smallest
    loss scale count."""
    reproducers: int = at_least(0, 3)
    """Steps of a run with a number that is not finite that are kept, each with its batch and
    weights, in the run's folder ``faults``, for ``dat-ds replay``."""
    reproducer_gib: float = at_least(0, 4.0)
    """Weights, and a rank's batch, are left out of it where they are larger than this."""
    trust_ratios: Literal["none", "warn", "stop"] = "warn"
    """What follows where LAMB's or LARS's trust ratio of a layer exceeds ``largest_trust_ratio``;
    looked at with every line of metrics, for all steps since the last."""
    largest_trust_ratio: float = above(0, 1000.0)
    """Largest trust ratio that counts as normal."""
    replicas: Literal["none", "warn", "stop"] = "stop"
    """What follows where a rank holds other weights than the others, which a checksum tells at
    every checkpoint and validation."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    """Exponential moving average of the weights; evaluated and exported instead of them."""

    decay: float = fraction(0.0)
    """0 switches it off. Warmed up as ``min(decay, (1 + t) / (10 + t))`` after ``t`` steps."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Robust evaluation, sharded over ranks.

    An attack is written ``METHOD-STEPS`` or ``METHOD-STEPS-RESTARTS``, with the methods ``pgd``
    (step size ``2.5 eps / STEPS``), ``apgd-ce``, ``apgd-dlr`` and ``apgd-t`` (Auto-PGD on
    cross-entropy, DLR and targeted DLR; for l1 ``apgd-ce-l1`` and ``apgd-t-l1``, which begin in
    larger balls), ``apgd-cw`` and ``apgd-pm`` (on the margin of logits and of probabilities),
    ``malt`` (towards the nearest classes), ``fab`` and ``fab-t`` (smallest perturbations,
    untargeted and targeted), ``square`` (black-box; its STEPS are queries) and ``apgd-square``
    (the same from where 20 steps of Auto-PGD lead): random start but for FAB, the run's threat
    model.
    """

    attacks: list[str] = field(default_factory=lambda: ["pgd-20"])
    """Attacks on the test set after training, such as ``"pgd-20"`` (METHOD-STEPS), ``"pgd-50-10"``
    (10 restarts), or ``"MODULE:CLASS"`` of your own."""
    num_examples: int | None = above(0, None)
    """First images of the test set. Default: all."""
    batch_size: int = above(0, 256)
    """Images per forward and rank."""
    validation_attack: str = "pgd-10"
    """Attack on the validation split during training; its result chooses the best model."""
    validation_every_epochs: float = above(0, 5.0)
    """Epochs between two validations."""
    validation_examples: int | None = above(0, None)
    """First images of the validation split. Default: all."""
    natural_twin: bool = option(False, traits={Trait.SUPPORTS_CLASSES: bool})
    """Train a natural twin (same config, no attack) and evaluate it beside the robust model."""
    pictures: int = at_least(0, 8)
    """Test images drawn with their perturbation and both predictions."""

    def problems(self) -> Iterator[str]:
        """Attacks that are none, or named twice."""
        if len(set(self.attacks)) < len(self.attacks):
            yield f"attacks={self.attacks} names an attack twice."
        for key, name in [
            *((f"attacks[{i}]", name) for i, name in enumerate(self.attacks)),
            ("validation_attack", self.validation_attack),
        ]:
            try:
                parse_evaluation_attack(name)
            except ValueError as error:
                yield f"{key}: {error}"

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """Attacks that look for misclassified images."""
        yield from super().facts(path)
        for name in dict.fromkeys((*self.attacks, self.validation_attack)):
            try:
                attack = parse_evaluation_attack(name)
            except ValueError:
                continue  # reported already
            if attack.method != "pgd" or attack.restarts > 1:
                yield Trait.LOOKS_AT_CLASSES, f"{path}: {name!r}"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When the resumable state is written."""

    every_epochs: float = above(0, 5.0)
    """Epochs between two checkpoints."""
    every_steps: int | None = above(0, None)
    """Optimizer steps between two checkpoints; takes precedence over ``every_epochs``."""
    keep: int = at_least(1, 2)
    """Newest checkpoints kept; the best model is kept beside them."""
    asynchronous: bool = False
    """Write them beside training, from a copy of the state in the memory of the host: at most one
    at a time. One that a crash interrupts is lost; those before it are not."""


@dataclass(frozen=True, kw_only=True)
class FaultConfig(Section):
    """Ending a run where a rank hangs, is stopped or has died (see docs/reliability.md)."""

    timeout: float | None = option(
        1800.0, "0 or a number of at least 1", lambda v: v == 0 or v >= 1
    )
    """Seconds after which all ranks end with exit code 75: without a sign of life of one of them,
    or without progress of any. 0 or null: never."""
    stop_code: int = option(0, "a number from 0 to 255", lambda v: 0 <= v <= 255)
    """Exit code of a run that a signal has stopped, after its checkpoint was written."""


TRACKERS = ("tensorboard", "wandb", "trackio")
"""Valid in ``dat.logging.trackers``; each is the name of its package and of its module."""


def _are_trackers(names: list[str]) -> bool:
    return set(names) <= set(TRACKERS) and len(set(names)) == len(names)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Output of a run while it trains."""

    every_steps: int = above(0, 10)
    """Optimizer steps between two lines of metrics."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    trackers: list[str] = option(
        ["tensorboard"], f"a list of {', '.join(map(repr, TRACKERS))}, each once", _are_trackers
    )
    """What metrics and pictures are sent to: TensorBoard's files in the run's folder, Weights &
    Biases, trackio. ``[]`` for none. In a loop of your own the latter two alone."""
    project: str = option("dat_ds", "a text", bool)
    """Project in Weights & Biases and trackio."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """How the attack runs inside DeepSpeed's engine."""

    resident_parameters_gib: float = at_least(0, 4.0)
    """ZeRO-3: parameters are gathered once per attack and stay on the device until it ends where
    they fit into this much memory; else they are gathered again on every pass."""
    attack_micro_batches: int = at_least(1, 1, traits={Trait.GROUPS_MICRO_BATCHES: lambda v: v > 1})
    """Micro-batches of an optimizer step that are attacked as one batch; divides
    ``gradient_accumulation_steps``. The attack keeps less in memory than the update, so its batch
    may be larger; ZeRO-3 gathers parameters once for all of them."""
    compile: Literal["none", "attack", "all"] = option(
        "none",
        traits={
            Trait.COMPILES: lambda v: v != "none",
            Trait.COMPILES_THE_UPDATE: lambda v: v == "all",
        },
    )
    """Passes that ``torch.compile`` compiles: the attack's, or the update's as well."""
    cuda_graphs: bool = option(False, traits={Trait.RECORDS_THE_ATTACK: bool})
    """Record the whole attack, all of its steps, as a CUDA graph and replay it: one launch in the
    place of one per kernel. What it needs for activations stays reserved. Worth it for batches of
    one size. Experimental: no GPU has run it yet."""
    channels_last: bool = False
    """Keep images and the activations of convolutions in the memory layout NHWC."""


@dataclass(frozen=True, kw_only=True)
class DatConfig(Section):
    """The whole ``"dat"`` section."""

    model: ModelMethod = chosen_from(MODELS)
    data: DatasetMethod = chosen_from(DATASETS)
    threat_model: ThreatModelConfig = field(default_factory=ThreatModelConfig)
    attack: Attack = chosen_from(ATTACKS)
    objective: Objective = chosen_from(OBJECTIVES)
    weight_perturbation: WeightPerturbationConfig = field(default_factory=WeightPerturbationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    overfitting: OverfittingConfig = field(default_factory=OverfittingConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    optimizer: OptimizerMethod | None = chosen_from(OPTIMIZERS, None)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    schedule: ScheduleMethod = chosen_from(SCHEDULES)
    ema: EmaConfig = field(default_factory=EmaConfig)
    compression: Compression = chosen_from(COMPRESSIONS)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = at_least(0, 0)
    """Seed of weights, data order, augmentation and attacks."""
    output_dir: str | None = None
    """Folder of the run. Default: ``runs/<data>-<model>-<attack>-zero<stage>``, with a number
    appended where that exists."""


@dataclass(frozen=True)
class RunConfig:
    """One run: a DeepSpeed config and our section, resolved and checked.

    Args:
        deepspeed: Config that ``deepspeed.initialize`` receives, with every default that changes
            results written out; batch sizes are resolved only once the number of ranks is known.
        dat: Our section.
        notes: Changes made on the user's behalf, to be logged once.
    """

    deepspeed: dict[str, Any]
    dat: DatConfig
    notes: tuple[str, ...] = ()

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.deepspeed["zero_optimization"]["stage"])

    def to_dict(self) -> dict[str, Any]:
        """The complete run as one JSON-serialisable dict; loading it gives this config again."""
        return {**self.deepspeed, "dat": self.dat.to_dict()}
