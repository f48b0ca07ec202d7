"""Convergence on a min-max problem whose stationary point is known, through the real engine.

Images ``x`` lie in pairs ``c + u`` and ``c - u``; the model is one image ``theta``, and

    f(theta) = E max_{||delta||_2 <= eps} ||theta - x - delta||^2 / 2
             = E (||theta - x|| + eps)^2 / 2,

which one l2 step of length eps attains. Its gradient ``E (1 + eps / ||theta - x||) (theta - x)`` is
zero at ``theta = c``, and its curvature there is nearly ``1 + E eps / ||u||`` in all directions.

Gradient descent whose rate is ``eta ~ 1 / sqrt(T)`` has a mean stationarity ``||grad f||^2`` over
``T`` steps of order ``1 / sqrt(T)``: the rate of Zhang et al., UAI 2022, arXiv 2206.06257. At a
fixed rate it ends on a floor, that of the noise ``s^2`` of sampling and of the codec together:
``eta lambda s^2 / (2 - eta lambda)``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dat_ds.attacks import ThreatModel
from dat_ds.attacks.pgd import Pgd
from dat_ds.bench.records import write_record
from dat_ds.compression import CODECS, build_codec
from dat_ds.files import check_files
from dat_ds.length import Length
from dat_ds.objectives import Objective
from dat_ds.optim import OPTIMIZERS
from dat_ds.processes import on_ranks

RANKS = (1, 2, 4)
HORIZONS = (32, 128, 512)
_SIDE, _PAIRS, _GLOBAL_BATCH, _SEED = 32, 128, 32, 0
_EPS, _SPREAD, _OFFSET, _RATE = 0.5, 0.1, 0.15, 0.7
_OPTIMIZER_STEPS = 400
_OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3},
    "adamw": {"lr": 0.02},
    "lamb": {"lr": 0.05},
    "lars": {"lr": 0.3, "trust_coefficient": 0.1},
    "one_bit_adam": {"lr": 0.02, "freeze_step": 150},
    "one_bit_lamb": {"lr": 0.05, "freeze_step": 150},
    "zero_one_adam": {"lr": 0.02, "var_freeze_step": 150},
}
"""Of optimizers that would not settle in so few steps by their defaults."""


class Problem:
    """The images and what is known of ``f``."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        shape = (1, _SIDE, _SIDE)
        self.stationary = 0.35 + 0.3 * torch.rand(shape, generator=generator)
        spread = _SPREAD * torch.randn(_PAIRS, *shape, generator=generator).clamp(-3, 3)
        self.images = torch.cat([self.stationary + spread, self.stationary - spread])
        lengths = spread.flatten(1).norm(dim=1)
        self.curvature = 1 + float((_EPS / lengths).mean())
        self.noise = float((lengths + _EPS).square().mean())
        """Mean squared length of one image's gradient at the stationary point."""

    def stationarity(self, theta: Tensor) -> float:
        """``||grad f(theta)||^2``."""
        offsets = theta.double() - self.images.double()
        lengths = offsets.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return float(((1 + _EPS / lengths) * offsets).mean(dim=0).square().sum())

    def batch(self, step: int, rank: int, size: int) -> Tensor:
        """Images drawn with replacement, anew for every step and rank."""
        generator = torch.Generator().manual_seed(1_000_003 * step + rank)
        return self.images[torch.randint(len(self.images), (size,), generator=generator)]

    def floor(self, rate: float, ranks: int, codec: str | None) -> float | None:
        """Stationarity that steps of ``rate`` end on; None for a codec with error feedback."""
        noise = self.noise / _GLOBAL_BATCH
        if codec is not None and ranks > 1:
            loss = self._relative_loss(codec, ranks)
            if loss is None:
                return None
            # Of each rank's gradient, averaged, and of the mean on the way back.
            noise += loss * noise + loss * noise * (1 + loss)
        return rate * self.curvature * noise / (2 - rate * self.curvature)

    def _relative_loss(self, name: str, ranks: int) -> float | None:
        """``E|decode(encode(g)) - g|^2 / |g|^2`` of chunks of gradients at the stationary point."""
        codec = build_codec(name)
        if not codec.unbiased:
            return None
        size, generator = _GLOBAL_BATCH // ranks, torch.Generator().manual_seed(_SEED)
        lost = total = 0.0
        for step in range(64):
            gradient = (self.stationary - self.batch(step, 0, size)).mean(dim=0).flatten()
            for chunk in gradient.chunk(ranks):
                lost += float((codec.decode(codec.encode(chunk, generator)) - chunk).square().sum())
                total += float(chunk.square().sum())
        return lost / total


class Offsets(nn.Module):
    """``theta - x`` for each image, flat."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Offsets ``(B, D)``."""
        return (self.theta - x).flatten(1)


