"""The training loop: steps, logging, validation, checkpoints, and stopping cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Collection, Generator, Iterator, Sized
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dat_ds.assembly import build_schedule
from dat_ds.checkpoints import CHECKPOINTS
from dat_ds.data import DistributedLoader, PlannedBatch
from dat_ds.data.damaged import DAMAGED, too_many_damaged, write_damaged
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.checkpoint import Checkpoints
from dat_ds.errors import CheckpointError, DataError, ModelError, NumericsError
from dat_ds.evaluation import Record
from dat_ds.files import append_row, keep_rows_until, sync_rows
from dat_ds.minmax import FaultyBatchError
from dat_ds.progress import PROGRESS
from dat_ds.training.guard import Guard, GuardReading, stronger_attack
from dat_ds.training.numerics import NumericsWatch
from dat_ds.training.overfitting import falls_in_a_row
from dat_ds.training.stopping import StopSignal

logger = logging.getLogger("dat_ds")

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_GO_ON, _DAMAGED, _SAVE, _STOP, _BAD_DATA = range(5)  # ranks follow the largest


class Trainer:
    """Trains an :class:`AdversarialEngine` to the end of its schedule.

    Args:
        engine: Engine to train.
        loader: Its loader.
        validation: Held-out images that choose the best model; may be empty.
        output: Folder of the run.
        stop: Asked between two steps whether to stop.
    """

    def __init__(
        self,
        engine: AdversarialEngine,
        loader: DistributedLoader,
        validation: Dataset[Any],
        output: Path,
        stop: StopSignal | None = None,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.validation = validation
        self.output = output
        engine.watch.folder = output
        self.run = engine.run
        self.ranks = engine.ranks
        self.checkpoints = Checkpoints(output / CHECKPOINTS, self.run.dat.checkpoint.keep)
        schedule = build_schedule(self.run.dat, loader.steps_per_epoch)
        assert schedule is not None
        self.total_steps = schedule.total_steps
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.checkpoint_seconds = 0.0  # that training waited for, since this process began
        guard = self.run.dat.guard
        self._guard: Guard | None = None
        if guard.action != "none" and self.run.dat.attack.name != "none":
            self._guard = Guard(
                engine,
                probe_steps=guard.probe_steps,
                num_images=guard.num_images,
                largest_gap=guard.largest_gap,
            )
        self.is_strengthened = False
        self.events: list[dict[str, Any]] = []
        self.damaged: dict[str, str] = {}  # training images that others stand for, of all ranks
        self._reading: GuardReading | None = None
        self._stop = StopSignal() if stop is None else stop
        self._shown: dict[str, str] = {}
        self._new_damaged: dict[str, str] = {}
        self._checkpointed_at = -1
        self._changed: Collection[str] = ()
        self._numerics = NumericsWatch(
            engine, loader, self.checkpoints, output, self.total_steps, self._tell
        )
        self._monitor = engine.monitor
        self._monitor.take_over(output)

    def resume(
        self, checkpoint: Path, *, verified: bool = False, changed: Collection[str] = ()
    ) -> None:
        """Continue exactly where ``checkpoint`` was written; a collective.

        Args:
            checkpoint: Its folder.
            verified: Whether its files have been compared with its manifest already.
            changed: Keys or sections of the config that differ from the checkpoint's on purpose.
        """
        state, _ = self.checkpoints.load(
            checkpoint, self.engine, verified=verified, changed=changed
        )
        if "history" not in state:
            raise CheckpointError(
                f"Checkpoint {checkpoint} was written by engine.save_checkpoint in a loop of its "
                "own: continue it there, with engine.load_checkpoint."
            )
        self.best, self.history = state["best"], state["history"]
        self.seconds_before = state["seconds"]
        self.events = state["events"]
        self.damaged = state.get("damaged", {})
        if state["strengthened"]:
            self._strengthen()
        self._checkpointed_at = self.engine.global_steps
        self._changed = changed
        self._numerics.restart()

    def fit(self) -> bool:
        """Train to the end, or until asked to stop.

        Returns:
            Whether training is complete: at the end of the schedule, or where robust overfitting
            ended it; if not, a checkpoint holds the state.

        Raises:
            NumericsError: On numbers with which the run cannot go on; checkpoints hold finite
                weights only.
            DataError: On unreadable data, after a checkpoint was written.
            CheckpointError: On a file that cannot be written.
        """
        self._start = time.perf_counter()
        self._steps = self._stream()
        self._drop_later_rows()
        self._write_damaged()
        # Closing the stream, which a roll-back replaces, ends the loader's workers.
        with self._progress() as bar, contextlib.ExitStack() as stack:
            stack.callback(lambda: self._steps.close())
            stack.enter_context(self._kept_faulty_images())
            while self.engine.global_steps < self.total_steps and not self._is_stopped_early:
                batches, error = self._fetch_step()
                status = self.ranks.max(_BAD_DATA if error is not None else self._asked())
                if status != _GO_ON and (excess := self._gather_damaged()) is not None:
                    status, error = _BAD_DATA, error or excess
                if status > _DAMAGED:
                    self._stop.saves = False
                    self.save_checkpoint()
                if status > _SAVE:
                    self.checkpoints.finish(self.ranks)
                    with self.ranks.together():
                        if error is not None:
                            raise error
                    reasons = self.ranks.gather(self._stop.reason)
                    self._stop.reason = next(str(reason) for reason in reasons if reason)
                    return False
                with self._numerics.step(batches):
                    self.engine.train_step(batches)
                bar.update()
                self._after_step(batches, bar)
                self.checkpoints.finish_if_written(self.ranks)
        self.checkpoints.finish(self.ranks)
        return True

    def _asked(self) -> int:
        """What this rank's signals ask for."""
        if self._stop.reason is not None:
            return _STOP
        self._new_damaged |= self.loader.take_damaged()
        return _SAVE if self._stop.saves else _DAMAGED if self._new_damaged else _GO_ON

    # ---- damaged images

    def _gather_damaged(self) -> DataError | None:
        """List what any rank has met since the last call; a collective.

        Returns:
            The same error on every rank, where there are more than the config allows.
        """
        self._new_damaged |= self.loader.take_damaged()
        shards = cast("list[dict[str, str]]", self.ranks.gather(self._new_damaged))
        met = {image: words for shard in shards for image, words in shard.items()}
        self._new_damaged = {}
        if not met:
            return None
        is_first = not self.damaged
        self.damaged |= met
        self._write_damaged()
        if self.ranks.is_main and is_first:
            logger.warning(
                "Another image stands for a damaged one: %s Damaged images are listed in %s.",
                next(iter(met.values())),
                self.output / DAMAGED,
            )
        return too_many_damaged(
            self.damaged,
            len(cast(Sized, self.loader.dataset)),
            self.run.dat.data.most_damaged,
            self.output / DAMAGED,
        )

    def _write_damaged(self) -> None:
        """Write the list of damaged images, as far as this run knows them; a collective."""
        path = self.output / DAMAGED
        with self.ranks.together():
            if self.ranks.is_main and (self.damaged or path.exists()):
                write_damaged(path, self.damaged)

    def _drop_later_rows(self) -> None:
        """Cut the metrics of steps after the present one, which are about to be repeated."""
        with self.ranks.together():
            if self.ranks.is_main:
                keep_rows_until(self.output / METRICS, self.engine.global_steps)

    # ---- one step

    def _fetch_step(self) -> tuple[list[PlannedBatch], DataError | None]:
        """The micro-batches of one optimizer step, or the error that reading them met.

        They are read before the step begins, so that all ranks can still stop together.
        """
        PROGRESS.enter("data", self.engine.global_steps)
        try:
            return next(self._steps), None
        except DataError as error:
            return [], error
        finally:
            PROGRESS.enter("step")

    def _stream(self) -> Generator[list[PlannedBatch], None, None]:
        while True:
            yield from self.loader.steps()

    def _after_step(self, batches: list[PlannedBatch], bar: tqdm[Any]) -> None:
        step, dat = self.engine.global_steps, self.run.dat
        is_last = step == self.total_steps
        every = dat.checkpoint.every_steps
        saves = step % every == 0 if every else self._is_due(step, dat.checkpoint.every_epochs)
        # Looked at before every checkpoint too, so that checkpoints hold good weights.
        looks = step % dat.guard.every_steps == 0 or saves or is_last
        if self._guard is not None and looks and self._overfits(batches, bar):
            return
        if step % dat.logging.every_steps == 0 or is_last:
            self._log_step(batches[-1], bar)
        if self._is_due(step, dat.evaluation.validation_every_epochs) or is_last:
            try:
                with PROGRESS.within("validation"):
                    self._validate()
            except (DataError, ModelError):  # a checkpoint refuses damaged weights by name
                self.save_checkpoint()
                self.checkpoints.finish(self.ranks)
                raise
        if saves or is_last or self._is_stopped_early:
            self.save_checkpoint()

    # ---- guard

    def _overfits(self, batches: list[PlannedBatch], bar: tqdm[Any]) -> bool:
        """Look for catastrophic overfitting and act on it.

        Returns:
            Whether the step just done was undone.

        Raises:
            NumericsError: Where the guard is to stop the run.
        """
        assert self._guard is not None
        x, y, _ = batches[-1]
        with PROGRESS.within("guard"):
            self._reading = self._guard.look(x, y)
        if not self._reading.fired:
            return False
        self.checkpoints.finish(self.ranks)
        step, guard = self.engine.global_steps, self.run.dat.guard
        words = (
            f"Catastrophic overfitting in step {step}: accuracy is "
            f"{self._reading.attack_acc:.0%} under the training attack, but "
            f"{self._reading.probe_acc:.0%} under PGD-{guard.probe_steps}."
        )
        if guard.action == "stop":
            self._log_step(batches[-1], bar)
            raise NumericsError(
                f"{words} Training stopped (dat.guard.action='stop'). "
                f"{self.checkpoints.latest_in_words()} To go on, start a run with "
                "dat.guard.action='rollback' or a multi-step attack."
            )
        latest = self.checkpoints.latest()
        returns_to = latest if guard.action == "rollback" else None
        event = {"step": step, "event": "catastrophic_overfitting"}
        event |= dataclasses.asdict(self._reading)
        event |= {"returned_to": None if returns_to is None else returns_to.name}
        events = [*self.events, event]
        self._append_event(event)
        if self.ranks.is_main:
            place = "from here" if returns_to is None else f"from {returns_to}"
            logger.warning("%s Going on %s with PGD-%d.", words, place, guard.stronger_steps)
        if returns_to is not None:
            self._return_to(returns_to, bar)
        self.events = events
        self._strengthen()
        return returns_to is not None

    def _strengthen(self) -> None:
        """Train with more attack steps from now on, which the guard need not watch."""
        self.engine.use_attack(stronger_attack(self.engine))
        self.is_strengthened = True
        self._numerics.stronger_steps = self.run.dat.guard.stronger_steps
        self._guard = None

    def _return_to(self, checkpoint: Path, bar: tqdm[Any]) -> None:
        seconds = self.seconds()
        self._steps.close()
        self.resume(checkpoint, changed=self._changed)
        self._drop_later_rows()
        # The time since the checkpoint was spent all the same.
        self.seconds_before, self._start = seconds, time.perf_counter()
        self._steps = self._stream()
        bar.n = self.engine.global_steps
        bar.refresh()

    def _is_due(self, step: int, every_epochs: float) -> bool:
        """Whether ``step`` completes another ``every_epochs`` epochs."""
        per_step = 1 / (self.loader.steps_per_epoch * every_epochs)
        # The tiny shift keeps whole multiples from being missed by rounding.
        return math.floor(step * per_step + 1e-9) > math.floor((step - 1) * per_step + 1e-9)

    # ---- logging

    def _log_step(self, batch: PlannedBatch, bar: tqdm[Any]) -> None:
        self._numerics.look()
        self.engine.measure_natural_accuracy(batch[0], batch[1])
        metrics = self.engine.reduced_metrics()
        step = self.engine.global_steps
        seconds = metrics["seconds_attack"] + metrics["seconds_update"]
        images = self._images_in_step(step)
        row = {
            "step": step,
            "epoch": step / self.loader.steps_per_epoch,
            **metrics,
            "lr": self.engine.deepspeed.get_lr()[0],
            **self._guard_columns(),
            "images_per_second": images / seconds if seconds else None,
        }
        with self.ranks.together():
            if self.ranks.is_main:
                append_row(self.output / METRICS, row)
        self._monitor.write(step, {f"train/{k}": v for k, v in row.items()})
        self._shown = {
            "loss": f"{metrics['loss']:.3f}",
            "natural": _percent(metrics["natural_acc"]),
            "robust": _percent(metrics["robust_acc"]),
            "img/s": f"{images / seconds:.0f}" if seconds else "-",
            "attack": _percent(metrics["seconds_attack"] / seconds if seconds else None),
            "update": _percent(metrics["seconds_update"] / seconds if seconds else None),
        }
        bar.set_postfix(self._shown)

    def _guard_columns(self) -> dict[str, Any]:
        """The guard's reading since the last row, for ``metrics.jsonl``, if there was one."""
        if self._reading is None:
            return {}
        reading, self._reading = dataclasses.asdict(self._reading), None
        return {f"guard_{name}": value for name, value in reading.items()}

    def _images_in_step(self, step: int) -> int:
        """Images of the global batch that optimizer step ``step``, counted from 1, trained on."""
        return self.loader.sampler.batch_of_step((step - 1) % self.loader.steps_per_epoch)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[tqdm[Any]]:
        shows = self.ranks.is_main and self.run.dat.logging.progress and os.isatty(2)
        with (
            tqdm(
                total=self.total_steps,
                initial=self.engine.global_steps,
                unit="step",
                desc="natural" if self.run.dat.attack.name == "none" else "robust",
                disable=not shows,
                dynamic_ncols=True,
            ) as bar,
            logging_redirect_tqdm([logger]) if shows else contextlib.nullcontext(),
        ):
            yield bar

    # ---- validation

    def _validate(self) -> None:
        size = len(cast(Sized, self.validation))
        if size == 0:
            return
        self._numerics.look()
        self._numerics.compare_ranks()
        trains_naturally = self.run.dat.attack.name == "none"
        attacks = [] if trains_naturally else [self.run.dat.evaluation.validation_attack]
        step = self.engine.global_steps
        num_examples = self.run.dat.evaluation.validation_examples
        record = self.engine.evaluate(
            self.validation,
            attacks,
            num_examples=size if num_examples is None else num_examples,
        )
        epoch = step / self.loader.steps_per_epoch
        row = {"step": step, "epoch": epoch, **record.means()}
        self.history.append(row)
        value, is_loss = _value_of(record, attacks[0] if attacks else None)
        sign = -1 if is_loss else 1
        if self.best is None or sign * value >= sign * self.best["value"]:
            self.best = {"value": value, **row}
            self.checkpoints.save_best(self.engine)
        natural = {"natural_acc": record.natural_acc, "natural_loss": record.natural_loss}
        named = {**natural, **record.robust_acc, **record.robust_loss}
        self._monitor.write(step, {f"validation/{k}": v for k, v in named.items()})
        if self.ranks.is_main:
            self._say_validation(record, attacks)
        if attacks and record.natural_acc is not None:
            self._watch_overfitting(attacks[0])

    def _watch_overfitting(self, attack: str) -> None:
        """Tell where robust accuracy has fallen for a while, and end training if so configured."""
        config = self.run.dat.overfitting
        falls = falls_in_a_row(self.history, attack, config.margin)
        if config.action == "none" or falls != config.patience:
            return
        assert self.best is not None
        best, now = self.best["robust_acc"][attack], self.history[-1]["robust_acc"][attack]
        words = (
            f"Robust overfitting: accuracy on the validation images under {attack} fell from "
            f"{best:.1%} after step {self.best['step']} to {now:.1%}, and was lower by more than "
            f"chance in {falls} validation(s) in a row."
        )
        event = {
            "step": self.engine.global_steps,
            "event": "robust_overfitting",
            "attack": attack,
            "best_step": self.best["step"],
            "best_acc": best,
            "acc": now,
            "action": config.action,
        }
        ends = " Training ends here." if config.action == "stop" else ""
        self._tell(event, f"{words}{ends} The best model is kept.")

    @property
    def _is_stopped_early(self) -> bool:
        """Whether robust overfitting has ended training, in this session or an earlier one."""
        if self.run.dat.overfitting.action != "stop":
            return False
        return any(event["event"] == "robust_overfitting" for event in self.events)

    def _say_validation(self, record: Record, attacks: list[str]) -> None:
        epoch = self.engine.global_steps / self.loader.steps_per_epoch
        training = ", ".join(f"{k} {v}" for k, v in self._shown.items())
        logger.info(
            "epoch %4.1f of %.1f | validation %s | training %s",
            epoch,
            self.total_steps / self.loader.steps_per_epoch,
            ", ".join([_shown_value(record, None), *(_shown_value(record, a) for a in attacks)]),
            training,
        )

    # ---- checkpoints

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this moment, unless there is one already; a collective."""
        if self._checkpointed_at == self.engine.global_steps:
            return
        self._numerics.look()
        self._numerics.compare_ranks()
        state = {"best": self.best, "history": self.history, "seconds": self.seconds()}
        state |= {"strengthened": self.is_strengthened, "events": self.events}
        state |= {"damaged": self.damaged}
        started = time.perf_counter()
        with PROGRESS.within("checkpoint"):
            with self.ranks.together():
                if self.ranks.is_main:  # rows up to here are not written again
                    sync_rows(self.output / METRICS)
            try:
                self.checkpoints.save(
                    self.engine, state, in_background=self.run.dat.checkpoint.asynchronous
                )
            except NumericsError:
                self._numerics.tell_of_weights()
                raise
        self.checkpoint_seconds += time.perf_counter() - started
        self._checkpointed_at = self.engine.global_steps

    # ---- events

    def _tell(self, event: dict[str, Any], words: str) -> None:
        """Keep an event, in the run's state and in ``events.jsonl``, and log it; a collective."""
        self.events.append(event)
        self._append_event(event)
        if self.ranks.is_main:
            logger.warning("%s", words)

    def _append_event(self, event: dict[str, Any]) -> None:
        with self.ranks.together():
            if self.ranks.is_main:
                append_row(self.output / EVENTS, event)

    @contextlib.contextmanager
    def _kept_faulty_images(self) -> Iterator[None]:
        """Inside, a faulty image goes into ``events.jsonl`` from the rank that saw it."""
        try:
            yield
        except FaultyBatchError as error:
            if error.event is not None:
                append_row(self.output / EVENTS, error.event)
            raise

    def all_events(self) -> list[dict[str, Any]]:
        """Events of the guard, of faulty numbers, and of the optimizer's variance."""
        optimizer = self.engine.averaging_optimizer
        return [*self.events, *([] if optimizer is None else optimizer.events)]

    def seconds(self) -> float:
        """Wall-clock seconds of training, earlier sessions of the run included."""
        return self.seconds_before + time.perf_counter() - self._start


def _value_of(record: Record, attack: str | None) -> tuple[float, bool]:
    """The model's mean under an attack (None: under none), and whether it is a loss."""
    if record.natural_acc is not None:
        return record.natural_acc if attack is None else record.robust_acc[attack], False
    assert record.natural_loss is not None
    return record.natural_loss if attack is None else record.robust_loss[attack], True


def _shown_value(record: Record, attack: str | None) -> str:
    value, is_loss = _value_of(record, attack)
    return f"{attack or 'natural'} " + (f"loss {value:.4g}" if is_loss else f"{100 * value:.1f}%")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
