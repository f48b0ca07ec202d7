"""Numbers that are not finite, explode, or differ between ranks: found, told, and acted on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dat_ds.checkpoints import CheckpointFolder, name_of_step
from dat_ds.data import BatchPlan, DistributedLoader, PlannedBatch
from dat_ds.engine import hooks
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.random_state import random_state
from dat_ds.engine.replicas import replica_difference
from dat_ds.engine.reproducer import FAULTS, Reproducer, size_of, write_weights
from dat_ds.errors import CheckpointError, ConfigError, DataError, LossScaleError, NumericsError
from dat_ds.minmax import NonFinite
from dat_ds.optim import TrustRatioOptimizer

logger = logging.getLogger("dat_ds")

Tell = Callable[[dict[str, Any], str], None]
"""Keeps an event and says it in words."""
_MOST_EVENTS = 100
_MOST_RANKS = 4  # that write their batch
_NAMED = 8
_CAUSES = "Usual causes: a learning rate that is too high, or too short a warm-up."


class NumericsWatch:
    """Looks for faulty numbers where the host waits for the device anyway.

    Where DeepSpeed leaves out a step whose gradients are not finite, it knows so in that step, on
    all ranks: the step is then told at once, with its weights, which are as they were. Elsewhere
    (float32 and bfloat16 autocast at ZeRO-0, and the optimizers that average by themselves) what
    was not finite is remembered on the device, and told at the next log line, validation or
    checkpoint; weights have moved on by then.

    Args:
        engine: Engine in training.
        loader: Its loader.
        checkpoints: The run's.
        output: Folder of the run.
        total_steps: Its length.
        tell: Keeps an event; called on all ranks.

    Attributes:
        stronger_steps: Attack steps that the guard has changed to; 0 where it has not.

    Raises:
        ConfigError: If steps are to be left out where DeepSpeed does not do so.
    """

    def __init__(
        self,
        engine: AdversarialEngine,
        loader: DistributedLoader,
        checkpoints: CheckpointFolder,
        output: Path,
        total_steps: int,
        tell: Tell,
    ) -> None:
        self._engine = engine
        self._loader = loader
        self._checkpoints = checkpoints
        self._output = output
        self._total_steps = total_steps
        self._tell = tell
        self._config = engine.run.dat.numerics
        if self._config.nonfinite == "skip":
            _refuse_skipping(engine)
        self._skips = engine.overflows
        if self._config.nonfinite is not None:
            self._skips = self._config.nonfinite == "skip"
        optimizer = hooks.basic_optimizer(engine.deepspeed)
        self._trust = optimizer if isinstance(optimizer, TrustRatioOptimizer) else None
        self._told_ratios: dict[str, float] = {}
        self._told_replicas: set[str] = set()
        self._num_events = 0
        self._buffers: list[Tensor] | None = None
        self.stronger_steps = 0
        self.restart()

    def restart(self) -> None:
        """Begin anew at the step that the engine is at."""
        self._num_skipped = int(self._engine.deepspeed.skipped_steps)
        self._in_a_row = 0
        self._plans: dict[int, list[BatchPlan]] = {}
        self._batches: Sequence[PlannedBatch] = ()
        self._random: Mapping[str, Any] | None = None
        self._engine.finite.first()

    @contextlib.contextmanager
    def step(self, batches: Sequence[PlannedBatch]) -> Iterator[None]:
        """Inside, one optimizer step is done; a collective.

        Raises:
            NumericsError: Where the run is to end because of it.
        """
        step = self._engine.global_steps + 1
        self._batches = batches
        self._plans[step] = [plan for _, _, plan in batches if plan is not None]
        self._random = random_state(self._engine.ranks.device)
        self._keep_buffers()
        try:
            yield
        except LossScaleError:
            raise self._exhausted(step) from None
        skipped = int(self._engine.deepspeed.skipped_steps)
        was_left_out, self._num_skipped = skipped > self._num_skipped, skipped
        if was_left_out:
            self._act_on_skip(step)
        else:
            self._in_a_row = 0

    def look(self) -> None:
        """Tell of what the device remembers since the last look; a collective.

        Raises:
            NumericsError: Where the run is to end because of it.
            DataError: If the cause was a faulty image or label.
        """
        self._engine.watch.check()
        first, peaks = self._engine.finite.first(), self._large_ratios()
        gathered = self._engine.ranks.gather((first, peaks))
        found = cast("list[tuple[NonFinite | None, dict[str, float]]]", gathered)
        self._act_on_non_finite([item for item, _ in found], kept=False)
        self._plans.clear()
        self._act_on_ratios([ratios for _, ratios in found])

    def compare_ranks(self) -> None:
        """Tell where ranks hold different weights; a collective.

        Raises:
            NumericsError: Where the run is to end because of it.
        """
        if self._config.replicas == "none":
            return
        found = replica_difference(self._engine)
        if found is None or found.parameter in self._told_replicas:
            return
        self._told_replicas.add(found.parameter)
        step = self._engine.global_steps
        more = f" and {found.num_parameters - 1} more" if found.num_parameters > 1 else ""
        words = (
            f"Ranks hold different weights after step {step}: {found.parameter}{more}, on rank(s) "
            f"{_listed(found.ranks)}, by up to {found.largest:.3g}."
        )
        self._tell(
            {
                "step": step,
                "event": "ranks_differ",
                "parameter": found.parameter,
                "ranks": list(found.ranks),
                "largest": str(found.largest),
                "parameters": found.num_parameters,
                "action": self._config.replicas,
            },
            words,
        )
        if self._config.replicas == "stop":
            raise NumericsError(
                f"{words} Training stopped (dat.numerics.replicas='stop'). "
                f"{self._checkpoints.latest_in_words()} Usual causes: weights that are changed on "
                "one rank alone, a defective device, or devices of several kinds at ZeRO-0."
            )

    def tell_of_weights(self) -> None:
        """Tell that weights are not finite, as a checkpoint has found; a collective."""
        step = self._engine.global_steps
        fault = NonFinite("weight", step)
        event = self._event(step, "weight", dict.fromkeys(self._ranks(), fault))
        event["reproducer"] = self._keep_step(dict.fromkeys(self._ranks(), fault), kept=False)
        self._tell(event, f"Weights are not finite after step {step}.{_replay(event)}")

    # ---- numbers that are not finite

    def _act_on_skip(self, step: int) -> None:
        """Act on a step that DeepSpeed has just left out, on all ranks."""
        engine = self._engine
        engine.watch.check()
        found = cast("list[NonFinite | None]", engine.ranks.gather(engine.finite.first()))
        if not any(found) and not engine.overflows:
            found = [NonFinite("gradient", step)] * engine.ranks.count
        counts = not engine.overflows or hooks.loss_scale_is_smallest(engine.deepspeed)
        self._in_a_row = self._in_a_row + 1 if counts else 0
        self._act_on_non_finite(found, kept=True)
        if self._in_a_row < self._config.most_skipped:
            return
        if engine.overflows:
            raise self._exhausted(step)
        raise NumericsError(
            f"{self._in_a_row} steps in a row, up to step {step}, were left out because numbers "
            "were not finite (dat.numerics.most_skipped); training stopped. "
            f"{self._checkpoints.latest_in_words()} {_CAUSES}"
        )

    def _act_on_non_finite(self, found: Sequence[NonFinite | None], *, kept: bool) -> None:
        """Tell of the first step of all ranks, and act on it.

        Args:
            found: What each rank has found.
            kept: Whether the step just done was left out.
        """
        faults = {rank: item for rank, item in enumerate(found) if item is not None}
        if not faults:
            return
        step = min(item.step for item in faults.values())
        faults = {rank: item for rank, item in faults.items() if item.step == step}
        losses = {rank: item for rank, item in faults.items() if item.kind == "loss"}
        faults, kind = losses or faults, "loss" if losses else "gradient"
        kept = kept and step == self._engine.global_steps
        event = self._event(step, kind, faults)
        self._num_events += 1
        if self._num_events <= _MOST_EVENTS:
            event["reproducer"] = self._keep_step(faults, kept=kept)
        words = _words(kind, faults)
        if self._engine.ranks.max(not hooks.weights_are_finite(self._engine.deepspeed)):
            event["weights"] = "not finite"
            words += f" Weights are not finite{'' if kept else ' by now'}."
        if not self._skips:
            self._tell(event, words)
            raise NumericsError(
                f"{words} Training stopped (dat.numerics.nonfinite='stop'). "
                f"{self._checkpoints.latest_in_words()} {_CAUSES}{_replay(event)}"
            )
        if kept:
            self._restore_buffers()
        if self._num_events <= _MOST_EVENTS:
            self._tell(event, f"{words} The step is left out.{_replay(event)}")

    def _exhausted(self, step: int) -> LossScaleError:
        """The error of a loss scale that cannot shrink; a collective."""
        engine = self._engine
        found = cast("list[NonFinite | None]", engine.ranks.gather(engine.finite.first()))
        faults = {
            rank: NonFinite("gradient", step) if item is None else item
            for rank, item in enumerate(found)
        }
        scale = hooks.gradient_scale(engine.deepspeed)
        event = self._event(step, "gradient", faults)
        event |= {"event": "loss_scale_exhausted", "loss_scale": scale}
        event["reproducer"] = self._keep_step(faults, kept=True)
        words = (
            f"float16 gradients overflow in step {step}, at a loss scale of {scale:g} that cannot "
            "shrink any further (fp16.min_loss_scale, fp16.loss_scale)."
        )
        self._tell(event, words)
        return LossScaleError(
            f"{words} Training stopped. {self._checkpoints.latest_in_words()} "
            f"{hooks.LOSS_SCALE_ADVICE}{_replay(event)}"
        )

    def _event(self, step: int, kind: str, faults: Mapping[int, NonFinite]) -> dict[str, Any]:
        ranks = list(faults)[:_MOST_RANKS] if kind == "loss" else []
        return {
            "step": step,
            "event": "nonfinite",
            "kind": kind,
            "ranks": ranks,
            "samples": [list(faults[rank].samples) for rank in ranks],
            "loss": [str(faults[rank].loss) for rank in ranks],
            "action": "skip" if self._skips else "stop",
            "reproducer": None,
        }

    def _keep_step(self, faults: Mapping[int, NonFinite], *, kept: bool) -> str | None:
        """Write a step to the run's folder; a collective.

        Args:
            faults: What was found, by rank.
            kept: Whether weights are those at the start of the step.

        Returns:
            The first rank's file; None where enough are kept, or it cannot be written.
        """
        try:
            return self._kept_step(faults, kept=kept)
        except CheckpointError as error:  # on all ranks; what is to be told matters more
            if self._engine.ranks.is_main:
                logger.warning("The faulty step is not kept. %s", error)
            return None

    def _kept_step(self, faults: Mapping[int, NonFinite], *, kept: bool) -> str | None:
        engine, first = self._engine, next(iter(faults))
        fault = faults[first]
        folder = self._output / FAULTS / name_of_step(fault.step)
        others = [path for path in folder.parent.glob("*") if path != folder]
        if engine.ranks.max(len(others)) >= self._config.reproducers:
            return None
        if kept:
            write_weights(engine, folder, self._config.reproducer_gib)
        own = faults.get(engine.ranks.rank)
        writers = list(faults)[:_MOST_RANKS]
        with engine.ranks.together():
            if own is not None and engine.ranks.rank in writers:
                file = folder / f"rank-{engine.ranks.rank}.pt"
                self._reproducer(own, kept=kept).write(file)
        return str(folder / f"rank-{first}.pt")

    def _reproducer(self, fault: NonFinite, *, kept: bool) -> Reproducer:
        engine = self._engine
        is_last = fault.step in (engine.global_steps, engine.global_steps + 1)
        batches = self._batches if is_last else self._read_again(fault.step)
        if size_of(batches) > self._config.reproducer_gib * 2**30:
            batches = ()
        latest = self._checkpoints.latest()
        buffers = None
        if kept and self._buffers is not None:
            names = [name for name, _ in engine.module.named_buffers()]
            values = [buffer.to("cpu", copy=True) for buffer in self._buffers]
            buffers = dict(zip(names, values, strict=True))
        return Reproducer(
            kind=fault.kind,
            step=fault.step,
            rank=engine.ranks.rank,
            ranks=engine.ranks.count,
            value="" if fault.loss is None else str(fault.loss),
            samples=fault.samples,
            checkpoint=None if latest is None else latest.name,
            total_steps=self._total_steps,
            micro_batch=int(engine.deepspeed.train_micro_batch_size_per_gpu()),
            stronger_steps=self.stronger_steps,
            attack_precision=engine.attack_precision,
            loss_scale=hooks.gradient_scale(engine.deepspeed),
            carries=bool(engine.inner.strategy.state_dict()),
            config=engine.run.to_dict(),
            batches=batches,
            random_state=self._random if is_last else None,
            buffers=buffers,
        )

    def _read_again(self, step: int) -> list[PlannedBatch]:
        """The micro-batches of an earlier step; none where they cannot be read."""
        try:
            return [(*self._loader.read(plan), plan) for plan in self._plans.get(step, [])]
        except DataError:
            return []

    # ---- buffers

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        """Copy BatchNorm's statistics, which a forward of numbers that are not finite spoils."""
        buffers = list(self._engine.module.buffers())
        if self._buffers is None:
            self._buffers = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._buffers, buffers)

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        buffers = list(self._engine.module.buffers())
        if self._buffers and buffers:
            torch._foreach_copy_(buffers, self._buffers)

    # ---- trust ratios

    def _large_ratios(self) -> dict[str, float]:
        """This rank's layers whose trust ratio was too large since the last look."""
        if self._trust is None or self._config.trust_ratios == "none":
            return {}
        largest = self._config.largest_trust_ratio
        return {n: ratio for n, ratio in self._trust.take_peaks().items() if not ratio <= largest}

    def _act_on_ratios(self, by_rank: Sequence[Mapping[str, float]]) -> None:
        """Tell of layers whose ratio is new among the large ones, or twice what was told."""
        ratios = {name: ratio for ratios in by_rank for name, ratio in ratios.items()}
        told = self._told_ratios
        new = {
            name: ratio
            for name, ratio in ratios.items()
            if name not in told or ratio > 2 * told[name]
        }
        if not new:
            return
        told |= new
        step, action = self._engine.global_steps, self._config.trust_ratios
        named = [f"{name} {ratio:.3g}" for name, ratio in list(new.items())[:_NAMED]]
        more = f" and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
        words = (
            f"Trust ratios above dat.numerics.largest_trust_ratio="
            f"{self._config.largest_trust_ratio:g} up to step {step}: {', '.join(named)}{more}."
        )
        shown = {name: str(ratio) for name, ratio in list(new.items())[:_MOST_EVENTS]}
        self._tell({"step": step, "event": "trust_ratio", "layers": shown, "action": action}, words)
        if action == "stop":
            raise NumericsError(
                f"{words} Training stopped (dat.numerics.trust_ratios='stop'). "
                f"{self._checkpoints.latest_in_words()} A ratio explodes where the direction of a "
                "layer vanishes: look for a layer without gradients, or bound it with "
                "dat.optimizer.upper."
            )

    def _ranks(self) -> range:
        return range(self._engine.ranks.count)