@dataclass(frozen=True, kw_only=True)
class HalfSquare(Objective):
    """Half the squared length of the offsets of the attacked images."""

    name: ClassVar[str] = "half_square"

    @property
    def needs_natural_logits(self) -> bool:
        """False."""
        return False

    def __call__(
        self, logits_adv: Tensor, y: Tensor, logits: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": half_square(logits_adv, y).mean()}


def half_square(offsets: Tensor, y: Tensor) -> Tensor:
    """Half the squared length of each offset ``(B,)``."""
    return offsets.square().sum(dim=1) / 2


def check_convergence(output: str | None = None, plot: str | None = None) -> str:
    """Run the problem on 1, 2 and 4 ranks with every codec and optimizer.

    Args:
        output: JSON file for the numbers, every step's stationarity among them.
        plot: PNG file for the picture.

    Returns:
        Two markdown tables: of codecs, the slope of the mean stationarity over the horizon in
        logarithms, and floors against predicted ones; of optimizers, the fall of stationarity.

    Raises:
        ConfigError: For a file that could not be written at the end.
    """
    check_files(output=output, plot=plot)
    by_ranks = {str(ranks): on_ranks(_run_all, ranks) for ranks in RANKS}
    write_record(output, {"by_ranks": by_ranks}, torch.device("cpu"))
    if plot is not None:
        _draw(by_ranks, plot)
    return _describe(by_ranks)


def _run_all() -> dict[str, Any]:
    """All runs of this number of ranks; rank 0's stationarity after every step."""
    codecs = {
        name: {
            str(horizon): _run(
                {"name": "sgd", "momentum": 0.0, "lr": _rate_of(horizon)}, name, horizon
            )
            for horizon in HORIZONS
        }
        for name in ("none", *CODECS)
    }
    optimizers = {
        name: _run(
            {"name": name, **_OPTIONS.get(name, {})}, "none", _OPTIMIZER_STEPS, schedule="cosine"
        )
        for name in OPTIMIZERS
    }
    return {"codecs": codecs, "optimizers": optimizers}


def _rate_of(horizon: int) -> float:
    return _RATE / math.sqrt(horizon)


def _run(
    optimizer: Mapping[str, Any], codec: str, steps: int, schedule: str = "constant"
) -> list[float]:
    import dat_ds

    problem = Problem()
    threat = ThreatModel("l2", _EPS)
    attack = Pgd(
        threat=threat,
        steps=1,
        step_size=Length(_EPS),
        random_start=False,
        inner_loss=half_square,
    )
    generator = torch.Generator().manual_seed(_SEED + 1)
    offset = torch.randn(problem.stationary.shape, generator=generator)
    ranks = int(os.environ["WORLD_SIZE"])
    model = Offsets(problem.stationary + _OFFSET * offset)
    engine, *_ = dat_ds.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": _GLOBAL_BATCH // ranks,
            "gradient_clipping": 0.0,
            "dat": {
                "threat_model": {"norm": "l2", "eps": _EPS},
                "optimizer": {**optimizer, "weight_decay": 0.0},
                "schedule": {"name": schedule, "max_steps": steps},
                "compression": {"name": codec},
            },
        },
        attack=attack,
        objective=HalfSquare(),
    )
    found = []
    for step in range(steps):
        x = problem.batch(step, engine.ranks.rank, _GLOBAL_BATCH // ranks)
        engine.backward(engine(x, torch.zeros(len(x), dtype=torch.int64)))
        engine.step()
        found.append(float(f"{problem.stationarity(model.theta.detach()):.5g}"))
    engine.close()
    return found


def _slope(runs: Mapping[str, list[float]]) -> float:
    """Slope of log mean stationarity over log horizon, from the shortest to the longest."""
    first, last = HORIZONS[0], HORIZONS[-1]
    means = [sum(runs[str(h)]) / h for h in (first, last)]
    return math.log(means[1] / means[0]) / math.log(last / first)


def _floor_of(runs: Mapping[str, list[float]]) -> float:
    """Mean stationarity over the second half of the longest run."""
    tail = runs[str(HORIZONS[-1])][HORIZONS[-1] // 2 :]
    return sum(tail) / len(tail)


def _describe(by_ranks: Mapping[str, Any]) -> str:
    problem, rate = Problem(), _rate_of(HORIZONS[-1])
    lines = [
        f"Mean stationarity over {', '.join(map(str, HORIZONS))} steps; 1 / sqrt(T) has slope -0.5",
        "",
        "| codec | ranks | slope | floor | predicted floor | measured / predicted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for codec in ("none", *CODECS):
        for ranks, runs in by_ranks.items():
            found = runs["codecs"][codec]
            floor = _floor_of(found)
            predicted = problem.floor(rate, int(ranks), None if codec == "none" else codec)
            known = "- | -" if predicted is None else f"{predicted:.5f} | {floor / predicted:.3f}"
            lines.append(f"| {codec} | {ranks} | {_slope(found):.2f} | {floor:.5f} | {known} |")
    lines += ["", "| optimizer | " + " | ".join(f"{r} ranks" for r in by_ranks) + " |"]
    lines += ["| --- " * (len(by_ranks) + 1) + "|"]
    for name in OPTIMIZERS:
        cells = []
        for runs in by_ranks.values():
            found = runs["optimizers"][name]
            cells.append(f"{found[0]:.3g} -> {sum(found[-20:]) / 20:.3g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(by_ranks: Mapping[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problem, rate = Problem(), _rate_of(HORIZONS[-1])
    figure, axes = pyplot.subplots(1, len(by_ranks), figsize=(15, 4.5), sharey=True)
    for axis, (ranks, runs) in zip(axes, by_ranks.items(), strict=True):
        for codec, found in runs["codecs"].items():
            axis.loglog(range(1, HORIZONS[-1] + 1), found[str(HORIZONS[-1])], label=codec, lw=1)
        axis.axhline(problem.floor(rate, int(ranks), None), color="black", ls="--", lw=1)
        axis.set_title(f"{ranks} rank{'s' if ranks != '1' else ''}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("stationarity, squared length of the gradient of f")
    axes[0].legend(title="codec (dashed: predicted floor, none)", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
