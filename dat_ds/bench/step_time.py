"""Time of an adversarial step against the sum of its parts, and against how others write it.

The parts of a K-step step are K stand-alone input-gradient passes and one training step (forward,
backward, clipping, optimizer), in hand-written PyTorch, under autocast where the run is; where
gradients are accumulated, passes and training go by micro-batch. The floor is ``(2 K + 3) F`` a
micro-batch, with ``F`` the time of one forward in evaluation mode without graph: forward ``F``,
input gradient ``F``, full backward ``2 F``. The others are torchattacks' PGD on a model under
DistributedDataParallel, and an attack that calls ``backward`` through it, which computes the
parameters' gradients in every pass and sums them over ranks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from dat_ds.attacks import NoAttack
from dat_ds.bench.records import write_record
from dat_ds.bench.timing import (
    check_alone,
    check_drift,
    check_repetitions,
    clock_drift,
    peak_bytes,
    time_in_turn,
)
from dat_ds.config import RunConfig, precision_of, resolve_batch
from dat_ds.errors import ConfigError

STEP, GRADIENTS, TRAINING, FORWARD, DATA = (
    "engine step",
    "input gradients",
    "training step",
    "forward",
    "data",
)
TORCHATTACKS, BACKWARD = "torchattacks + DDP", "backward through DDP"


def bench_attack(run: RunConfig, *, repetitions: int, output: str | None = None) -> str:
    """Time the engine's step, its parts and what others do in turn; a collective.

    Args:
        run: Run to time; its data gives the size of the images, which are random.
        repetitions: Timed rounds; each times every part once, so that a drifting machine
            slows all of them alike.
        output: JSON file for the numbers, written by rank 0.

    Returns:
        Markdown: medians and peak memory of the parts, ratios, and the shares of a step. Empty on
        other ranks than 0.

    Raises:
        ConfigError: Fewer than 5 repetitions, a run without an attack, or a machine that was not
            steady.
    """
    check_repetitions(repetitions)
    if isinstance(run.dat.attack, NoAttack):
        raise ConfigError("dat.attack.name='none': there is no attack to time.")
    by_hand = {
        "dat.optimizer": run.dat.optimizer is None,
        "dat.threat_model.norm": run.dat.threat_model.norm == "linf",
        "dat.objective.name": run.dat.objective.name in ("at", "dat"),
        "dat.objective.natural_weight": not getattr(run.dat.objective, "natural_weight", 0.0),
        "bf16 or fp16": precision_of(run.deepspeed) in ("float32", "autocast"),
    }
    other = [key for key, is_default in by_hand.items() if not is_default]
    if other:
        raise ConfigError(f"The parts are not written by hand for {', '.join(other)}: remove it.")
    from dat_ds.bench.engines import optimizer_step, prepared_engine, training_loader

    engine, model, x, y = prepared_engine(run)
    ranks, steps, accumulation = (
        engine.ranks,
        getattr(run.dat.attack, "steps", 1),
        engine.accumulation,
    )
    with ranks.together():
        check_alone(ranks.device)
    loader = training_loader(run, ranks)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    plain = PlainSteps(model, run, x, y, accumulation)
    others = OtherSteps(model, run, x, y, accumulation)

    parts: dict[str, Callable[[], object]] = {
        STEP: lambda: optimizer_step(engine, x, y),
        GRADIENTS: lambda: plain.input_gradients(steps),
        TRAINING: plain.training_step,
        FORWARD: plain.forward,
        DATA: lambda: [next(batches) for _ in range(accumulation)],
        BACKWARD: lambda: others.backward_through(steps),
    }
    if importlib.util.find_spec("torchattacks") is not None:
        parts[TORCHATTACKS] = lambda: others.torchattacks(steps)
    rounds = time_in_turn(parts, repetitions, ranks.device)
    steps_alone = []
    for _ in range(repetitions):
        optimizer_step(engine, x, y)
        steps_alone.append(engine.metrics)
    metrics = {
        "bytes_sent": steps_alone[-1]["bytes_sent"],
        **{
            key: statistics.median(found[key] for found in steps_alone)
            for key in ("seconds_attack", "seconds_update")
        },
    }
    memory = {name: peak_bytes(part, ranks.device) for name, part in parts.items()}
    communication = _seconds_alone(sum(metrics["bytes_sent"].values()), repetitions, ranks.device)
    engine.close()
    if not ranks.is_main:
        return ""
    values = _summary(steps, accumulation, rounds, metrics, communication)
    values |= {"flops_forward": plain.flops(), "images": len(x) * accumulation * ranks.count}
    values |= {"peak_bytes": memory, "ranks": ranks.count, "config": run.to_dict()}
    values |= {"attack_precision": engine.attack_precision, "num_parameters": _size_of(model)}
    write_record(output, values, ranks.device)
    check_drift(values["clock_drift"])
    return _describe(run, values)


class PlainSteps:
    """The parts of an adversarial step, as one writes them by hand.

    Args:
        model: A copy of the engine's model of its own, on the same device.
        run: Gives the optimizer's kind, clipping and threat model.
        x: Images ``(B, C, H, W)`` of every micro-batch.
        y: Labels ``(B,)``.
        accumulation: Micro-batches of a step.
    """

    def __init__(
        self, model: nn.Module, run: RunConfig, x: Tensor, y: Tensor, accumulation: int = 1
    ) -> None:
        self.model, self.x, self.y, self.accumulation = model, x, y, accumulation
        self.autocast: Callable[[], contextlib.AbstractContextManager[object]]
        self.autocast = contextlib.nullcontext
        if precision_of(run.deepspeed) == "autocast":
            name = run.deepspeed["torch_autocast"].get("dtype") or "bfloat16"
            dtype = getattr(torch, str(name).removeprefix("torch."))
            self.autocast = functools.partial(torch.autocast, x.device.type, dtype=dtype)
        self.clipping = float(run.deepspeed["gradient_clipping"])
        section = run.deepspeed.get("optimizer", {"type": "adamw", "params": {}})
        kind = torch.optim.SGD if section["type"].lower() == "sgd" else torch.optim.AdamW
        self.optimizer = kind(model.parameters(), lr=1e-6)
        dat = run.dat
        self.eps, self.step_size = (
            float(dat.threat_model.eps),
            float(getattr(dat.attack, "step_size", None) or 0),
        )

    def input_gradients(self, steps: int) -> None:
        """``steps`` forwards and input gradients with parameters frozen, and the sign steps."""
        self.model.eval().requires_grad_(False)
        for _ in range(self.accumulation):
            x_adv = self.x.clone()
            for _ in range(steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss(x_adv), x_adv)
                x_adv = self._moved(x_adv, gradient)
        self.model.train().requires_grad_(True)

    def training_step(self, attack: Callable[[], Tensor] | None = None) -> None:
        """Forwards, backwards, clipping, optimizer step; on what ``attack`` makes of the images."""
        batches = [self.x if attack is None else attack() for _ in range(self.accumulation)]
        self.optimizer.zero_grad()  # of what an attack by backward has left, too
        for micro_step, x in enumerate(batches):
            with self.reduced(micro_step == self.accumulation - 1):
                torch.autograd.backward(self.loss(x) / self.accumulation)
        if self.clipping:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()

    def reduced(self, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Context that sums gradients over ranks in the last micro-step alone; here a no-op."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def forward(self) -> None:
        """One forward without graph, in evaluation mode."""
        self.model.eval()
        with self.autocast():
            self.model(self.x)
        self.model.train()

    def flops(self) -> int:
        """Floating-point operations of one forward: of matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self.forward()
        return int(counter.get_total_flops())

    def loss(self, x: Tensor) -> Tensor:
        """Mean cross-entropy at images ``x``."""
        with self.autocast():
            return F.cross_entropy(self.model(x), self.y)

    def _moved(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        """A sign step, and the projection onto the ball and the pixels."""
        x_adv = x_adv.detach() + self.step_size * gradient.sign()
        return torch.min(torch.max(x_adv, self.x - self.eps), self.x + self.eps).clamp(0, 1)


class OtherSteps(PlainSteps):
    """Whole adversarial steps as others write them, on the model under DistributedDataParallel.

    Args:
        model: Copied.
        run: The run's config, as for :class:`PlainSteps`.
        x: Images ``(B, C, H, W)``.
        y: Labels ``(B,)``.
        accumulation: Micro-steps per optimizer step.
    """

    def __init__(
        self, model: nn.Module, run: RunConfig, x: Tensor, y: Tensor, accumulation: int = 1
    ) -> None:
        self._wrapped = DistributedDataParallel(copy.deepcopy(model))
        super().__init__(self._wrapped, run, x, y, accumulation)

    def torchattacks(self, steps: int) -> None:
        """Torchattacks' PGD, then a training step."""
        library: Any = importlib.import_module("torchattacks")
        attack = library.PGD(
            self.model, eps=self.eps, alpha=self.step_size, steps=steps, random_start=False
        )

        def attacked() -> Tensor:
            with self.autocast():
                x_adv: Tensor = attack(self.x, self.y)
            return x_adv.float()

        self.training_step(attacked)

    def backward_through(self, steps: int) -> None:
        """An attack that calls ``backward`` on the loss of the wrapped model, then a step."""

        def attacked() -> Tensor:
            self.model.eval()
            x_adv = self.x.clone()
            for _ in range(steps):
                x_adv.requires_grad_()
                torch.autograd.backward(self.loss(x_adv))
                assert x_adv.grad is not None
                x_adv = self._moved(x_adv, x_adv.grad)
            self.model.train()
            return x_adv

        self.training_step(attacked)

    def reduced(self, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Let DistributedDataParallel reduce in the last micro-step, as it documents."""
        return contextlib.nullcontext() if is_last else self._wrapped.no_sync()


def _size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _seconds_alone(num_bytes: int, repetitions: int, device: torch.device) -> float:
    """Seconds of an all-reduce that sends as many bytes per rank, by itself; a collective."""
    count = dist.get_world_size()
    if count == 1:
        return 0.0
    payload = torch.zeros(round(num_bytes * count / (2 * (count - 1)) / 4), device=device)
    parts = {"all-reduce": lambda: dist.all_reduce(payload)}
    return statistics.median(time_in_turn(parts, repetitions, device)["all-reduce"])


def _summary(
    steps: int,
    accumulation: int,
    rounds: dict[str, list[float]],
    metrics: Mapping[str, Any],
    communication: float,
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    sums = [sum(pair) for pair in zip(rounds[GRADIENTS], rounds[TRAINING], strict=True)]
    floors = [accumulation * (2 * steps + 3) * forward for forward in rounds[FORWARD]]
    attack, update = metrics["seconds_attack"], metrics["seconds_update"]
    step = medians[STEP]
    return {
        "seconds": rounds,
        "median_seconds": medians,
        "over_parts": _ratio(rounds[STEP], sums),
        "over_floor": _ratio(rounds[STEP], floors),
        "over_others": {
            name: _ratio(rounds[STEP], rounds[name])
            for name in (TORCHATTACKS, BACKWARD)
            if name in rounds
        },
        "over_training": _ratio(rounds[STEP], rounds[TRAINING]),
        "shares": {
            "attack": attack / (attack + update),
            "update": update / (attack + update),
            "communication": communication / step,
            "data": medians[DATA] / step,
        },
        "clock_drift": clock_drift(rounds[FORWARD]),
    }


def utilisation(steps: int, values: Mapping[str, Any]) -> float:
    """FLOPs per second of a step over those of a natural training step by hand.

    Both count what they need: ``2 K + 3`` forwards' worth, and 3.
    """
    return float((2 * steps + 3) / 3 / values["over_training"])


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of ratios round by round: both sides of each saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _describe(run: RunConfig, values: Mapping[str, Any]) -> str:
    batch, accumulation = resolve_batch(run.deepspeed, values["ranks"])
    together = run.dat.engine.attack_micro_batches
    of_step = f" x {accumulation} ({together} attacked as one)" if accumulation > 1 else ""
    precision = values["attack_precision"] or "the engine's precision"
    steps, seconds = getattr(run.dat.attack, "steps", 1), values["median_seconds"]
    assert steps is not None
    rows = [
        f"{run.dat.model.name} ({values['num_parameters']} parameters), {values['ranks']} rank(s), "
        f"{batch}{of_step} images each, {run.dat.attack.name}-{steps} in {precision}, "
        f"ZeRO-{run.zero_stage}, medians of {len(values['seconds'][STEP])} rounds",
        "",
        "| what | milliseconds | peak MB |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {1000 * value:.1f} | {values['peak_bytes'][name] / 1e6:.1f} |"
            for name, value in seconds.items()
        ),
        "",
        f"engine step / sum of its parts: {values['over_parts']:.3f}",
        f"engine step / (2K+3) forwards: {values['over_floor']:.3f}",
        *(f"engine step / {name}: {v:.3f}" for name, v in values["over_others"].items()),
        f"images per second: {values['images'] / seconds[STEP]:.1f}",
        f"FLOP utilisation over natural training's: {utilisation(steps, values):.3f}",
        "shares of a step: "
        + ", ".join(f"{name} {100 * share:.1f} %" for name, share in values["shares"].items())
        + " (communication: the same bytes by themselves; data: a batch by itself)",
    ]
    if TORCHATTACKS not in values["median_seconds"]:
        rows.append(f"{TORCHATTACKS} was left out: pip install 'dat-ds[bench]'.")
    return "\n".join(rows)
