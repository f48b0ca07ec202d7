"""Adversarial training as a callback of Hugging Face's Trainer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dat_ds.attacks import Attack, ThreatModel, misfits
from dat_ds.casting import LayerCasts
from dat_ds.config import MONITORS, check_num_classes, check_sections
from dat_ds.errors import ConfigError
from dat_ds.integrations.hf import internals
from dat_ds.integrations.hf.card import Evaluated, add_robustness, robustness
from dat_ds.integrations.hf.evaluation import ClassLabels, robust_metrics
from dat_ds.integrations.hf.forward import AdversarialForward, PixelView
from dat_ds.integrations.hf.pixels import Float32Collator, PixelScale, pixels_of
from dat_ds.integrations.hf.settings import CallbackArguments, Section, Settings
from dat_ds.integrations.hf.weights import restore
from dat_ds.minmax import Moment, frozen_copy, settle
from dat_ds.models import load
from dat_ds.objectives import Objective
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")


class AdversarialTrainingCallback(TrainerCallback):  # type: ignore[misc]  # untyped base
    """Makes ``transformers.Trainer`` train adversarially.

    In every micro-step the images of the model's forward are attacked first, by calling the bare
    model with frozen parameters; the model then sees what the objective needs (natural and
    adversarial images in one batch), and the loss that it returns is the objective's. Nothing else
    of the Trainer changes: optimizer, precision, DDP or DeepSpeed, accumulation, checkpoints.

    Evaluation is left as it is; robust metrics are added to what it measured.

    Args:
        threat_model: Allowed perturbations: the keys of ``dat.threat_model``, or an object.
            Default: those of the ``"dat"`` section in the file of
            ``TrainingArguments(deepspeed=...)``, where it has one. That section also stands in for
            the other arguments that are left out.
        attack: The inner maximisation: the keys of ``dat.attack``, its name alone, an object, or a
            function ``(model, x, y, generator) -> x_adv``.
        objective: The outer loss: the keys of ``dat.objective``, its name alone, or an object.
            Default: ``"at"``.
        mean: Per channel, the mean that the data were normalised by, in pixel units. Default: the
            image processor's (``Trainer(processing_class=...)``).
        std: Per channel, the standard deviation that they were normalised by, in pixel units.
            Default: the image processor's.
        seed: Of the attack's random numbers, which are a function of it, the optimizer step, and
            an image's place in the global batch. Default: 0.
        evaluation: Keys ``attacks`` (names such as ``"pgd-20"``), ``num_examples`` and
            ``batch_size`` of ``dat.evaluation``. ``{"attacks": []}`` measures nothing.
        weight_perturbation: AWP or SAM: the keys of ``dat.weight_perturbation``, or its name alone.
        resident_parameters_gib: Memory for keeping ZeRO-3's parameters on the device during the
            attack, as ``dat.engine.resident_parameters_gib``. Default: 4.

    Attributes:
        request: The arguments.
        labels: Labels that the model is not given; set by :class:`AdversarialTrainer`.
        user_computes_loss: Whether the model's outputs go to a loss function of the user's; set by
            :class:`AdversarialTrainer`.

    Raises:
        ConfigError: With all problems of the arguments; where a DeepSpeed file may complete them,
            when the Trainer is made.
    """

    def __init__(
        self,
        *,
        threat_model: Mapping[str, Any] | ThreatModel | None = None,
        attack: Section | Attack | Callable[..., Any] | None = None,
        objective: Section | Objective | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int | None = None,
        evaluation: Mapping[str, Any] | None = None,
        weight_perturbation: Section | None = None,
        resident_parameters_gib: float | None = None,
    ) -> None:
        self.request = CallbackArguments(
            threat_model=threat_model,
            attack=attack,
            objective=objective,
            mean=None if mean is None else list(mean),
            std=None if std is None else list(std),
            seed=seed,
            evaluation=evaluation,
            weight_perturbation=weight_perturbation,
            resident_parameters_gib=resident_parameters_gib,
        )
        if threat_model is not None and attack is not None:
            self.request.resolve(None)
        self.labels: Tensor | None = None
        self.user_computes_loss = False
        self._settings: Settings | None = None
        self._pixels: PixelScale | None = None
        self._reference: nn.Module | None = None
        self._forward: AdversarialForward | None = None
        self._micro_step = 0
        self._images: dict[str, int] = {}  # attacked in an evaluation, by its prefix
        # Where the best checkpoint was put into the model: its step, and the logs until then.
        self._best: tuple[int, int] | None = None

    # ---- the Trainer's events

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that is known, and keep a copy of the model where one is needed."""
        assert model is not None
        self._settings = None  # of an earlier Trainer
        settings, _ = self._prepare(args, model, processing_class)
        trainer = internals.calling_trainer()
        if trainer is None:
            return
        self._reach(trainer)
        if settings.objective.head == "classes":
            config: Any = model.config
            wrapper = functools.partial(ClassLabels, num_classes=int(config.num_labels))
            internals.wrap_evaluation_collators(trainer, wrapper)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Get ready for the first step."""
        assert model is not None
        settings, pixels = self._prepare(args, model, processing_class)
        self._best = None
        trainer = internals.calling_trainer()
        if trainer is not None and self._reach(trainer) and state.global_step:
            raise ConfigError(
                "The Trainer has resumed before this callback could see that every tensor is read: "
                "hand the callback to Trainer(callbacks=[...]) instead of add_callback."
            )
        device = next(model.parameters()).device
        helper = None
        helper_model = getattr(settings.dat.objective, "helper_model", None)
        if helper_model is not None:
            helper = load(helper_model, map_location=device)
        half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
        if self._reference is not None:
            settle(self._reference, model, device)
        packs = bool(half) and args.deepspeed_plugin is not None
        if packs:
            internals.wrap_collator(train_dataloader, Float32Collator)
        self._forward = AdversarialForward(
            model,
            settings,
            pixels,
            Ranks.of_default_group(device),
            micro_batch=args.train_batch_size,
            optimizer=optimizer,
            reference=self._original(settings, pixels, device),
            helper=helper,
            overflows=bool(args.fp16) or torch.float16 in half,
            other_labels=lambda: self.labels,
            user_computes_loss=self.user_computes_loss,
            packs=packs,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attack the step's first micro-batch."""
        self._micro_step = 0
        self._arm(args, state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attack the step's next micro-batch."""
        self.forward.check_micro_step()
        self._micro_step += 1
        self._arm(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the step trained on what it should, and its images before they are saved."""
        self.forward.check_micro_step()
        # The Trainer decides after this event: this callback comes first.
        if args.save_strategy == "steps" and state.global_step % max(1, state.save_steps) == 0:
            self.forward.check_batches()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check images before a checkpoint of the epoch."""
        if args.save_strategy != "no":
            self.forward.check_batches()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check images before the best model is saved."""
        if self._forward is not None:
            self._forward.check_batches()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave nothing on the model."""
        try:
            self.forward.check_batches()
        finally:
            self.detach()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that reporters come later, for an evaluation before any training."""
        internals.come_first(self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: nn.Module | None = None,
        eval_dataloader: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add accuracies to the logs of training, and robust metrics to those of evaluations.

        The Trainer goes on to use the same dict for its reporters, its result, the choice of the
        best model and early stopping.
        """
        if logs is None or model is None:
            return
        prefix = internals.evaluation_prefix(logs)
        if prefix is not None:
            settings, pixels = self._prepare(args, model, processing_class)
            if settings.dat.evaluation.attacks:
                is_first = prefix not in self._images
                metrics = self._robust_metrics(
                    args, settings, pixels, model, eval_dataloader, is_first
                )
                self._add(state, logs, {f"{prefix}_{k}": v for k, v in metrics.items()})
                count = len(eval_dataloader.dataset)
                self._images[prefix] = min(count, settings.dat.evaluation.num_examples or count)
        elif "loss" in logs and self._forward is not None:
            self._add(state, logs, self._forward.take_means())

    def detach(self) -> None:
        """Leave nothing on the model; to be called where ``train()`` was broken off."""
        if self._forward is not None:
            self._forward.detach()
        self._forward = None

    # ---- internals

    @property
    def forward(self) -> AdversarialForward:
        """The hooks of the training that is running."""
        assert self._forward is not None
        return self._forward

    @property
    def settings(self) -> Settings:
        """The resolved settings, once a Trainer was made with this callback."""
        assert self._settings is not None
        return self._settings

    def _reach(self, trainer: Trainer) -> bool:
        """Mend how a Trainer restores checkpoints, and add to its model card; once each.

        Returns:
            Whether it had not been done before.
        """
        add_robustness(trainer, lambda: self._card(trainer.state))
        return internals.mend_checkpoint_loads(
            trainer, restore, lambda: self._take_best(trainer.state)
        )

    def _take_best(self, state: TrainerState) -> None:
        self._best = state.best_global_step, len(state.log_history)

    def _card(self, state: TrainerState) -> str:
        """What the model card tells of the weights that are in the model."""
        step, since = self._best or (state.global_step, len(state.log_history))
        found: dict[str, Evaluated] = {}
        for place, logs in enumerate(state.log_history):
            prefix = internals.evaluation_prefix(logs)
            if prefix is not None and (
                self._best is None or place >= since or logs["step"] == step
            ):
                metrics = {
                    key.removeprefix(f"{prefix}_"): value
                    for key, value in logs.items()
                    if key.startswith((f"{prefix}_natural_", f"{prefix}_robust_"))
                }
                if metrics:
                    at = step if place >= since else logs["step"]
                    found[prefix] = Evaluated(
                        step=at, num_examples=self._images.get(prefix), metrics=metrics
                    )
        return robustness(self.settings, found, step)

    def _arm(self, args: TrainingArguments, state: TrainerState) -> None:
        slot = self._micro_step * args.world_size + args.process_index
        self.forward.arm(
            Moment(
                seed=self.settings.dat.seed,
                step=state.global_step,
                progress=min(1.0, state.global_step / max(1, state.max_steps)),
                slot=self._micro_step,
                first_image=slot * args.train_batch_size,
            )
        )

    def _robust_metrics(
        self,
        args: TrainingArguments,
        settings: Settings,
        pixels: PixelScale,
        model: nn.Module,
        loader: Any,
        is_first: bool,
    ) -> dict[str, float]:
        device = next(model.parameters()).device
        return robust_metrics(
            model,
            loader,
            settings,
            pixels,
            ranks=Ranks.of_default_group(device),
            reference=self._original(settings, pixels, device),
            batch_size=settings.evaluation_batch or args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            is_first=is_first,
        )

    def _original(
        self, settings: Settings, pixels: PixelScale, device: torch.device
    ) -> PixelView | None:
        """The model as it was at the start, where the objective needs it."""
        if self._reference is None:
            return None
        LayerCasts(self._reference)
        return PixelView(self._reference.to(device), pixels, settings.objective.head)

    @staticmethod
    def _add(state: TrainerState, logs: dict[str, float], metrics: Mapping[str, float]) -> None:
        logs.update(metrics)
        if state.log_history:  # written before callbacks are told
            state.log_history[-1].update(metrics)

    def _prepare(
        self, args: TrainingArguments, model: nn.Module, processor: Any
    ) -> tuple[Settings, PixelScale]:
        internals.come_first(self)
        if self._settings is None or self._pixels is None:
            plugin = args.deepspeed_plugin
            section = None if plugin is None else plugin.hf_ds_config.config.get("dat")
            settings = self.request.resolve(section)
            _check_trainer(args, model, settings)
            mean, std = settings.dat.model.mean, settings.dat.model.std
            self._pixels = pixels_of(mean, std, processor)
            if settings.objective.needs_reference:
                self._reference = frozen_copy(model, settings.objective.name, remedy=_REMEDY)
            self._settings = settings
        return self._settings, self._pixels


_REMEDY = (
    "build it before TrainingArguments(deepspeed=...) is made, and hand the callback to "
    "Trainer(callbacks=[...])."
)


def _check_trainer(args: TrainingArguments, model: nn.Module, settings: Settings) -> None:
    """Refuse what the hooks cannot honour.

    Raises:
        ConfigError: With all problems, one per line.
    """
    problems: list[str] = []
    kind, main_input = type(model).__name__, getattr(model, "main_input_name", None)
    if main_input != "pixel_values":
        problems.append(
            f"{kind} takes {main_input!r}, not 'pixel_values': adversarial training here is for "
            "models of images, such as ViTForImageClassification."
        )
    if args.label_smoothing_factor:
        problems.append(
            f"label_smoothing_factor={args.label_smoothing_factor:g} takes the labels away before "
            "the model sees them: write objective={'name': 'at', 'label_smoothing': "
            f"{args.label_smoothing_factor:g}}} instead, or use AdversarialTrainer."
        )
    if args.n_gpu > 1:
        problems.append(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process "
            "per GPU with torchrun, accelerate launch or deepspeed."
        )
    if args.fsdp:
        problems.append(f"fsdp={args.fsdp!r} is not supported: use DeepSpeed's ZeRO or DDP.")
    config = getattr(model, "config", None)
    if settings.objective.head == "classes" and main_input == "pixel_values":
        num_labels = int(getattr(config, "num_labels", 2))
        problem_type = getattr(config, "problem_type", None)
        if num_labels < 2:
            problems.append(
                f"config.num_labels={num_labels} is a regression to transformers, which is not "
                "supported: write num_labels=2 for two classes."
            )
        elif problem_type not in (None, "single_label_classification"):
            problems.append(
                f"config.problem_type={problem_type!r} with num_labels={num_labels}: adversarial "
                "training here is for classes that exclude one another. Set problem_type="
                "'single_label_classification'."
            )
        else:
            check_num_classes(settings.dat, num_labels, problems)
    problems += _attack_problems(args, model, settings)
    if args.deepspeed_plugin is not None:
        # They are DeepSpeed's own here, which would miss them after the model was moved.
        config = args.deepspeed_plugin.hf_ds_config.config
        check_sections(config, problems, kinds=MONITORS, here=True)
    if problems:
        raise ConfigError("\n".join(problems))


def _attack_problems(args: TrainingArguments, model: nn.Module, settings: Settings) -> list[str]:
    """Requirements of attack and weight perturbation that model or launch do not meet."""
    problems = [] if settings.attack is None else misfits(settings.attack, model)
    plugin = args.deepspeed_plugin
    is_sharded = plugin is not None and plugin.zero_stage == 3
    if is_sharded and getattr(settings.attack, "fold_batch_norm", False):
        problems.append(
            "dat.attack.fold_batch_norm=true with zero_optimization.stage=3, under which weights "
            "are not there before the forward: remove one of them."
        )
    checkpoints = args.gradient_checkpointing_kwargs or {}
    is_reentrant = args.gradient_checkpointing and checkpoints.get("use_reentrant")
    if settings.weight_perturbation is not None and is_reentrant:
        problems.append(
            "weight_perturbation with gradient_checkpointing_kwargs={'use_reentrant': True}: its "
            "gradient cannot be taken apart from the update's. Write False."
        )
    return problems
