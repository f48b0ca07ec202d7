"""The engine: DeepSpeed's, with the inner maximisation inside its forward.

Shapes: ``B`` this rank's micro-batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from dat_ds.attacks import (
    FORMATS,
    Attack,
    AttackGraphs,
    FreeAttack,
    FreePerturbation,
    InputGradient,
    Precision,
    SampleGenerator,
    attack_mode,
    check_device,
    finite_samples,
    gradient_speedup,
    preserved_buffers,
    product_speedup,
)
from dat_ds.config import RunConfig, precision_of, threat_of
from dat_ds.config.schema import EngineConfig
from dat_ds.data import BatchPlan, DistributedLoader, PlannedBatch, classes_of
from dat_ds.engine import hooks
from dat_ds.engine.reductions import attach_compression
from dat_ds.engine.traffic import Phase, Traffic, listen, stop_listening
from dat_ds.engine.validate import attack_problems, has_batch_norm
from dat_ds.errors import ConfigError, DataError
from dat_ds.evaluation import Task, task_of
from dat_ds.minmax.metrics import PhaseTimer, StepMetrics
from dat_ds.minmax.outer import num_correct, outer_batch
from dat_ds.minmax.weights import WeightPerturbation
from dat_ds.models import PixelModel
from dat_ds.models.batch_norm import split_batch_norm
from dat_ds.objectives import Objective
from dat_ds.objectives.grad_align import AlignmentProbes, alignment_probes
from dat_ds.optim import CompressedOptimizer
from dat_ds.ranks import Ranks, rows_of_others

logger = logging.getLogger(__name__)

_WORTHWHILE = 1.1
"""Speedup of the attack from which on ``auto`` takes a shorter float."""


class AdversarialEngine:
    """DeepSpeed's three-line loop for adversarial training.

    ``loss = engine(x, y)`` runs the attack on ``x`` and then the outer forward; ``backward`` and
    ``step`` are DeepSpeed's. Made by :func:`dat_ds.initialize`.

    The attack calls the bare module and takes input gradients only: it never enters DeepSpeed's
    forward, so it triggers no gradient hook, no reduction and no loss scale, whatever its number
    of steps. An attack that is run and thrown away leaves the training trajectory unchanged.

    Attributes:
        deepspeed: The real ``DeepSpeedEngine``.
        module: The bare model, pixels in [0, 1] to logits.
        run: The resolved run config.
        ranks: The processes of the run.
        reference: The model as it was at the start, frozen, where the objective needs it.
        weight_perturbation: Applied from the outer forward to the end of :meth:`backward`.
        averaging_optimizer: The optimizer, where it averages over ranks by itself.
        compression: Averages gradients through a codec; None where they are not compressed.
        attack_precision: That of the attack's passes; None for the engine's; ``auto`` until the
            first attack has timed which is faster.
        graphs: Replays attacks as CUDA graphs; None where they run step by step.
        free: What free adversarial training carries from step to step; None for other attacks.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        run: RunConfig,
        ranks: Ranks,
        attack: Attack | None,
        objective: Objective,
        total_steps: int | None = None,
        helper: nn.Module | None = None,
        reference: nn.Module | None = None,
        loader: DistributedLoader | None = None,
        averaging_optimizer: CompressedOptimizer | None = None,
    ) -> None:
        """Wrap a DeepSpeed engine; use :func:`dat_ds.initialize` instead."""
        self.deepspeed = engine
        self.module: nn.Module = engine.module
        self.run = run
        self.ranks = ranks
        self._attack = attack
        self._threat = threat_of(run.dat)
        self.free = FreePerturbation() if isinstance(attack, FreeAttack) else None
        self._replayed: tuple[Tensor, Tensor] | None = None
        self._objective = objective
        self._total_steps = total_steps
        self._helper = helper
        self.reference = reference
        self._loader = loader
        self.averaging_optimizer = averaging_optimizer
        self._precision = precision_of(run.deepspeed)
        # Our own models normalise in float32 and cast after that; others get their own dtype.
        casts_itself = isinstance(self.module, PixelModel)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._input_dtype = (
            torch.float32 if casts_itself else half.get(self._precision, torch.float32)
        )
        self._has_batch_norm = has_batch_norm(self.module)
        self._layout = (
            torch.channels_last if run.dat.engine.channels_last else torch.preserve_format
        )
        self._attacked = _compiled(engine, run.dat.engine)
        self.attack_precision: Precision | Literal["auto"] | None = run.dat.attack.precision
        if self.attack_precision is None and attack is not None:
            self.attack_precision = attack.precision
        if self.attack_precision is not None and self.attack_precision != "auto":
            with ranks.together():
                check_device(ranks.device, self.attack_precision)
            _warn_of_slow_products(self.attack_precision, ranks)
        self.graphs: AttackGraphs | None = None
        if run.dat.engine.cuda_graphs and ranks.device.type == "cuda":
            self.graphs = AttackGraphs(self.module, warns=ranks.is_main)
        elif run.dat.engine.cuda_graphs and ranks.is_main:
            logger.warning("dat.engine.cuda_graphs=true does nothing without a CUDA device.")
        budget = run.dat.engine.resident_parameters_gib * 2**30
        self.keeps_parameters_resident = (
            run.zero_stage == 3 and hooks.gathered_bytes(engine) <= budget
        )
        self.weight_perturbation = _weight_perturbation_of(run)
        if self.weight_perturbation and run.zero_stage == 3 and not self.keeps_parameters_resident:
            needed = hooks.gathered_bytes(engine) / 2**30
            raise ConfigError(
                "dat.weight_perturbation under ZeRO-3 needs all parameters on the device at once, "
                f"{needed:.2f} GiB: write dat.engine.resident_parameters_gib={math.ceil(needed)}."
            )
        self.compression = attach_compression(engine, run, ranks)
        self._perturbed = contextlib.ExitStack()
        self._traffic = Traffic()
        listen(self._traffic)
        self._checked_pixels = False
        self._coming: Sequence[PlannedBatch] = ()
        self._group: list[tuple[_MicroBatch, Tensor]] = []
        self._pending = self._new_metrics()
        self._last: StepMetrics | None = None

    # ---- training

    @property
    def global_steps(self) -> int:
        """Optimizer steps done, skipped ones (float16 overflow) included."""
        return int(self.deepspeed.global_steps)

    @property
    def micro_step(self) -> int:
        """Micro-steps done since the last optimizer step."""
        return int(self.deepspeed.micro_steps) % self.accumulation

    @property
    def progress(self) -> float:
        """Share of the run's optimizer steps that are done, in [0, 1]; 0 without a known length."""
        return min(1.0, self.global_steps / self._total_steps) if self._total_steps else 0.0

    @property
    def replicas_differ(self) -> bool:
        """Whether ranks hold weights of their own: 0/1 Adam's, once its variance is frozen."""
        optimizer = self.averaging_optimizer
        return (
            optimizer is not None
            and optimizer.steps_locally
            and optimizer.is_frozen
            and self.ranks.count > 1
        )

    @property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step."""
        return int(self.deepspeed.gradient_accumulation_steps())

    def __call__(self, x: Tensor, y: Tensor, *, plan: BatchPlan | None = None) -> Tensor:
        """Attack ``x``, then compute the outer loss on this rank's micro-batch.

        Args:
            x: Images in pixel units [0, 1], floating point, any device. May hold no image at all
                (a rank that the last batch of an epoch left out); such a rank computes along with
                weight 0, so that all ranks do the same number of forwards.
            y: Class indices ``(B,)``, or what is known of them (see
                :mod:`dat_ds.data.unlabelled`); or probabilities ``(B, K)``. Not read by a
                self-supervised objective.
            plan: Place and weight of this micro-batch in the global batch. Default: the loader's
                plan of the batch it handed out last, which weights uneven batches so that ranks
                average to the mean over the global batch; batches that did not come from it have
                weight 1.

        Returns:
            The loss to give to :meth:`backward`: a mean over the micro-batch, local to this rank.
        """
        self._perturbed.close()  # where an earlier loss never went backward
        metrics = self._pending
        metrics.timer.enter("attack")
        part, x_adv = self._next_attacked(x, y, plan)
        if self.free is not None:
            x_adv.requires_grad_()
            self._replayed = (part.x, x_adv) if part.num_images else None
        probes = self._alignment_probes(part)
        metrics.timer.enter("update")
        # The black image that an empty batch is filled with must not enter BatchNorm's statistics.
        is_empty = part.num_images == 0
        keep = preserved_buffers(self.module) if is_empty else contextlib.nullcontext()
        self._perturb_weights(part, x_adv, probes)
        with self._phase("forward"), keep, self._restored_on_error():
            terms, logits_adv, logits = self._outer_loss(self.deepspeed, part, x_adv, probes)
        natural_logits = logits_adv if self._attack is None else logits
        if not is_empty and self._objective.classifies:
            if natural_logits is not None:
                metrics.add_natural(*num_correct(natural_logits, part.y, part.labelled))
            if self._attack is not None:
                metrics.add_robust(*num_correct(logits_adv, part.y, part.labelled))
        metrics.add_terms(terms, part.weight / self.accumulation)
        loss = terms["loss"]
        return loss if part.weight == 1.0 else loss * part.weight

    def look_ahead(self, batches: Sequence[PlannedBatch]) -> None:
        """Tell of the micro-batches that come next, where several are attacked in one batch.

        Needed where ``dat.engine.attack_micro_batches`` is above 1 and the engine is not called
        with what its loader hands out; does nothing otherwise.

        Args:
            batches: ``(x, y, plan)`` of the next calls: the very same tensors, in their order, and
                the place of each in the global batch (``loader.plan`` when it was handed out);
                None for batches that are not the loader's.
        """
        self._coming = batches

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's backward; reduces gradients when the last micro-step of a step is reached."""
        if self.averaging_optimizer is not None:
            hooks.reduce_in_backward(
                self.deepspeed, self.averaging_optimizer.needs_averaged_gradients
            )
        if self.compression is not None:
            self.compression.start(self.global_steps * self.accumulation + self.micro_step)
        scale = hooks.missing_loss_scale(self.deepspeed)
        with self._phase("backward"), self._perturbed:
            self.deepspeed.backward(loss if scale == 1 else loss.float() * scale)
        if self.compression is not None and self.micro_step == self.accumulation - 1:
            self.compression.check_done()
        if self._replayed is not None:
            self._pending.timer.enter("attack")
            self._ascend_with(*self._replayed)
            self._replayed = None
            self._pending.timer.enter("update")

    def step(self) -> None:
        """DeepSpeed's step: an optimizer step after the last micro-step, else bookkeeping."""
        completes = self.micro_step == self.accumulation - 1
        with self._phase("step"), hooks.named_loss_scale_error():
            self.deepspeed.step()
        self._pending.timer.leave()
        if completes:
            self._pending.bytes_sent, self._pending.collectives = self._traffic.take()
            self._last, self._pending = self._pending, self._new_metrics()
            self._group.clear()  # attacked on weights that are gone, where calls were left out

    # ---- attack

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        *,
        first_index: int = 0,
        indices: Sequence[int] | None = None,
        gradient: InputGradient | None = None,
    ) -> Tensor:
        """Adversarial images for ``x`` under the run's attack; the model is left as it was.

        Random starts are a function of the run's seed, the optimizer step, and each image's index;
        not of ranks or devices.

        Args:
            x: Images in pixel units [0, 1], float32, on the engine's device.
            y: What the inner loss compares outputs with, on the engine's device.
            first_index: Index of the first image within the step's global batch.
            indices: Those of all images, where they do not follow one another.
            gradient: Counts of the attack's gradients go here.

        Returns:
            Float32 images of the shape of ``x`` (several after one another for an attack with
            several views); ``x`` itself where the run has no attack.
        """
        attack = self.attack_in_use
        if attack is None:
            return x
        generator = SampleGenerator(self.run.dat.seed, self.global_steps, first_index, indices)
        if self.free is not None:
            return self.free.images(x, self.micro_step, attack.ball, generator)
        gradient = self._input_gradient() if gradient is None else gradient
        gathers = self._traffic.calls["parameters"]
        frozen = functools.partial(self.frozen, self.run.dat.attack.model_mode, self._attacked)
        with self._phase("forward"):
            if self.attack_precision == "auto":
                with frozen() as model:
                    self.attack_precision = self._faster_precision(model, x)
                attack = attack.with_precision(self.attack_precision)
            if self.graphs is not None:
                x_adv = self.graphs(attack, frozen, x, y, generator, gradient)
            else:
                with frozen() as model:
                    x_adv = attack(model, x, y, generator, gradient=gradient)
        self._pending.attack_parameter_gathers += self._traffic.calls["parameters"] - gathers
        return x_adv

    @contextlib.contextmanager
    def frozen(
        self, model_mode: str = "eval", called: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """The model as an attack or an evaluation may use it: pixels in, logits out, no trace left.

        Parameters are frozen, modules are in ``model_mode``, the engine's autocast applies, and
        ZeRO-3 parameters stay gathered where the memory budget allows it. Every rank must call
        the model the same number of times. ``called`` stands in for the module's own call.
        """
        resident = (
            hooks.resident_parameters(self.deepspeed)
            if self.keeps_parameters_resident
            else contextlib.nullcontext()
        )
        try:
            with resident, attack_mode(self.module, model_mode), self._autocast():  # type: ignore[arg-type]
                called = self.module if called is None else called
                yield _FrozenModel(self.module, called, self._forward, model_mode == "train")
        except BaseException:
            # A forward that broke off leaves ZeRO-3 parameters gathered, and marked as in use.
            hooks.release_parameters(self.deepspeed)
            raise

    @property
    def attack_in_use(self) -> Attack | None:
        """The training attack at this point of the run; None for natural training."""
        if self._attack is None:
            return None
        attack = self._attack.at(self.progress)
        if self.attack_precision == "auto":
            return attack
        return attack.with_precision(self.attack_precision)

    def use_attack(self, attack: Attack) -> None:
        """Train with another attack from the next micro-step on.

        Raises:
            ConfigError: If the run cannot go along with it.
        """
        if problems := attack_problems(attack, self._objective, self.run, self.accumulation):
            raise ConfigError("\n".join(problems))
        self._attack = attack
        self.free = FreePerturbation() if isinstance(attack, FreeAttack) else None
        self._group.clear()
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def task(self) -> Task | None:
        """What the model in training is judged by; None where it classifies images."""
        return task_of(self._objective, self._original_outputs)

    def accuracy_under(self, attack: Attack, x: Tensor, y: Tensor) -> float:
        """Accuracy over all ranks' images under ``attack``, in eval mode; a collective.

        Args:
            attack: An attack with one view.
            x: This rank's images, as :meth:`__call__` takes them; may hold no image at all.
            y: Class indices ``(B,)``.

        Returns:
            A fraction; training goes on as if it had not been measured.
        """
        first_index = self.ranks.rank * len(x)
        x, y, num_images = self._prepare(x, y, first_index)
        first_index *= self._objective.num_views
        generator = SampleGenerator(self.run.dat.seed, self.global_steps, first_index)
        with self.frozen() as model:
            x_adv = attack(model, x, y, generator, gradient=self._input_gradient())
            with torch.no_grad():
                correct_here, _ = num_correct(model(x_adv), y)
        counts = torch.tensor([float(correct_here) if num_images else 0.0, float(num_images)])
        correct, total = self.ranks.sum(counts.double()).tolist()
        return float(correct / total) if total else 0.0

    def measure_natural_accuracy(self, x: Tensor, y: Tensor) -> None:
        """Add natural accuracy on ``x`` to the last step's metrics: one forward in eval mode.

        Does nothing where the objective computed natural logits anyway, or has none of classes.
        """
        # Decided alike on every rank: one that had no image has no natural logits either.
        has_natural = self._objective.needs_natural_logits or self._attack is None
        if self._last is None or has_natural or not self._objective.classifies:
            return
        x, y, num_images = self._prepare(x, y, 0)
        y, labelled, _ = self._read_labels(y)
        with self.frozen() as model, torch.no_grad():
            logits = model(x)
        if num_images:
            self._last.add_natural(*num_correct(logits, y, labelled))

    # ---- metrics

    @property
    def metrics(self) -> dict[str, Any]:
        """The last optimizer step on this rank, waiting for the device; empty before the first.

        The objective's terms (``loss`` and others), accuracies as fractions, ``seconds_attack`` and
        ``seconds_update``, ``bytes_sent`` by kind, ``attack_zero_share`` (of gradient entries),
        ``attack_nonfinite_share`` (of samples), the number of all-gathers of parameters, and
        ``skipped_steps``: how many steps were dropped so far for non-finite gradients.
        """
        return {} if self._last is None else self._describe(self._last, self._last.sums(), 1)

    @property
    def collectives(self) -> dict[str, int]:
        """Collectives of the last optimizer step on this rank, by kind of traffic."""
        return {} if self._last is None else dict(self._last.collectives)

    def reduced_metrics(self) -> dict[str, Any]:
        """:attr:`metrics` over all ranks, a collective; seconds and bytes stay this rank's."""
        if self._last is None:
            return {}
        return self._describe(self._last, self.ranks.sum(self._last.sums()), self.ranks.count)

    def _describe(self, metrics: StepMetrics, sums: Tensor, ranks: int) -> dict[str, Any]:
        means = metrics.means(sums, ranks)
        own_skips = 0 if self.averaging_optimizer is None else self.averaging_optimizer.num_skipped
        return {
            **means,
            **metrics.local(),
            "bytes_sent": dict(metrics.bytes_sent),
            "skipped_steps": int(self.deepspeed.skipped_steps) + own_skips,
        }

    def close(self) -> None:
        """Let go of the process group and of DeepSpeed's hooks on the module."""
        stop_listening(self._traffic)
        self.deepspeed.destroy()

    # ---- internals

    @contextlib.contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        """A part of training, whose traffic is counted, and compressed where it is asked for."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._traffic.counting(phase))
            if self.compression is not None:
                stack.enter_context(self.compression.training_pass())
            yield

    def _faster_precision(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Precision | None:
        """``bf16`` where it makes the attack faster on every rank, else None; a collective."""
        device = self.ranks.device

        def slower_anywhere(speedup: float) -> bool:
            return self.ranks.any(torch.tensor(speedup < _WORTHWHILE))

        # Where a processor lacks the instructions, the model would take minutes.
        of_products = product_speedup(device, "bf16") if device.type == "cpu" else math.inf
        chosen: Precision | None = None
        found = f"matrix products in bfloat16 run at {of_products:.2f}x the speed"
        if not slower_anywhere(of_products):
            speedup = gradient_speedup(model, x, "bf16")
            found = f"input gradients in bfloat16 run at {speedup:.2f}x the speed"
            chosen = None if slower_anywhere(speedup) else "bf16"
        if self.ranks.is_main:
            what = "the engine's precision" if chosen is None else chosen
            logger.info("dat.attack.precision='auto': %s; taking %s.", found, what)
        return chosen

    def _input_gradient(self) -> InputGradient:
        # float16 alone overflows, under DeepSpeed's own casts or under autocast.
        overflows = "fp16" in (self._precision, self.attack_precision) or (
            self._precision == "autocast" and self.deepspeed.torch_autocast_dtype() == torch.float16
        )
        return InputGradient(retry_non_finite=overflows, agree=self.ranks.any)

    def _new_metrics(self) -> StepMetrics:
        return StepMetrics(PhaseTimer(self.ranks.device), self._input_gradient())

    def _next_attacked(
        self, x: Tensor, y: Tensor, plan: BatchPlan | None
    ) -> tuple[_MicroBatch, Tensor]:
        """A micro-batch ready for the outer forward, and its adversarial images.

        Raises:
            DataError: For a micro-batch that was not told of, where several are attacked in one.
        """
        size = self.run.dat.engine.attack_micro_batches
        if size == 1 or self._attack is None:
            if plan is None and self._loader is not None:
                plan = self._loader.plan
            return self._attack_group([self._micro_batch(x, y, plan)])[0]
        while self._group and not self._group[0][0].is_made_of(x, y):
            self._group.pop(0)  # of calls that were left out
        if not self._group:
            size = min(size, self.accumulation - self.micro_step)
            group = list(self._coming_from(x, y)[:size])
            if plan is not None:
                group[0] = (x, y, plan)
            self._group = self._attack_group(
                [self._micro_batch(*batch, ahead=ahead) for ahead, batch in enumerate(group)]
            )
        return self._group.pop(0)

    def _coming_from(self, x: Tensor, y: Tensor) -> Sequence[PlannedBatch]:
        """What is known of the micro-batches from ``(x, y)`` on."""
        of_loader = () if self._loader is None else self._loader.ahead
        for coming in (self._coming, of_loader):
            for first, (known_x, known_y, _) in enumerate(coming):
                if known_x is x and known_y is y:
                    return coming[first:]
        raise DataError(
            f"dat.engine.attack_micro_batches={self.run.dat.engine.attack_micro_batches}: these "
            "images and labels are not the tensors that the loader handed out, so those that "
            "follow are not known. Give the engine what the loader gives (it moves them to the "
            "device; transforms belong into the dataset). Or call engine.look_ahead([(x, y, "
            "loader.plan), ...]) before each step, with None for batches that are not the "
            "loader's. Or write dat.engine.attack_micro_batches=1."
        )

    def _attack_group(self, group: list[_MicroBatch]) -> list[tuple[_MicroBatch, Tensor]]:
        """Micro-batches of one optimizer step, attacked as one batch, with their images."""
        gradient = self._pending.gradient
        if len(group) == 1:
            part = group[0]
            x_adv = self.attack(part.x, part.y, first_index=part.first_index, gradient=gradient)
            return [(part, x_adv)]
        x, y = torch.cat([part.x for part in group]), torch.cat([part.y for part in group])
        indices = [part.first_index + i for part in group for i in range(len(part.x))]
        x_adv = self.attack(x, y, indices=indices, gradient=gradient)
        # An attack with several views returns all images of one view before those of the next.
        sizes = [len(part.x) for part in group]
        views = torch.split(x_adv.view(-1, *x.shape), sizes, dim=1)
        return [(part, images.flatten(0, 1)) for part, images in zip(group, views, strict=True)]

    def _micro_batch(
        self, x: Tensor, y: Tensor, plan: BatchPlan | None, ahead: int = 0
    ) -> _MicroBatch:
        """What the engine makes of a batch that it is given in ``ahead`` micro-steps."""
        first_index, weight = self._place_in_global_batch(len(x), plan, ahead)
        source = (x, y)
        x, y, num_images = self._prepare(x, y, first_index)
        y, labelled, weights = self._read_labels(y)
        first_index *= self._objective.num_views
        return _MicroBatch(source, x, y, labelled, weights, num_images, first_index, weight)

    def _place_in_global_batch(
        self, num_images: int, plan: BatchPlan | None, ahead: int
    ) -> tuple[int, float]:
        """Index of the micro-batch's first image within the global batch, and its loss weight."""
        if plan is not None and len(plan.indices) == num_images:
            return plan.first_position, plan.weight
        slot = (self.micro_step + ahead) * self.ranks.count + self.ranks.rank
        return slot * num_images, 1.0

    def _prepare(self, x: Tensor, y: Tensor, first_index: int) -> tuple[Tensor, Tensor, int]:
        """Move a batch to the device, check its pixels once, and fill in for an empty one.

        Returns:
            The images and targets of :meth:`Objective.inputs`, and how many of the images count.
        """
        device, num_images = self.ranks.device, len(x)
        if not x.is_floating_point():
            raise DataError(
                f"Images are {x.dtype}: give floating-point pixels in [0, 1], as x.float() / 255."
            )
        x = x.to(device, torch.float32, non_blocking=True)
        y = y.to(device, non_blocking=True)
        if not self._checked_pixels and num_images:
            self._check_pixels(x)
        if num_images == 0:
            x, y = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1, *y.shape[1:])
        # A stream of its own: the attack's random start is another draw.
        generator = SampleGenerator(self.run.dat.seed + 2, self.global_steps, first_index)
        objective = self._objective
        x, y = objective.inputs(x, y, generator=generator, reference=self._original_outputs)
        if num_images == 0 and objective.compares_samples:
            y = torch.full_like(y, -1)
        return x, y, num_images * objective.num_views

    @torch.no_grad()
    def _original_outputs(self, x: Tensor) -> Tensor:
        """Outputs of the model as it was at the start."""
        assert self.reference is not None
        with self._autocast():
            return self._forward(self.reference, x, training=False)

    def _features_of_others(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Other ranks' features of this micro-step; a collective, in the backward too."""
        micro_batch = int(self.deepspeed.train_micro_batch_size_per_gpu())
        num_rows = micro_batch * self._objective.num_views
        if len(features) > num_rows:
            raise DataError(
                f"A batch of more than train_micro_batch_size_per_gpu={micro_batch} images: "
                f"dat.objective.name={self._objective.name!r} compares those of all ranks."
            )
        return rows_of_others(features, y, self.ranks, num_rows=num_rows)

    def _read_labels(self, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Classes, which of them are true ``(B,)``, and each sample's weight ``(B,)``.

        The latter two are None where they are 1 throughout.
        """
        data, unlabelled_weight = self.run.dat.data, self.run.dat.objective.unlabelled_weight
        if y.is_floating_point() or not data.has_unlabelled:
            return y, None, None
        labelled = y >= 0
        weights = None
        if unlabelled_weight != 1:
            weights = torch.where(labelled, 1.0, unlabelled_weight)
        return classes_of(y), labelled, weights

    def _check_pixels(self, x: Tensor) -> None:
        threat = self.run.dat.threat_model
        low, high = float(x.min()), float(x.max())
        if not (low >= threat.lower - 1e-6 and high <= threat.upper + 1e-6):
            raise DataError(
                f"Images span [{low:g}, {high:g}], outside the pixel range [{threat.lower:g}, "
                f"{threat.upper:g}]. Give raw pixels; normalisation belongs inside the model "
                "(dat.model.mean, dat.model.std)."
            )
        self._checked_pixels = True

    def _outer_loss(
        self,
        model: Callable[[Tensor], Tensor],
        part: _MicroBatch,
        x_adv: Tensor,
        probes: AlignmentProbes | None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The objective's terms, the adversarial and, where needed, the natural logits."""
        batch = outer_batch(self._objective, part.x, x_adv, threat=self._threat, probes=probes)
        with self._batch_norm_of(list(batch.sizes.values())):
            outputs = self._forward(model, batch.images, training=True)
        compares = self._objective.compares_samples and self.ranks.count > 1
        outer = batch.terms(
            outputs,
            part.y,
            weights=part.weights,
            helper=self._helper,
            gather=self._features_of_others if compares else None,
            grad_align=self.run.dat.objective.grad_align,
        )
        return outer.terms, outer.logits_adv, outer.logits

    def _alignment_probes(self, part: _MicroBatch) -> AlignmentProbes | None:
        """GradAlign's images for the outer forward; None where it is off."""
        attack = self.attack_in_use
        if not self.run.dat.objective.grad_align or attack is None:
            return None
        # A stream of its own: the attack's random start is another draw.
        generator = SampleGenerator(self.run.dat.seed + 1, self.global_steps, part.first_index)
        with self._phase("forward"), self.frozen(self.run.dat.attack.model_mode) as model:
            return alignment_probes(model, part.x, part.y, threat=attack.ball, generator=generator)

    def _ascend_with(self, x: Tensor, x_adv: Tensor) -> None:
        """Move free training's perturbation up the gradient that the backward left at ``x_adv``."""
        attack = self.attack_in_use
        assert self.free is not None
        assert isinstance(attack, FreeAttack)
        gradient = x_adv.grad
        if gradient is None:
            raise RuntimeError("The loss given to backward does not depend on the last images.")
        gradient = self._pending.gradient.count(gradient, finite_samples(gradient))
        self.free.ascend(x, x_adv, gradient, self.micro_step, attack.ball, attack.step)

    def _perturb_weights(
        self, part: _MicroBatch, x_adv: Tensor, probes: AlignmentProbes | None
    ) -> None:
        """Move the weights up the outer loss, until the end of :meth:`backward`."""
        perturbation = self.weight_perturbation
        if perturbation is None or self.progress < self.run.dat.weight_perturbation.start:
            return

        def outer_loss() -> Tensor:
            terms, *_ = self._outer_loss(self.module, part, x_adv, probes)
            return terms["loss"] * part.weight

        scale = hooks.loss_scale(self.deepspeed)
        with self._phase("backward"), self._restored_on_error():
            if self.keeps_parameters_resident:
                self._perturbed.enter_context(hooks.resident_parameters(self.deepspeed))
            with self._autocast():
                applied = perturbation.applied(self.module, outer_loss, scale=scale)
                self._perturbed.enter_context(applied)

    @contextlib.contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._perturbed.close()
            raise

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast that DeepSpeed's forward applies, for calls of the bare module."""
        if self._precision != "autocast":
            return contextlib.nullcontext()
        dtype = self.deepspeed.torch_autocast_dtype()
        return torch.autocast(self.ranks.device.type, dtype=dtype)

    def _batch_norm_of(self, sizes: list[int]) -> contextlib.AbstractContextManager[None]:
        """BatchNorm's statistics of all images together, or of each kind apart."""
        split = self.run.dat.objective.batch_norm == "split"
        if split and self._has_batch_norm and len(sizes) > 1:
            return split_batch_norm(self.module, sizes)
        return contextlib.nullcontext()

    def _forward(self, model: Callable[[Tensor], Tensor], x: Tensor, *, training: bool) -> Tensor:
        """Logits of ``x`` ``(B, C, H, W)``, cast to what the model takes.

        A single image runs twice where BatchNorm takes statistics, which it refuses to do of one
        value per channel; its logits and gradients are those of running once.
        """
        x = x.to(self._input_dtype, memory_format=self._layout)
        if training and len(x) == 1 and self._has_batch_norm:
            return model(torch.cat([x, x]))[:1]
        return model(x)


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch as it is attacked and trained on; ``n`` images, views included.

    Attributes:
        source: The images and labels that the engine was called with.
        x: Images ``(n, C, H, W)`` on the device.
        y: What the inner and the outer loss compare the model's outputs with.
        labelled: Which labels are true ``(n,)``; None for all.
        weights: Weight of each sample ``(n,)``; None for 1.
        num_images: How many images count; 0 where one fills in for none.
        first_index: Index of the first image within the step's global batch.
        weight: Of the loss.
    """

    source: tuple[Tensor, Tensor]
    x: Tensor
    y: Tensor
    labelled: Tensor | None
    weights: Tensor | None
    num_images: int
    first_index: int
    weight: float

    def is_made_of(self, x: Tensor, y: Tensor) -> bool:
        """Whether these very tensors are its source."""
        return self.source[0] is x and self.source[1] is y


@dataclass(frozen=True)
class _FrozenModel:
    """What :meth:`AdversarialEngine.frozen` gives: the module, called as the engine calls it."""

    module: nn.Module
    called: Callable[[Tensor], Tensor]
    forward: Callable[..., Tensor]
    training: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(self.called, x, training=self.training)


def _compiled(engine: DeepSpeedEngine, config: EngineConfig) -> Callable[[Tensor], Tensor]:
    """What the training attack calls, after compiling what is asked for."""
    module: nn.Module = engine.module
    if config.compile == "all":
        engine.compile()
    return torch.compile(module) if config.compile == "attack" else module


def _warn_of_slow_products(precision: Precision, ranks: Ranks) -> None:
    if not ranks.is_main or ranks.device.type != "cpu" or precision in FORMATS:
        return
    if (speedup := product_speedup(ranks.device, precision)) < 1:
        logger.warning(
            "dat.attack.precision=%r is slow here: matrix products run at %.2fx the speed of "
            "float32's. Remove it, or write 'auto'.",
            precision,
            speedup,
        )


def _weight_perturbation_of(run: RunConfig) -> WeightPerturbation | None:
    settings = run.dat.weight_perturbation
    if settings.name == "none":
        return None
    assert settings.radius is not None
    return WeightPerturbation(settings.name, settings.radius, settings.scope)
