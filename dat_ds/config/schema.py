"""The ``"dat"`` section of a run config, one frozen dataclass per part.

A field's metadata holds its check: ``valid`` says in words what is allowed, ``check`` decides.
"""

# ruff: noqa: RUF009 - the defaults are made by functions that return ``dataclasses.field``

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dat_ds.length import Length

DatasetName = Literal["digits", "cifar10", "cifar100", "npz", "imagefolder", "synthetic"]
Augmentation = Literal["none", "crop", "crop_flip", "resized_crop_flip"]
ScheduleName = Literal["constant", "cosine", "step"]
OptimizerName = Literal[
    "adamw", "sgd", "lamb", "lars", "one_bit_adam", "one_bit_lamb", "zero_one_adam"
]
ScalingName = Literal["none", "linear", "sqrt"]
Norm = Literal["linf", "l2", "l1"]
AttackName = Literal[
    "pgd", "fgsm", "fgsm_rs", "n_fgsm", "mim", "apgd", "fat", "multi_norm", "free", "none"
]
InnerLossName = Literal["ce", "dlr", "cw", "kl", "dlr-targeted", "feature_distance", "nt_xent"]
ObjectiveName = Literal[
    "at", "dat", "trades", "mart", "alp", "hat", "rotation", "contrastive", "fare"
]
CodecName = Literal["none", "int8", "int4", "qsgd", "natural", "topk", "sign"]
Checkpointing = Literal["none", "non_reentrant", "reentrant"]


def _checked(default: Any, valid: str, check: Callable[[Any], bool]) -> Any:
    """A field with its check; a mutable default is copied for every instance."""
    metadata = {"valid": valid, "check": check}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _at_least(bound: float, default: Any) -> Any:
    return _checked(default, f"a number of at least {bound:g}", lambda v: v >= bound)


def _above(bound: float, default: Any) -> Any:
    return _checked(default, f"a number above {bound:g}", lambda v: v > bound)


def _fraction(default: Any) -> Any:
    return _checked(default, "a number in [0, 1)", lambda v: 0 <= v < 1)


