"""Square Attack: random search by changes of squares, without gradients.

Andriushchenko et al., ECCV 2020, arXiv 1912.00049, algorithms 1 to 3 (l-infinity, l2). For l1 the
l2 moves are measured in l1 and projected onto the ball and the pixel range, as in Croce and Hein,
ICML 2021, arXiv 2103.01208; how much mass a move is given before its projection is our own choice.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``; ``s`` side of the squares.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import cw_margin, true_classes
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator, rand_like
from dat_ds.attacks.projections import per_sample
from dat_ds.attacks.threat import Norm, ThreatModel

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of the pixels that change is halved."""
_DRAWN_AT_ONCE = 50  # queries; one draw of many numbers costs little more than one of few
_TILES = 5  # of the start, along each side
_INSIDE = 1 - 1e-6  # of eps: rounding then does not leave the ball
_TINY = 1e-12
_L1_SCALE = 3.0  # of a perturbation before its projection; chosen by its success
_SHRINKING_STEPS = 8


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    queries: int = 5000,
    first_share: float = 0.8,
    restarts: int = 1,
    start: Tensor | None = None,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
) -> Tensor:
    """Square Attack: random squares of the image change, and stay where the margin rises.

    Cost: ``restarts`` times ``queries`` forwards; no gradient is taken. Leaves the model, the
    global generators and ``x`` as they were. The number of forwards does not depend on the data: a
    sample that is misclassified already is only attacked further.

    Args:
        model: Pixels ``(B, C, H, W)`` in ``[threat.lower, threat.upper]`` to logits ``(B, K)``.
        x: Original images, float32.
        y: Class indices ``(B,)`` int64, or probabilities ``(B, K)``, of which the largest counts.
        threat: Allowed perturbations.
        queries: Forwards of a run, at least 1; AutoAttack has 5000. The first is of the start.
        first_share: Share of the pixels that the first squares cover, in (0, 1]; halved after 10,
            50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries.
        restarts: Independent runs.
        start: Images that each run starts from, such as those of another attack; they are
            projected first. None: stripes for l-infinity, tiles for l2 and l1.
        generator: Source of the starts and squares. None: a fresh, unpredictable one.
        model_mode: Mode of the model's modules during the attack.

    Returns:
        ``x_adv``, detached float32 of the shape of ``x``, inside the threat model: of all runs, the
        image with the largest margin ``max_{k != y} z_k - z_y``.

    Raises:
        ValueError: For counts or a share out of range.
    """
    if queries < 1 or restarts < 1 or not 0 < first_share <= 1:
        raise ValueError(
            f"queries={queries} and restarts={restarts} must be at least 1, and "
            f"first_share={first_share} above 0 and at most 1."
        )
    source = fresh_generator(x.device) if generator is None else generator
    with admitted(model, x, y, threat=threat, loss="cw", model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        classes = true_classes(y, "cw")
        assert classes is not None
        best = threat.project(x, x)
        best_margin = torch.full(classes.shape, -float("inf"), dtype=torch.float64, device=x.device)
        moves = _MOVES[threat.norm](threat, x)
        with torch.no_grad():
            for _ in range(restarts):
                first = moves.start(source) if start is None else threat.project(start, x)
                found = _search(model, classes, moves, first, queries, first_share, source)
                better = found[1] > best_margin
                best = torch.where(per_sample(better, best), found[0], best)
                best_margin = torch.where(better, found[1], best_margin)
        return best


class _Moves(Protocol):
    """Candidates of one norm.

    Attributes:
        num_draws: Uniform numbers that a candidate takes for each sample.
    """

    num_draws: int

    def start(self, source: Generator) -> Tensor:
        """The first image of each sample."""
        ...

    def candidate(self, best: Tensor, side: int, draws: Tensor) -> Tensor:
        """Images like ``best`` with a square changed.

        Args:
            best: Best images so far.
            side: Of the square in pixels; some norms round it up to an odd number.
            draws: Uniform numbers ``(B, num_draws)``.
        """
        ...


def _search(
    model: Model,
    y: Tensor,
    moves: _Moves,
    best: Tensor,
    queries: int,
    first_share: float,
    source: Generator,
) -> tuple[Tensor, Tensor]:
    """The best image of one run from ``best``, and its margin ``(B,)`` float64."""
    margin = cw_margin(model(best).double(), y)
    height, width = best.shape[-2:]
    for query, draws in enumerate(_draws(best, moves.num_draws, queries - 1, source)):
        share = first_share / 2 ** bisect.bisect_left(_HALVINGS, query)
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        candidate = moves.candidate(best, side, draws)
        found = cw_margin(model(candidate).double(), y)
        rises = found > margin
        best = torch.where(per_sample(rises, best), candidate, best)
        margin = torch.where(rises, found, margin)
    return best, margin


def _draws(x: Tensor, numel: int, count: int, source: Generator) -> Iterator[Tensor]:
    """``count`` times uniform numbers ``(B, numel)`` float32 in [0, 1)."""
    for first in range(0, count, _DRAWN_AT_ONCE):
        block = min(_DRAWN_AT_ONCE, count - first)
        numbers = rand_like(x.new_empty(len(x), block * numel, dtype=torch.float32), source)
        yield from numbers.view(len(x), block, numel).unbind(dim=1)


def _below(draw: Tensor, count: int) -> Tensor:
    """A uniform number in [0, 1) as an integer from 0 to ``count - 1``."""
    return (draw * count).long().clamp_max_(count - 1)


def _places(draws: Tensor, side: int, shape: Sequence[int]) -> Tensor:
    """Positions in the flattened image of a random square's pixels ``(B, 1, side^2)``.

    Args:
        draws: Uniform numbers; the first two of each sample are taken.
        side: Of the square.
        shape: Of the images.
    """
    height, width = shape[-2:]
    corner = _below(draws[:, 0], height - side + 1) * width
    corner += _below(draws[:, 1], width - side + 1)
    steps = torch.arange(side, device=draws.device)
    return corner.view(-1, 1, 1) + (steps.unsqueeze(1) * width + steps).flatten()


class _Stripes:
    """l-infinity: stripes at the start, then squares of one sign per channel; all at full eps."""

    def __init__(self, threat: ThreatModel, x: Tensor) -> None:
        self.num_draws = 2 + x.shape[1]
        self._x = x
        self._low, self._high = (
            (x + sign * threat.eps).clamp_(threat.lower, threat.upper) for sign in (-1, 1)
        )

    def start(self, source: Generator) -> Tensor:
        """Vertical stripes one pixel wide."""
        rises = rand_like(self._x[:, :, :1], source) < 0.5
        return torch.where(rises, self._high, self._low)

    def candidate(self, best: Tensor, side: int, draws: Tensor) -> Tensor:
        """A square at a random place."""
        # Only the pixels of the square are computed: most squares are small.
        places = _places(draws, side, best.shape).expand(-1, best.shape[1], -1)
        high, low = (ends.flatten(2).gather(2, places) for ends in (self._high, self._low))
        moved = torch.where((draws[:, 2:] < 0.5).unsqueeze(2), high, low)
        return best.flatten(2).scatter(2, places, moved).view_as(best)


class _Mass:
    """l2: one square takes over another's share of the norm, and what is left unused."""

    power = 2  # of the entries whose sum over an image is bounded
    extra = 0.0  # mass that a square is given besides, as a share of the whole per channel

    def __init__(self, threat: ThreatModel, x: Tensor) -> None:
        self.num_draws = 5 + x.shape[1]
        self._threat, self._x = threat, x
        self._budget = (threat.eps * _INSIDE) ** self.power
        self._largest = min(x.shape[-2:])

    def start(self, source: Generator) -> Tensor:
        """Tiles of random sign, centred, which use the whole norm."""
        side = self._largest // _TILES
        if side == 0:  # images of fewer than 5 pixels a side
            side, num_tiles = 1, self._largest
        else:
            num_tiles = _TILES
        batch, channels, height, width = self._x.shape
        signs = rand_like(self._x.new_empty(batch, channels, num_tiles, num_tiles), source)
        signs = signs.sub_(0.5).sign_()
        tile = _bump(side, self._x.device, self._x.dtype)[0].view(side, side)
        delta = torch.zeros_like(self._x)
        top, left = ((n - num_tiles * side) // 2 for n in (height, width))
        across = slice(top, top + num_tiles * side), slice(left, left + num_tiles * side)
        delta[:, :, across[0], across[1]] = torch.kron(signs, tile)
        total = self._mass(delta.flatten(1)).clamp_min(_TINY)
        length = self._lengths(self._budget / total).to(delta.dtype)
        return self._image(delta * per_sample(length, delta))

    def candidate(self, best: Tensor, side: int, draws: Tensor) -> Tensor:
        """The mass of a random square moves to another one, in the shape of two bumps."""
        channels = best.shape[1]
        side = max(side, min(3, self._largest))
        side += 1 - side % 2 if side < self._largest else 0
        first, second = (
            _places(draws[:, i:], side, best.shape).expand(-1, channels, -1) for i in (0, 2)
        )
        delta = (best - self._x).flatten(2)
        unused = (self._budget - self._mass(delta.flatten(1))).clamp_min(0)
        here = delta.gather(2, first)
        given = self._mass(delta.gather(2, second))
        delta.scatter_(2, second, 0.0)
        # Both squares together: what they share counts once.
        added = (unused + self.extra * self._budget).unsqueeze(1) / channels
        available = given + self._mass(delta.gather(2, first)) + added
        bump = _bump(side, best.device, best.dtype)[(draws[:, 4] < 0.5).long()]
        sign = (draws[:, 5:] - 0.5).sign_().to(best.dtype).unsqueeze(2)
        shape = sign * self._unit(bump).unsqueeze(1) + self._unit(here)
        length = self._lengths(available).to(best.dtype).unsqueeze(2)
        delta.scatter_(2, first, self._unit(shape) * length)
        return self._image(delta.view_as(best))

    def _image(self, delta: Tensor) -> Tensor:
        """The image with this perturbation, inside the threat model."""
        return (self._x + delta).clamp_(self._threat.lower, self._threat.upper)

    def _mass(self, t: Tensor) -> Tensor:
        """Sum of absolute or squared entries over the last dimension, float64."""
        return (t.square() if self.power == 2 else t.abs()).sum(dim=-1, dtype=torch.float64)

    def _lengths(self, mass: Tensor) -> Tensor:
        return mass.sqrt() if self.power == 2 else mass

    def _unit(self, t: Tensor) -> Tensor:
        """Of norm 1 along the last dimension; zero stays zero."""
        return t / self._lengths(self._mass(t)).clamp_min(_TINY).to(t.dtype).unsqueeze(-1)


class _SparseMass(_Mass):
    """l1: the same with more mass than there is, of which the projection keeps the largest entries.

    Entries below a threshold vanish, so that the norm is spent on few pixels that change much.
    """

    power = 1
    extra = 3.0

    def _image(self, delta: Tensor) -> Tensor:
        flat = _L1_SCALE * delta.flatten(1)
        magnitude = flat.abs()
        x = self._x.flatten(1)
        room = torch.where(flat >= 0, self._threat.upper - x, x - self._threat.lower)
        size = _shrunk(magnitude, room, self._budget)
        return super()._image(size.copysign_(flat).view_as(delta))


def _shrunk(magnitude: Tensor, room: Tensor, total: float) -> Tensor:
    """About the projection onto an l1 ball and a box: ``min((magnitude - lam)_+, room)``.

    A few of Newton's steps for ``lam``, kept between bounds, then a factor that leaves the sum of a
    row at most ``total``; the exact projection sorts, which takes longer than a small model.

    Args:
        magnitude: Absolute values ``(B, n)``.
        room: Largest value of each entry.
        total: Largest sum of a row.
    """
    low = torch.zeros_like(magnitude[:, :1], dtype=torch.float64)
    high = magnitude.amax(dim=1, keepdim=True).double()
    lam = low
    for _ in range(_SHRINKING_STEPS):
        rest = magnitude - lam.to(magnitude.dtype)
        size = torch.minimum(rest.clamp_min(0), room)
        excess = size.sum(dim=1, keepdim=True, dtype=torch.float64) - total
        num_moving = (size == rest).sum(dim=1, keepdim=True)
        low = torch.where(excess > 0, lam, low)
        high = torch.where(excess > 0, high, lam)
        newton = lam + excess / num_moving.clamp_min(1)
        lam = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    size = torch.minimum((magnitude - lam.to(magnitude.dtype)).clamp_min_(0), room)
    found = size.sum(dim=1, keepdim=True, dtype=torch.float64).clamp_min(_TINY)
    return size.mul_((total / found).clamp_max_(1.0))


_MOVES: dict[Norm, Callable[[ThreatModel, Tensor], _Moves]] = {
    "linf": _Stripes,
    "l2": _Mass,
    "l1": _SparseMass,
}


@functools.lru_cache(maxsize=256)
def _bump(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Two bumps of opposite sign side by side, and their transpose: ``(2, side^2)``."""
    half = side // 2
    bumps = torch.zeros(side, side, dtype=torch.float64)
    bumps[:, :half] = _single_bump(side, half)
    bumps[:, half:] = -_single_bump(side, side - half)
    return torch.stack([bumps, bumps.T]).flatten(1).to(device, dtype)


def _single_bump(height: int, width: int) -> Tensor:
    """The paper's ``eta^(h1, h2)``: ``sum_{k=0}^{M(r, s)} 1 / (n + 1 - k)^2``, largest within."""
    n = height // 2
    rows, columns = (torch.arange(1, m + 1) for m in (height, width))
    steps = n - torch.maximum(
        (rows - n - 1).abs().unsqueeze(1), (columns - width // 2 - 1).abs().unsqueeze(0)
    )
    terms = 1 / torch.arange(n + 1, 0, -1, dtype=torch.float64).square()
    return terms.cumsum(0)[steps.clamp(0, n)]
