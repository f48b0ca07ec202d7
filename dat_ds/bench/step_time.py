"""Time of an adversarial step against the sum of its parts in hand-written PyTorch.

The parts of a K-step step are K stand-alone input-gradient passes and one training step (forward,
backward, clipping, optimizer). The floor is ``(2 K + 3) F`` with ``F`` the time of one forward in
evaluation mode without graph: forward ``F``, input gradient ``F``, full backward ``2 F``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.bench.records import write_record
from dat_ds.bench.timing import (
    check_alone,
    check_drift,
    check_repetitions,
    clock_drift,
    time_in_turn,
)
from dat_ds.config import RunConfig, precision_of, resolve_batch
from dat_ds.errors import ConfigError


def bench_attack(run: RunConfig, *, repetitions: int, output: str | None = None) -> str:
    """Time the engine's step and its parts in turn, and print how they compare.

    Args:
        run: What to time; its data gives the image size, the images themselves are random.
        repetitions: Timed rounds; each times every part once, so that a drifting machine
            slows all of them alike.
        output: JSON file for the numbers.

    Returns:
        A markdown table of medians, and the two ratios.

    Raises:
        ConfigError: Fewer than 5 repetitions, several ranks, a run without an attack, or a machine
            that was not steady.
    """
    check_repetitions(repetitions)
    if run.dat.attack.name == "none" or run.dat.attack.steps is None:
        raise ConfigError("dat.attack.name='none': there is no attack to time.")
    by_hand = {
        "dat.optimizer": run.dat.optimizer is None,
        "dat.threat_model.norm": run.dat.threat_model.norm == "linf",
        "dat.objective.name": run.dat.objective.name in ("at", "dat"),
        "dat.objective.natural_weight": not run.dat.objective.natural_weight,
        "gradient_accumulation_steps": run.deepspeed.get("gradient_accumulation_steps", 1) == 1,
        "bf16, fp16 or torch_autocast": precision_of(run.deepspeed) == "float32",
    }
    other = [key for key, is_default in by_hand.items() if not is_default]
    if other:
        raise ConfigError(f"The parts are not written by hand for {', '.join(other)}: remove it.")
    from dat_ds.engine.bench import prepared_engine

    engine, model, x, y = prepared_engine(run)
    if engine.ranks.count > 1:
        raise ConfigError("'bench attack' times one rank: start it without --num_accelerators.")
    check_alone(engine.ranks.device)
    steps = run.dat.attack.steps
    micro_batch, _ = resolve_batch(run.deepspeed, 1)
    plain = PlainSteps(model, run, x, y)

    def engine_step() -> None:
        engine.backward(engine(x, y))
        engine.step()

    parts: dict[str, Callable[[], None]] = {
        "engine step": engine_step,
        "input gradients": lambda: plain.input_gradients(steps),
        "training step": plain.training_step,
        "forward": plain.forward,
    }
    rounds = time_in_turn(parts, repetitions, engine.ranks.device)
    engine.close()
    return _describe(run, micro_batch, steps, rounds, engine.ranks.device, output)


class PlainSteps:
    """The parts of an adversarial step, as one writes them by hand.

    Args:
        model: A copy of the engine's model of its own, on the same device.
        run: Gives the optimizer's kind, clipping and threat model.
        x: Images ``(B, C, H, W)``.
        y: Labels ``(B,)``.
    """

    def __init__(self, model: nn.Module, run: RunConfig, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.clipping = float(run.deepspeed["gradient_clipping"])
        section = run.deepspeed.get("optimizer", {"type": "adamw", "params": {}})
        kind = torch.optim.SGD if section["type"].lower() == "sgd" else torch.optim.AdamW
        self.optimizer = kind(model.parameters(), lr=1e-6)
        dat = run.dat
        self.eps, self.step_size = float(dat.threat_model.eps), float(dat.attack.step_size or 0)

    def input_gradients(self, steps: int) -> None:
        """``steps`` forwards and input gradients with parameters frozen, and the sign steps."""
        self.model.eval().requires_grad_(False)
        x_adv = self.x.clone()
        for _ in range(steps):
            x_adv.requires_grad_()
            loss = F.cross_entropy(self.model(x_adv), self.y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + self.step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, self.x - self.eps), self.x + self.eps).clamp(0, 1)
        self.model.train().requires_grad_(True)

    def training_step(self) -> None:
        """Forward, backward, clipping, optimizer step."""
        self.optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(self.model(self.x), self.y))
        if self.clipping:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()

    @torch.no_grad()
    def forward(self) -> None:
        """One forward without graph, in evaluation mode."""
        self.model.eval()
        self.model(self.x)
        self.model.train()


def _describe(
    run: RunConfig,
    micro_batch: int,
    steps: int,
    rounds: dict[str, list[float]],
    device: torch.device,
    output: str | None,
) -> str:
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    engine, forward = rounds["engine step"], rounds["forward"]
    parts = zip(rounds["input gradients"], rounds["training step"], strict=True)
    # Ratios round by round: both sides of a ratio saw the same machine.
    over_parts = [e / sum(p) for e, p in zip(engine, parts, strict=True)]
    over_floor = [e / ((2 * steps + 3) * f) for e, f in zip(engine, forward, strict=True)]
    drift = clock_drift(forward)
    values: dict[str, Any] = {
        "seconds": rounds,
        "median_seconds": medians,
        "over_parts": statistics.median(over_parts),
        "over_floor": statistics.median(over_floor),
        "clock_drift": drift,
        "config": run.to_dict(),
    }
    write_record(output, values, device)
    check_drift(drift)
    rows = [
        f"{run.dat.model.name}, batch {micro_batch}, {run.dat.attack.name}-{steps}, "
        f"ZeRO-{run.zero_stage}, medians of {len(engine)} rounds",
        "",
        "| what | milliseconds |",
        "| --- | --- |",
        *(f"| {name} | {1000 * value:.1f} |" for name, value in medians.items()),
        "",
        f"engine step / sum of its parts: {values['over_parts']:.3f}",
        f"engine step / (2K+3) forwards: {values['over_floor']:.3f}",
    ]
    return "\n".join(rows)