def _share(default: Any) -> Any:
    return _checked(default, "a number in [0, 1]", lambda v: 0 <= v <= 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Network: any timm model by name, or a Hugging Face image classifier as ``hf:PATH``.

    Where no name is given, ``digits`` get a ViT of 4 blocks and width 64 that fits their 8 x 8
    pixels.
    """

    name: str = "vit_tiny_patch16_224"
    num_classes: int | None = _above(1, None)
    """Default: the number of classes of the data. Self-supervised objectives choose their own."""
    img_size: int | None = _above(0, None)
    """Default: the size of the data's images."""
    patch_size: int | None = _above(0, None)
    depth: int | None = _above(0, None)
    embed_dim: int | None = _above(0, None)
    num_heads: int | None = _above(0, None)
    drop_rate: float | None = _fraction(None)
    drop_path_rate: float | None = _fraction(None)
    stem: Literal["default", "cifar"] = "default"
    pretrained: str | None = None
    """Path of a local checkpoint (``.safetensors``, ``.pt``, ``.pth``, ``.bin``), or of a run: the
    best model of a pre-training run, with a fresh classifier."""
    mean: list[float] | None = None
    """Per channel, pixel units. Default: the data's; of ``pretrained`` and ``hf:``, the model's."""
    std: list[float] | None = None
    activation_checkpointing: Checkpointing = "none"
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm model."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Dataset and how it is loaded; images reach the model as pixels in [0, 1]."""

    name: DatasetName = "digits"
    path: str | None = None
    augment: Augmentation = "none"
    mixup: float = _at_least(0, 0.0)
    """Alpha of mixup: labels become probabilities. 0 for none."""
    cutmix: float = _at_least(0, 0.0)
    """Alpha of CutMix; with ``mixup`` too, each image gets one of them."""
    labelled_fraction: float = _checked(1.0, "a number in (0, 1]", lambda v: 0 < v <= 1)
    """Part of the training images that keep their labels; the others count as unlabelled."""
    drop_unlabelled: bool = False
    """Leave those others out."""
    unlabelled_path: str | None = None
    """Further unlabelled training images: a folder of image files, or an npz file with
    ``images``."""
    labelled_repeats: int = _at_least(1, 1)
    """How often each labelled image occurs in an epoch beside the unlabelled ones."""
    pseudo_labels: str | None = None
    """Run folder or checkpoint of a model that labels the unlabelled images before training."""
    validation_fraction: float = _fraction(0.1)
    """Share of the training images held out for choosing the best checkpoint."""
    img_size: int | None = _above(0, None)
    num_classes: int | None = _above(1, None)
    num_train: int | None = _above(0, None)
    """Size of ``synthetic`` data."""
    num_test: int | None = _above(0, None)
    image_shape: list[int] | None = None
    """Channels, height, width of ``synthetic`` images."""
    num_workers: int = _at_least(0, 0)
    pin_memory: bool | None = None
    """Default: on where there is an accelerator."""

    @property
    def has_unlabelled(self) -> bool:
        """Whether some training images have no true label."""
        hides = self.labelled_fraction < 1 and not self.drop_unlabelled
        return hides or self.unlabelled_path is not None

    @property
    def mixes(self) -> bool:
        """Whether labels are probabilities."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class ThreatModelConfig:
    """Allowed perturbations; lengths are pixel units in [0, 1]."""

    norm: Norm = "linf"
    eps: Length = _at_least(0, Length("8/255"))
    lower: float = 0.0
    upper: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """The inner maximisation. ``none`` trains naturally; see ``docs/attacks.md`` for the others.

    A key that the chosen attack does not take is refused.
    """

    name: AttackName = "pgd"
    steps: int | None = _at_least(1, None)
    """Gradient steps. Default 10 (Madry et al. 2018 use 7, DAT's release 10)."""
    step_size: Length | None = _at_least(0, None)
    """Default: eps / 4; of ``free`` and the single-step attacks eps, and 1.25 eps from a random
    start."""
    random_start: bool | None = None
    """Default: true for ``pgd``, ``apgd``, ``fat``, ``multi_norm``; false for ``fgsm``, ``mim``."""
    restarts: int | None = _at_least(1, None)
    """Default 1."""
    loss: InnerLossName | None = None
    """Default: ``kl`` where the objective is ``trades`` or ``hat`` and the attack, other than
    ``apgd``, starts at random; else ``ce``. ``contrastive`` takes ``nt_xent`` and ``fare``
    takes ``feature_distance`` alone."""
    momentum: float | None = _at_least(0, None)
    """Default: 1 for ``mim``, 0 for ``pgd``."""
    noise_scale: float | None = _at_least(0, None)
    """``n_fgsm``: half width of the noise in units of eps. Default 2."""
    extra_steps: int | None = _at_least(0, None)
    """``fat``: steps a sample still takes once it is misclassified. Default 0."""
    num_targets: int | None = _at_least(1, None)
    """``apgd`` with the loss ``dlr-targeted``: wrong classes to try. Default 9."""
    other_norms: dict[str, Any] | None = None
    """``multi_norm``: radius of each further ball by norm, such as ``{"l2": 0.5, "l1": 12}``."""
    combine: Literal["worst", "average"] | None = None
    """``multi_norm``: train on each image's worst ball (default), or on all of them."""
    replays: int | None = _at_least(1, None)
    """``free``: optimizer steps in a row on the same batch. Default 4."""
    precision: Literal["bf16", "fp16", "int8", "fp8", "auto"] | None = None
    """Precision of the model's passes in the attack alone; pixels and the update keep theirs.
    ``int8`` and ``fp8``: of the products of linear layers, the rest in ``bf16``. ``auto``: ``bf16``
    where, timed at the start, it makes the attack faster. Default: the engine's."""
    fold_batch_norm: bool = False
    """Compute convolutions and the BatchNorm behind them as one during the attack, which saves two
    passes over every activation. Needs ``model_mode`` ``eval``, and ZeRO 0-2."""
    resolution: int | None = _above(0, None)
    """Size in pixels at which the model sees images during the attack; the update is at full size.
    The model must accept it (a ViT: ``dat.model.options.dynamic_img_size``)."""
    keep_tokens: float | None = _checked(None, "a number in (0, 1]", lambda v: 0 < v <= 1)
    """Part of the patches that a vision transformer sees during the attack, drawn anew in every
    forward; the update sees all."""
    eps_warmup: float = _fraction(0.0)
    """Share of the run over which eps and the step size rise linearly from 0."""
    steps_from: int | None = _at_least(1, None)
    """Steps at the start of the run, rising to ``steps``; ``steps * step_size`` is kept."""
    model_mode: Literal["eval", "train"] = "eval"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The outer loss; see ``docs/objectives.md``. A key the objective does not take is refused."""

    name: ObjectiveName = "at"
    natural_weight: float | None = _at_least(0, None)
    """``at``, ``dat``, ``rotation``, ``contrastive``: weight of the natural term. Default: 1 for
    ``dat``, and for ``contrastive`` under an attack; else 0."""
    beta: float | None = _at_least(0, None)
    """Weight of the consistency term. Default: 6 for ``trades``, 5 for ``mart``, 2.5 for ``hat``,
    0.5 for ``alp``."""
    gamma: float | None = _at_least(0, None)
    """``hat``: weight of the helper term. Default 0.5."""
    helper_model: str | None = None
    """``hat``: run folder or checkpoint of a naturally trained model that labels helper images."""
    label_smoothing: float | None = _fraction(None)
    """Default 0."""
    temperature: float | None = _above(0, None)
    """``contrastive``: what similarities are divided by. Default 0.5."""
    crop_area: float | None = _checked(None, "a number in (0, 1]", lambda v: 0 < v <= 1)
    """``contrastive``: smallest area of a view as a share of the image. Default 0.2."""
    color_jitter: float | None = _share(None)
    """``contrastive``: strength of the change of colours. Default 0.5."""
    flip: float | None = _share(None)
    """``contrastive``: probability of mirroring a view. Default 0.5; 0 for digits and text."""
    unlabelled_weight: float = _at_least(0, 1.0)
    """Weight of every image whose label is missing or a pseudo-label, in all terms."""
    grad_align: float = _at_least(0, 0.0)
    """Weight of GradAlign's regulariser against catastrophic overfitting; 0.2 in its paper for
    CIFAR-10 at eps 8/255. Costs 16 forwards' time a step, under every ZeRO stage."""
    batch_norm: Literal["joint", "split"] = "joint"
    """Natural and adversarial images go through the model in one forward: BatchNorm takes its
    statistics of all of them (``joint``) or of each kind apart (``split``)."""


@dataclass(frozen=True, kw_only=True)
class WeightPerturbationConfig:
    """Adversarial weight perturbation (``awp``) or sharpness-aware minimisation (``sam``).

    Costs one more forward and backward a micro-step.
    """

    name: Literal["none", "awp", "sam"] = "none"
    radius: float | None = _at_least(0, None)
    """``awp``: length relative to each layer's weights, default 0.005; ``sam``: default 0.05."""
    scope: Literal["global", "local"] = "global"
    """Whose gradient decides: all ranks' (one more all-reduce), or each rank's own."""
    start: float = _fraction(0.0)
    """Share of the run before the first perturbation."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Watches single-step training for catastrophic overfitting.

    Every so many steps, images of the batch are attacked by the training attack and by a multi-step
    probe. The guard fires where accuracy under the first exceeds that under the second too far.
    """

    action: Literal["none", "stop", "rollback", "strengthen"] | None = None
    """What to do when it fires: end the run, return to the last checkpoint and go on with more
    attack steps, or go on with more attack steps from here. Default: ``rollback`` for the
    single-step attacks, else ``none``."""
    every_steps: int = _above(0, 50)
    """Optimizer steps between two looks."""
    probe_steps: int = _above(0, 10)
    """PGD steps of the probe."""
    num_images: int = _above(0, 64)
    """Images per rank and look."""
    largest_gap: float = _fraction(0.3)
    """Allowed excess of accuracy under the training attack, as a fraction."""
    stronger_steps: int = _above(1, 7)
    """PGD steps of the training attack after ``rollback`` or ``strengthen``."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer of ours, instead of DeepSpeed's ``optimizer`` section.

    See ``docs/optimizers.md``. Vectors (biases, normalisation weights) are excluded from weight
    decay, as timm does. A key that the chosen optimizer does not take is refused.
    """

    name: OptimizerName = "adamw"
    preset: Literal["modern", "paper"] | None = None
    """``lamb`` and ``lars``: where the defaults come from. ``modern`` (default) is what timm and
    NVLAMB do; ``paper`` is DAT's bounded rule on every tensor."""
    lr: float | None = _above(0, None)
    """Default: 0.1 for ``sgd``, 0.005 for ``lamb``, 1 for ``lars`` (``paper``: 0.01), 0.001 for the
    others."""
    weight_decay: float | None = _at_least(0, None)
    """Default: 0.05 for ``adamw``, 0.01 for ``lamb``, 0.0005 for ``sgd`` and ``lars``, 0 for the
    others."""
    betas: list[float] | None = _checked(
        None,
        "two numbers in [0, 1)",
        lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
    )
    """All but ``sgd`` and ``lars``: default [0.9, 0.999]."""
    eps: float | None = _above(0, None)
    """All but ``sgd``: default 1e-8, for ``lamb`` 1e-6."""
    momentum: float | None = _fraction(None)
    """``sgd`` and ``lars``: default 0.9."""
    nesterov: bool | None = None
    """``sgd`` and ``lars``: default false."""
    bias_correction: bool | None = None
    """All with ``betas`` but ``adamw``: default true, of ``paper`` false."""
    lower: float | None = _at_least(0, None)
    """``lamb`` and ``lars``: lower bound of the weights' norm in the trust ratio. Default 0."""
    upper: float | None = _above(0, None)
    """``lamb`` and ``lars``: upper bound of it. Default: none, of ``paper`` 10."""
    adapt_vectors: bool | None = None
    """``lamb``, ``lars``, ``one_bit_lamb``: give vectors a trust ratio too. Default false, of
    ``paper`` true."""
    trust_coefficient: float | None = _above(0, None)
    """``lars``: factor of the trust ratio. Default 0.001, of ``paper`` 1."""
    scaled: Literal["gradient", "momentum"] | None = None
    """``lars``: what the trust ratio scales. Default ``gradient``, of ``paper`` ``momentum``."""
    freeze_step: int | None = _at_least(1, None)
    """``one_bit_adam``, ``one_bit_lamb``: steps of the warm-up, which is not compressed. Default:
    until the variance is stable, measured every ``1 / (1 - beta2) / 10`` steps."""
    stability_threshold: float | None = _checked(None, "a number in (0, 1]", lambda v: 0 < v <= 1)
    """``one_bit_adam``, ``one_bit_lamb``: ratio of the variance's norms, ``1 / (1 - beta2)`` steps
    apart, from which on it counts as stable. Default 0.96."""
    preconditioned: bool | None = None
    """``one_bit_adam``, ``one_bit_lamb``, ``zero_one_adam``: compress the momentum divided by the
    root of the variance. Default true; false is what the papers and DeepSpeed do, and diverges
    where variances differ much."""
    block_size: int | None = _at_least(0, None)
    """Of the same three: entries that share a scale; 0 is one for all, as in DeepSpeed. Default
    1024."""
    scale: Literal["mean", "rms"] | None = None
    """Of the same three: what a scale is, of magnitudes. Default ``mean``; DeepSpeed: ``rms``."""
    max_coeff: float | None = _above(0, None)
    """``one_bit_lamb``: largest trust ratio of the warm-up. Default 10."""
    min_coeff: float | None = _at_least(0, None)
    """``one_bit_lamb``: smallest. Default 0.01."""
    coeff_beta: float | None = _fraction(None)
    """``one_bit_lamb``: decay of their average, which is frozen with the variance. Default 0.9."""
    factor_max: float | None = _above(0, None)
    """``one_bit_lamb``: largest factor on the frozen ratios. Default 4."""
    factor_min: float | None = _above(0, None)
    """``one_bit_lamb``: smallest. Default 0.5."""
    factor_threshold: float | None = _at_least(0, None)
    """``one_bit_lamb``: largest relative change of that factor per step. Default 0.1."""
    var_freeze_step: int | None = _at_least(1, None)
    """``zero_one_adam``: last step that may measure the variance. Default 100000."""
    var_update_scaler: int | None = _at_least(1, None)
    """``zero_one_adam``: measurements after which their interval doubles. Default 16."""
    local_step_scaler: int | None = _at_least(1, None)
    """``zero_one_adam``: steps after which the interval of agreement doubles. Default 32678."""
    local_step_clipper: int | None = _at_least(1, None)
    """``zero_one_adam``: largest interval of agreement. Default 16."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run and the learning rate along it, as fractions of the run.

    The peak is the optimizer's ``lr``, scaled to the global batch if told so.
    """

    name: ScheduleName = "cosine"
    epochs: float = _above(0, 30.0)
    warmup_epochs: float = _at_least(0, 0.0)
    """Linear warm-up from 0, part of ``epochs``."""
    final_ratio: float = _share(0.0)
    """Learning rate at the end over the peak (cosine)."""
    milestones: list[float] = _checked(
        [0.5, 0.75],
        "increasing fractions of the run in (0, 1)",
        lambda v: all(0 < m < 1 for m in v) and sorted(set(v)) == v,
    )
    """step only."""
    decay_factor: float = _checked(0.1, "a number in (0, 1]", lambda v: 0 < v <= 1)
    """step only: factor at each milestone."""
    scaling: ScalingName = "none"
    """The ``lr`` that is written is for a global batch of ``base_batch``: it is multiplied by
    ``global batch / base_batch`` (``linear``, usual for SGD and LARS) or by its square root
    (``sqrt``, usual for Adam and LAMB). The global batch is
    ``micro-batch * accumulation * ranks``."""
    base_batch: int | None = _at_least(1, None)
    max_steps: int | None = _at_least(1, None)
    """Ends the run (and its schedule) after this many optimizer steps, if that is sooner."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights; evaluated and exported instead of them."""

    decay: float = _fraction(0.0)
    """0 switches it off. Warmed up as ``min(decay, (1 + t) / (10 + t))`` after ``t`` steps."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Compressed gradients; see ``docs/compression.md``. A key the codec does not take is refused.

    With one rank nothing travels, and nothing is compressed.
    """

    name: CodecName = "none"
    sides: Literal["single", "double"] | None = None
    """Encode what ranks send to be averaged (``single``), or what comes back as well (``double``):
    the mean or, under ZeRO-3, the parameters, as ``int8``. Default: ``double`` below ZeRO-3,
    ``single`` under it."""
    block_size: int | None = _at_least(0, None)
    """Entries that share a scale; 0 makes one block of each rank's share of a bucket. Default: 64
    for ``int8``, ``int4`` and ``qsgd``, 1024 for ``topk`` and ``sign``."""
    levels: int | None = _checked(None, "an integer in [1, 127]", lambda v: 1 <= v <= 127)
    """``qsgd``: levels of a magnitude; 1 takes 2 bits, up to 7 take 4, up to 127 take 8. Default
    127."""
    ratio: float | None = _checked(None, "a number in (0, 1]", lambda v: 0 < v <= 1)
    """``topk``: share of entries sent. Default 0.01."""
    scale: Literal["mean", "rms"] | None = None
    """``sign``: mean of a block's magnitudes (default), or their root mean square."""
    error_feedback: bool | None = None
    """Add what encoding lost to the next step's gradient, on both sides. Default: true for ``topk``
    and ``sign``, which need it, else false."""
    bucket_mb: float | None = _above(0, None)
    """Below ZeRO-3: megabytes of float32 gradients in one piece: a piece is encoded while others
    travel. Default 8."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Robust evaluation, sharded over ranks.

    An attack is written ``METHOD-STEPS`` or ``METHOD-STEPS-RESTARTS``, with the methods ``pgd``
    (step size ``2.5 eps / STEPS``), ``apgd-ce``, ``apgd-dlr`` and ``apgd-t`` (Auto-PGD on
    cross-entropy, DLR and targeted DLR): random start, the run's threat model.
    """

    attacks: list[str] = field(default_factory=lambda: ["pgd-20"])
    """On the test set, after training."""
    num_examples: int | None = _above(0, None)
    """First images of the test set. Default: all."""
    batch_size: int = _above(0, 256)
    """Per rank."""
    validation_attack: str = "pgd-10"
    validation_every_epochs: float = _above(0, 5.0)
    validation_examples: int | None = _above(0, None)
    natural_twin: bool = False
    """Train a natural twin (same config, no attack) and evaluate it beside the robust model."""
    pictures: int = _at_least(0, 8)
    """Test images drawn with their perturbation and both predictions."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the resumable state is written."""

    every_epochs: float = _above(0, 5.0)
    every_steps: int | None = _above(0, None)
    """Takes precedence over ``every_epochs``."""
    keep: int = _at_least(1, 1)
    """Newest checkpoints kept; the best model is kept beside them."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run shows and writes while it trains."""

    every_steps: int = _above(0, 10)
    progress: bool = True
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the attack runs inside DeepSpeed's engine."""

    resident_parameters_gib: float = _at_least(0, 4.0)
    """ZeRO-3: parameters are gathered once per attack and stay on the device until it ends where
    they fit into this much memory; else they are gathered again on every pass."""
    attack_micro_batches: int = _at_least(1, 1)
    """Micro-batches of an optimizer step that are attacked as one batch; divides
    ``gradient_accumulation_steps``. The attack keeps less in memory than the update, so its batch
    may be larger; ZeRO-3 gathers parameters once for all of them."""
    compile: Literal["none", "attack", "all"] = "none"
    """What ``torch.compile`` compiles: the attack's passes, or the update's as well."""
    cuda_graphs: bool = False
    """Record the whole attack, all of its steps, as a CUDA graph and replay it: one launch in the
    place of one per kernel. What it needs for activations stays reserved. Worth it for batches of
    one size."""
    channels_last: bool = False
    """Images, and so what convolutions make of them, in the layout NHWC."""


@dataclass(frozen=True, kw_only=True)
class DatConfig:
    """The whole ``"dat"`` section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    threat_model: ThreatModelConfig = field(default_factory=ThreatModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    weight_perturbation: WeightPerturbationConfig = field(default_factory=WeightPerturbationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = _at_least(0, 0)
    output_dir: str | None = None
    """Default: ``runs/<data>-<model>-<attack>-zero<stage>``, with a number where that is taken."""


@dataclass(frozen=True)
class RunConfig:
    """One run: a DeepSpeed config and our section, resolved and checked.

    Args:
        deepspeed: What ``deepspeed.initialize`` receives, with every default that changes results
            written out; batch sizes are resolved only once the number of ranks is known.
        dat: Our section.
        notes: What was changed on the user's behalf, to be said once.
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
        return {**self.deepspeed, "dat": plain(dataclasses.asdict(self.dat))}


def plain(value: Any) -> Any:
    """``value`` with every :class:`Length` as it was written, for JSON."""
    if isinstance(value, Length):
        return value.text
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
