"""The engine: DeepSpeed's, with the inner maximisation inside its forward.

Shapes: ``B`` this rank's micro-batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.utils.data import Dataset

from dat_ds.assembly import evaluate_model
from dat_ds.attacks import Attack, InputGradient, already_checked, preserved_buffers
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.strategy import Adversarial
from dat_ds.config import RunConfig, threat_of
from dat_ds.contracts import as_images, as_pictures
from dat_ds.data import BatchPlan, DistributedLoader, Loader, file_of
from dat_ds.data.fingerprint import fingerprint
from dat_ds.data.loader import PlannedBatch
from dat_ds.data.samples import Batch
from dat_ds.engine import hooks
from dat_ds.engine.bare import BareModel, graphs_of
from dat_ds.engine.checkpoint import Checkpoints, tell_of_partial_checkpoints
from dat_ds.engine.exported import exported_weights
from dat_ds.engine.identity import Identity
from dat_ds.engine.monitor import Monitor
from dat_ds.engine.random_state import preserved_random_state
from dat_ds.engine.reductions import attach_compression
from dat_ds.engine.safe_loading import load_safely
from dat_ds.engine.steplog import StepLog
from dat_ds.engine.validate import attack_problems, evaluation_problems
from dat_ds.errors import ConfigError, DataError
from dat_ds.evaluation import Record, Task, task_of
from dat_ds.minmax import (
    Access,
    BatchReader,
    FiniteWatch,
    InnerMaximisation,
    MicroBatch,
    Moment,
    OuterForward,
    PerturbedWeights,
    num_correct,
    refusal_of_unlabelled,
    refuse_sharded,
    weight_perturbation,
)
from dat_ds.objectives import AlignmentProbes, Objective
from dat_ds.optim import CompressedOptimizer, WeightEma
from dat_ds.progress import PROGRESS
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")


class AdversarialEngine:
    """DeepSpeed's three-line loop for adversarial training.

    ``loss = engine(x, y)`` runs the attack on ``x`` and then the outer forward; ``backward`` and
    ``step`` are DeepSpeed's. ``train_step([(x, y), ...])`` does all three for each micro-batch of
    an optimizer step. Made by :func:`dat_ds.initialize`.

    The attack calls the bare module and takes input gradients only: it never enters DeepSpeed's
    forward, so it triggers no gradient hook, no reduction and no loss scale, whatever its number
    of steps. An attack that is run and thrown away leaves the training trajectory unchanged.

    Attributes:
        deepspeed: The real ``DeepSpeedEngine``.
        module: The bare model, pixels in [0, 1] to logits.
        run: The resolved run config.
        ranks: The processes of the run.
        reference: The model as it was at the start, frozen, where the objective needs it.
        averaging_optimizer: The optimizer, where it averages over ranks by itself.
        compression: Averages gradients through a codec; None where they are not compressed.
        inner: The inner maximisation: attack, its precision, what it carries along.
        monitor: Writes metrics to the monitors that the config enables.
        ema: Average of the weights (``dat.ema``), moved on by :meth:`step`; None where it is off.
        loader: Gives this rank's batches of the training data; None without such data.
        traffic: Counts what this process sends.
        watch: Tells of faulty images and labels, which are looked for in every batch: on several
            ranks and on a GPU when :attr:`metrics` are read and before a checkpoint.
        finite: Remembers on the device the first step whose loss or gradient was not finite.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        run: RunConfig,
        ranks: Ranks,
        attack: Attack | None,
        objective: Objective,
        monitor: Monitor,
        total_steps: int | None = None,
        helper: nn.Module | None = None,
        reference: nn.Module | None = None,
        loader: Loader | None = None,
        averaging_optimizer: CompressedOptimizer | None = None,
    ) -> None:
        """Wrap a DeepSpeed engine; use :func:`dat_ds.initialize` instead."""
        self.deepspeed = engine
        tell_of_partial_checkpoints(engine)
        load_safely(engine)
        self.module: nn.Module = engine.module
        self.run = run
        self.ranks = ranks
        self.reference = reference
        self.averaging_optimizer = averaging_optimizer
        self.monitor = monitor
        self._objective = objective
        self._total_steps = total_steps
        self.loader = loader
        self._data_position = None if loader is None else loader.state_dict()
        self._has_gradients = False
        dat, threat = run.dat, threat_of(run.dat)
        self._reader = BatchReader(
            objective,
            ranks,
            threat,
            without_label=refusal_of_unlabelled(objective, attack),
            unlabelled_weight=dat.objective.unlabelled_weight,
            reference=self._original_outputs,
        )
        self.watch = self._reader.watch
        self.finite = FiniteWatch()
        if isinstance(loader, DistributedLoader):
            self.watch.file_name = functools.partial(file_of, loader.dataset)
        self._bare = BareModel(engine, run, ranks.device, self._reader.gate)
        self.inner = InnerMaximisation(
            Access(ranks, self._opened_to_attack, self._bare.overflows),
            attack,
            model_mode=dat.attack.model_mode,
            precision=dat.attack.precision,
            graphs=graphs_of(run, self.module, ranks),
            aligns=dat.objective.grad_align > 0,
        )
        self._outer = OuterForward(
            self.module,
            objective,
            threat,
            ranks,
            micro_batch=int(engine.train_micro_batch_size_per_gpu()),
            helper=helper,
            grad_align=dat.objective.grad_align,
            splits_batch_norm=dat.objective.batch_norm == "split",
        )
        perturbed = dat.weight_perturbation
        self._weights = PerturbedWeights(
            weight_perturbation(perturbed.name, perturbed.radius, perturbed.scope),
            self.module,
            ranks,
            start=perturbed.start,
            whole=self._bare.resident,
        )
        if perturbed.name != "none" and run.zero_stage == 3 and not self._bare.keeps_parameters:
            refuse_sharded(self.module)
        self.compression = attach_compression(engine, run, ranks)
        self._log = StepLog(
            engine,
            ranks,
            compression=self.compression,
            optimizer=averaging_optimizer,
            count_gradients=self.inner.input_gradient,
        )
        self.traffic = self._log.traffic
        self.ema: WeightEma | None = None
        if dat.ema.decay > 0:
            self.ema = WeightEma(hooks.trained_weights(engine), dat.ema.decay)

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
    def is_mid_step(self) -> bool:
        """Whether gradients are held that the optimizer has not applied, or weights perturbed."""
        return self.micro_step > 0 or self._has_gradients or self._weights.are_moved

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
    def overflows(self) -> bool:
        """Whether the model computes in float16, where overflow is part of the loss scaling."""
        return self._bare.overflows

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

        Raises:
            ConfigError: Where several micro-batches are to be attacked as one.
        """
        if self._group_size > 1:
            raise ConfigError(
                f"dat.engine.attack_micro_batches={self._group_size} attacks several micro-batches "
                "of a step as one, so they have to be known together: call "
                "engine.train_step([(x, y), ...]), or write dat.engine.attack_micro_batches=1."
            )
        if plan is None and self.loader is not None:
            plan = self.loader.plan
        ((part, found),) = self._maximise([(x, y, plan)])
        return self._outer_loss(part, found)

    def train_step(self, batches: Sequence[Batch | PlannedBatch]) -> Tensor:
        """One optimizer step: attack, forward, backward and step for each micro-batch.

        Args:
            batches: The step's micro-batches ``(x, y)`` or ``(x, y, plan)``, as of
                :meth:`__call__`; :attr:`accumulation` of them. Without a plan they are taken to be
                those that the loader handed out last.

        Returns:
            This rank's mean loss over them, a detached scalar on the device.

        Raises:
            DataError: For another number of micro-batches, or in the middle of a step.
        """
        if len(batches) != self.accumulation or self.micro_step:
            raise DataError(
                f"train_step got {len(batches)} micro-batches after {self.micro_step} micro-steps: "
                f"it takes the gradient_accumulation_steps={self.accumulation} of a whole step."
            )
        planned = [(b[0], b[1], b[2] if len(b) > 2 else None) for b in batches]
        plans = () if self.loader is None else self.loader.plans
        if len(plans) == len(planned):
            planned = [
                (x, y, known if plan is None else plan)
                for (x, y, plan), known in zip(planned, plans, strict=True)
            ]
        losses = []
        for first in range(0, len(planned), self._group_size):
            for part, found in self._maximise(planned[first : first + self._group_size]):
                loss = self._outer_loss(part, found)
                losses.append(loss.detach())
                self.backward(loss)
                self.step()
        return torch.stack(losses).mean()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's backward; reduces gradients when the last micro-step of a step is reached.

        Raises:
            ConfigError: For a loss that was computed without gradients.
        """
        if not loss.requires_grad:
            raise ConfigError(
                "The loss has no gradient: engine(x, y) was called under torch.no_grad or "
                "torch.inference_mode, or the loss was detached. Train outside of it."
            )
        if self.averaging_optimizer is not None:
            hooks.reduce_in_backward(
                self.deepspeed, self.averaging_optimizer.needs_averaged_gradients
            )
        if self.compression is not None:
            self.compression.start(self.global_steps * self.accumulation + self.micro_step)
        scale = hooks.missing_loss_scale(self.deepspeed)
        try:
            with self._log.phase("backward"):
                self.deepspeed.backward(loss if scale == 1 else loss.float() * scale)
        finally:
            self._weights.restore()
        if self.compression is not None and self.micro_step == self.accumulation - 1:
            self.compression.check_done()
        self.inner.after_backward(self._log.pending.gradient)
        self._has_gradients = True

    def step(self) -> None:
        """DeepSpeed's step: an optimizer step after the last micro-step, else bookkeeping.

        After an optimizer step :attr:`ema` is moved on too.
        """
        completes = self.micro_step == self.accumulation - 1
        if completes and not self.overflows and not hooks.leaves_out_non_finite(self.deepspeed):
            self.finite.see_gradient(self.global_steps + 1, hooks.gradient_norm(self.deepspeed))
        with self._log.phase("step"), hooks.named_loss_scale_error():
            self.deepspeed.step()
        self._log.pending.timer.leave()
        self._has_gradients = False
        if completes:
            self._log.complete()
            self._data_position = None if self.loader is None else self.loader.state_dict()
            if self.ema is not None:
                self.ema.update()
            if self.monitor.is_due(self.global_steps, self._total_steps):
                metrics = {**self.reduced_metrics(), "lr": self.deepspeed.get_lr()[0]}
                self.monitor.write(self.global_steps, {f"train/{k}": v for k, v in metrics.items()})

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
            y: Targets of the inner loss, on the engine's device.
            first_index: Index of the first image within the step's global batch.
            indices: Those of all images, where they do not follow one another.
            gradient: Counts of the attack's gradients go here.

        Returns:
            Float32 images of the shape of ``x`` (several after one another for an attack with
            several views); ``x`` itself where the run has no attack.
        """
        moment = self._moment(self.micro_step, first_index, indices)
        x = as_images(x)
        y = self._reader.check(x, y, moment)
        batch = MicroBatch(x=x, y=y, moment=moment, num_images=len(x))
        gradient = self.inner.input_gradient() if gradient is None else gradient
        with self._log.attack():
            return self.inner.images(batch, gradient).images.detach()

    def frozen(
        self, model_mode: ModelMode = "eval"
    ) -> contextlib.AbstractContextManager[Callable[[Tensor], Tensor]]:
        """The model as an attack or an evaluation may use it: pixels in, logits out, no trace left.

        Parameters are frozen, modules are in ``model_mode``, the engine's autocast applies, and
        ZeRO-3 parameters stay gathered where the memory budget allows it. Every rank must call
        the model the same number of times.
        """
        return self._bare.opened(model_mode)

    @property
    def attack_in_use(self) -> Attack | None:
        """The training attack at this point of the run; None for natural training."""
        return self.inner.attack_at(self.progress)

    @property
    def attack_precision(self) -> str | None:
        """That of the attack's passes; None for the engine's; ``auto`` until the first attack."""
        return self.inner.precision

    def use_attack(self, attack: Attack | None) -> None:
        """Train with another attack from the next micro-step on; None trains naturally.

        Raises:
            ConfigError: If the run cannot go along with it.
        """
        if attack is not None:
            problems = attack_problems(attack, self._objective, self.run, self.accumulation)
            if problems:
                raise ConfigError("\n".join(problems))
        self.inner.use(attack)

    def micro_batch(
        self, x: Tensor, y: Tensor, plan: BatchPlan | None = None, *, ahead: int = 0
    ) -> MicroBatch:
        """The micro-batch that is attacked and trained on in the place of a batch, on the device.

        Args:
            x: This rank's images ``(B, C, H, W)``, as for :meth:`__call__`.
            y: Their labels, as for :meth:`__call__`.
            plan: As for :meth:`__call__`, but without a default.
            ahead: In how many micro-steps its turn is.
        """
        x = as_pictures(x)
        slot, first_image = self.micro_step + ahead, None
        weight, samples = 1.0, None
        if plan is not None and len(plan.indices) == len(x):
            first_image, weight, samples = plan.first_position, plan.weight, plan.indices
        if first_image is None:
            first_image = (slot * self.ranks.count + self.ranks.rank) * len(x)
        moment = self._moment(slot, first_image)
        return self._reader.read(x, y, moment, weight=weight, samples=samples)

    # ---- checkpoints

    def save_checkpoint(
        self,
        folder: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write all that training needs to go on exactly; a collective, as DeepSpeed's.

        That is DeepSpeed's checkpoint, and what it does not know of: what the attack carries along,
        the errors of compression and of 1-bit optimizers, the average of the weights, BatchNorm's
        statistics of every rank, the position of the loader, the precision that ``auto`` chose, and
        the states of the global random generators. The position is that after the last optimizer
        step, also where a further batch was handed out since.

        Args:
            folder: The same on all ranks; it may hold other checkpoints, which are kept.
            tag: Name of the checkpoint; an earlier one of that name is replaced. None for ``step-``
                and the number of steps.
            client_state: What this rank wants back: numbers, texts, tensors, and lists, tuples and
                dicts of them.

        Returns:
            Folder of the checkpoint.

        Raises:
            CheckpointError: In the middle of an optimizer step, for a tag or client state that
                cannot be written, or if there is no room; earlier checkpoints are intact.
            NumericsError: If weights are not finite.
        """
        checkpoints = Checkpoints(Path(folder), keep=None)
        return checkpoints.save(self, {}, tag=tag, client_state=client_state)

    def load_checkpoint(
        self, folder: str | Path, tag: str | None = None, *, changed: Collection[str] = ()
    ) -> tuple[Path, dict[str, Any]]:
        """Go on from a checkpoint, of :meth:`save_checkpoint` or of a run; a collective.

        Ranks, ZeRO stage and accumulation may differ from the checkpoint's; the global batch may
        not.

        Args:
            folder: Folder of the checkpoints.
            tag: Name of the checkpoint; None for the one written last.
            changed: Keys or sections of the config that differ from the checkpoint's on purpose.

        Returns:
            Folder of the checkpoint, and this rank's client state (of another rank, where there
            were fewer).

        Raises:
            CheckpointError: If there is no such checkpoint, or it is incomplete or belongs to
                another config or other data, with all differences; the engine is then as before.
        """
        checkpoints = Checkpoints(Path(folder), keep=None)
        with self.ranks.together():
            checkpoint = checkpoints.named(tag)
        _, client_state = checkpoints.load(checkpoint, self, changed=changed)
        return checkpoint, client_state

    @property
    def data_position(self) -> dict[str, int] | None:
        """The loader's position after the last optimizer step; None without a loader."""
        return self._data_position

    @functools.cached_property
    def identity(self) -> Identity:
        """What a checkpoint of this run is known by."""
        data = None
        if self.ranks.is_main and isinstance(self.loader, DistributedLoader):
            with preserved_random_state(self.ranks.device):
                data = fingerprint(self.loader.dataset)
        return Identity(self.run, self.ranks.count, self.deepspeed.train_batch_size(), data)

    def move_loader(
        self, step: int, position: Mapping[str, int] | None, *, restarts: bool = False
    ) -> None:
        """Let the loader go on where a checkpoint says.

        Args:
            step: Optimizer steps done.
            position: The loader's; None where there was no loader; empty where it is not known.
            restarts: Whether a new epoch begins, since a position in other data means nothing.

        Raises:
            CheckpointError: If it is the position in other data.
        """
        if self.loader is None or position is None:
            return
        if restarts and position:
            self.loader.set_position(position["epoch"] + (position["step"] > 0), 0)
        elif position:
            self.loader.load_state_dict(position)
        elif self.loader.steps_per_epoch is not None:
            self.loader.set_position(*divmod(step, self.loader.steps_per_epoch))
        self._data_position = self.loader.state_dict()

    # ---- evaluation

    def evaluate(
        self,
        data: Dataset[Any],
        attacks: Sequence[str] | str | None = None,
        *,
        num_examples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Record:
        """Attack the model in training and count what it withstands; a collective.

        It is evaluated as it would be exported: in eval mode, with its average (:attr:`ema`) in the
        place of its weights, and BatchNorm's statistics averaged over ranks. Training goes on as if
        it had not been.

        Args:
            data: Map-style dataset, of samples as ``training_data`` of :func:`dat_ds.initialize`.
            attacks: Names, as ``dat.evaluation.attacks``, which they default to.
            num_examples: First images of ``data``. Default: ``dat.evaluation.num_examples``.
            batch_size: Images per forward and rank. Default: ``dat.evaluation.batch_size``.
            seed: Of random starts. Default: ``dat.seed``.

        Returns:
            The same record on every rank.

        Raises:
            ConfigError: For an attack that is none, or that does not go along with the objective.
            DataError: For data that cannot be read, on every rank, or between a forward with
                perturbed weights and its backward.
        """
        if isinstance(attacks, str):
            attacks = [attacks]
        if attacks is not None:
            problems = evaluation_problems(attacks, self._objective, self.run)
            if problems:
                raise ConfigError("\n".join(problems))
        if self._weights.are_moved:
            raise DataError(
                "The weights are perturbed (dat.weight_perturbation) until the backward: call "
                "engine.backward(loss) before engine.evaluate."
            )
        with (
            preserved_random_state(self.ranks.device),
            exported_weights(self),
            self.frozen() as model,
        ):
            return evaluate_model(
                model,
                data,
                self.run,
                self.ranks,
                self.task,
                attacks=attacks,
                num_examples=num_examples,
                batch_size=batch_size,
                seed=seed,
            )

    @property
    def task(self) -> Task | None:
        """Evaluation task of the model in training; None where it classifies images."""
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
        part = self._reader.read(x, y, self._moment(0, self.ranks.rank * len(x)))
        generator, gradient = part.moment.generator("start"), self.inner.input_gradient()
        with self.frozen() as model, already_checked():
            x_adv = attack(model, part.x, part.y, generator, gradient=gradient)
            with torch.no_grad():
                correct_here, _ = num_correct(model(x_adv), part.y)
        num_images = part.num_images
        counts = torch.tensor([float(correct_here) if num_images else 0.0, float(num_images)])
        correct, total = self.ranks.sum(counts.double()).tolist()
        return float(correct / total) if total else 0.0

    def measure_natural_accuracy(self, x: Tensor, y: Tensor) -> None:
        """Add natural accuracy on ``x`` to the last step's metrics: one forward in eval mode.

        Does nothing where the objective computed natural logits anyway, or has none of classes.
        """
        # Decided alike on every rank: one that had no image has no natural logits either.
        has_natural = self._objective.needs_natural_logits or self.inner.is_natural
        if self._log.last is None or has_natural or not self._objective.classifies:
            return
        part = self._reader.read(x, y, self._moment(0, 0))
        with self.frozen() as model, torch.no_grad():
            logits = model(part.x)
        if part.num_images:
            self._log.last.add_natural(*num_correct(logits, part.y, part.labelled))

    # ---- metrics

    @property
    def metrics(self) -> dict[str, Any]:
        """The last optimizer step on this rank, waiting for the device; empty before the first.

        The objective's terms (``loss`` and others), accuracies as fractions, ``seconds_attack`` and
        ``seconds_update``, ``bytes_sent`` by kind, ``attack_zero_share`` (of gradient entries),
        ``attack_nonfinite_share`` (of samples), the number of all-gathers of parameters, and
        ``skipped_steps``: how many steps were dropped so far for non-finite gradients.

        Raises:
            DataError: If a batch of this rank held a faulty image or label.
        """
        self.watch.check_here()
        return self._log.local()

    @property
    def collectives(self) -> dict[str, int]:
        """Collectives of the last optimizer step on this rank, by kind of traffic."""
        last = self._log.last
        return {} if last is None else dict(last.collectives)

    def reduced_metrics(self) -> dict[str, Any]:
        """:attr:`metrics` over all ranks, a collective; seconds and bytes stay this rank's.

        Raises:
            DataError: On every rank, if a batch of one held a faulty image or label.
        """
        self.watch.check()
        return self._log.reduced()

    def close(self) -> None:
        """Let go of monitors, the process group, DeepSpeed's hooks on the module, and ours."""
        try:
            self.watch.check_here()
        except DataError as error:  # nobody asked for the metrics
            logger.error("%s", error)
        self.monitor.close(self.global_steps)
        self._log.close()
        self._bare.close()
        self.deepspeed.destroy()

    # ---- internals

    @property
    def _group_size(self) -> int:
        """Micro-batches that are attacked as one."""
        return 1 if self.inner.is_natural else self.run.dat.engine.attack_micro_batches

    def _moment(self, slot: int, first_image: int, indices: Sequence[int] | None = None) -> Moment:
        return Moment(
            seed=self.run.dat.seed,
            step=self.global_steps,
            progress=self.progress,
            slot=slot,
            first_image=first_image,
            indices=indices,
        )

    def _maximise(
        self, batches: Sequence[tuple[Tensor, Tensor, BatchPlan | None]]
    ) -> list[tuple[MicroBatch, Adversarial]]:
        """The next micro-batches, attacked as one, with their adversarial images."""
        self._weights.restore()  # where an earlier loss never went backward
        PROGRESS.enter("attack", self.global_steps)
        self._log.pending.timer.enter("attack")
        group = [self.micro_batch(*batch, ahead=i) for i, batch in enumerate(batches)]
        with self._log.attack():
            return self.inner.maximise(group, self._log.pending.gradient)

    def _outer_loss(self, part: MicroBatch, found: Adversarial) -> Tensor:
        """The outer loss of a micro-batch, with gradient."""
        metrics = self._log.pending
        metrics.timer.enter("attack")
        probes = self.inner.probes(part)
        self.inner.await_backward(part, found)
        metrics.timer.enter("update")
        PROGRESS.enter("update")
        # The black image that an empty batch is filled with must not enter BatchNorm's statistics.
        is_empty = part.num_images == 0
        keep = preserved_buffers(self.module) if is_empty else contextlib.nullcontext()
        self._perturb_weights(part, found, probes)
        forward = functools.partial(self._bare.forward, self.deepspeed, training=True)
        with self._log.phase("forward"), keep, self._weights.restored_on_error():
            outer = self._outer(forward, part, found, probes)
        self.finite.see_loss(outer, part)
        metrics.add(
            outer,
            part,
            factor=part.weight / self.accumulation,
            classifies=self._objective.classifies,
            natural=self.inner.is_natural,
        )
        loss = outer.terms["loss"]
        return loss if part.weight == 1.0 else loss * part.weight

    def _perturb_weights(
        self, part: MicroBatch, found: Adversarial, probes: AlignmentProbes | None
    ) -> None:
        """Move the weights up the outer loss, until the end of :meth:`backward`."""
        if not self._weights.applies(self.progress):
            return

        def outer_loss() -> Tensor:
            forward = functools.partial(self._bare.forward, self.module, training=True)
            return self._outer(forward, part, found, probes).terms["loss"] * part.weight

        with self._log.phase("backward"), self._bare.autocast():
            self._weights.apply(outer_loss, hooks.loss_scale(self.deepspeed))

    def _original_outputs(self, x: Tensor) -> Tensor:
        """Outputs of the model as it was at the start."""
        assert self.reference is not None
        return self._bare.outputs_of(self.reference, x)

    @contextlib.contextmanager
    def _opened_to_attack(self, model_mode: ModelMode) -> Iterator[Model]:
        with (
            self._log.phase("forward"),
            self._bare.opened(model_mode, self._bare.compiled) as model,
        ):
            yield model