def _refuse_skipping(engine: AdversarialEngine) -> None:
    """Refuse to leave out steps where DeepSpeed does not look at gradients.

    Raises:
        ConfigError: With what does.
    """
    leaves_out = hooks.leaves_out_non_finite(engine.deepspeed)
    if not leaves_out and engine.averaging_optimizer is None:
        raise ConfigError(
            "dat.numerics.nonfinite='skip': DeepSpeed does not look at gradients with "
            f"zero_optimization.stage={engine.run.zero_stage} here, so it leaves no step out. "
            "Write zero_optimization.stage=1, 2 or 3 (without compute_grad_norm=false and "
            "bf16.check_grad_overflow=false) or dat.numerics.nonfinite='stop'."
        )


def _words(kind: str, faults: Mapping[int, NonFinite]) -> str:
    """What was found, in a sentence."""
    first = next(iter(faults.values()))
    if kind == "gradient":
        return f"Gradients are not finite in step {first.step}, but all losses are."
    places = []
    for rank, item in list(faults.items())[:_MOST_RANKS]:
        samples = f" (samples {_listed(item.samples)})" if item.samples else ""
        places.append(f"rank {rank}{samples}")
    more = " and others" if len(faults) > _MOST_RANKS else ""
    return f"The loss is {first.loss} in step {first.step} on {', '.join(places)}{more}."


def _listed(numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > _NAMED else ""
    return ", ".join(map(str, numbers[:_NAMED])) + more


def _replay(event: Mapping[str, Any]) -> str:
    file = event["reproducer"]
    return "" if file is None else f" To repeat the step: dat-ds replay {file}"
