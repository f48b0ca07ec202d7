"""Seconds of an adversarial step from what its parts cost: latency, bandwidth and computation.

A message of ``n`` bytes takes ``alpha + beta n`` (Hockney, Parallel Computing 1994). Collectives
are those of Thakur, Rabenseifner and Gropp, IJHPCA 2005, on rings of ``p`` ranks::

    reduce-scatter, all-gather    (p - 1) alpha +     (p - 1) / p n beta
    all-reduce                  2 (p - 1) alpha + 2 (p - 1) / p n beta
    all-to-all (pairwise)         (p - 1) alpha +     (p - 1) / p n beta

``n`` is the whole tensor: what is reduced, gathered, or split among the ranks. Computation is
``(2 K + 3) F`` for an attack of ``K`` steps, ``F`` being one forward: see
:mod:`dat_ds.bench.step_time`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dat_ds.compression import CODECS, build_codec

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
ONE_BIT = {"one_bit_adam": "OneBitAdam", "one_bit_lamb": "OneBitLamb"}
"""Optimizers that are listed beside codecs, by our name: DeepSpeed's name."""

_FLOAT = 4
_PIECE, _TOGETHER = 2**21, 4  # entries of dat.compression.bucket_mb=8, and pieces under way
_MAX_REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters
_HALVES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Link:
    """Cost of a message on a link.

    Args:
        alpha: Seconds of a message of no length (latency).
        beta: Seconds a byte: ``8e-6 / beta`` megabits a second, in each direction.
    """

    alpha: float
    beta: float

    @classmethod
    def of(cls, *, mbit: float, microseconds: float) -> Link:
        """A link of a bandwidth and a latency."""
        return cls(microseconds * 1e-6, 8e-6 / mbit)

    @property
    def mbit(self) -> float:
        """Megabits a second, in each direction."""
        return 8e-6 / self.beta


def collective_seconds(
    collective: Collective, num_bytes: float, ranks: int, link: Link, *, calls: int = 1
) -> float:
    """Seconds of collectives over ranks with a link each; 0 for one rank.

    Args:
        collective: Which.
        num_bytes: Of the whole tensor, over all calls together.
        ranks: Number of ranks.
        link: Of every rank.
        calls: How many collectives the bytes are spread over.
    """
    if ranks == 1:
        return 0.0
    halves = _HALVES[collective]
    share = (ranks - 1) / ranks
    return halves * (calls * (ranks - 1) * link.alpha + share * num_bytes * link.beta)


def fit_link(collective: Collective, ranks: int, samples: Sequence[tuple[int, float]]) -> Link:
    """Alpha and beta of timed collectives of one kind, by least absolute errors of logarithms.

    The sum of absolute errors keeps to the majority: sizes that a buffer along the way swallows at
    once do not bend the line. Its minimum passes through one or two samples, so all are tried.

    Args:
        collective: Which.
        ranks: At least 2.
        samples: ``(bytes, seconds)`` of at least 2 sizes.

    Returns:
        Alpha is not negative, beta is positive.
    """
    weights = [
        [collective_seconds(collective, size, ranks, Link(a, b)) for a, b in ((1, 0), (0, 1))]
        for size, _ in samples
    ]
    found = [Link(0.0, t / of_beta) for (_, t), (_, of_beta) in zip(samples, weights, strict=True)]
    for i, (size, seconds) in enumerate(samples):
        for j, (larger, longer) in enumerate(samples):
            if larger > size and longer > seconds:
                per_byte = (longer - seconds) / (weights[j][1] - weights[i][1])
                alpha = (seconds - per_byte * weights[i][1]) / weights[i][0]
                if alpha >= 0:
                    found.append(Link(alpha, per_byte))

    def error(link: Link) -> float:
        return sum(
            abs(math.log(collective_seconds(collective, size, ranks, link) / seconds))
            for size, seconds in samples
        )

    return min(found, key=error)


def link_error(
    collective: Collective, ranks: int, samples: Sequence[tuple[int, float]], link: Link
) -> float:
    """Median relative error of a link's prediction of the samples that it was fitted to."""
    return statistics.median(
        abs(collective_seconds(collective, size, ranks, link) / seconds - 1)
        for size, seconds in samples
    )


def non_negative_fit(
    rows: Sequence[Sequence[float]], targets: Sequence[float], scales: Sequence[float]
) -> list[float]:
    """Coefficients ``c``, none negative, of least ``|(rows c - targets) / scales|^2``.

    Args:
        rows: Factor of each coefficient, for every target.
        targets: Values that the sums should have.
        scales: Positive: what errors are relative to.

    Returns:
        A coefficient for each column; 0 for a column of zeros.
    """
    over = np.asarray(scales, dtype=np.float64)
    matrix, wanted = np.asarray(rows, dtype=np.float64) / over[:, None], np.asarray(targets) / over
    norms = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(norms > 0, norms, 1)
    best, least = np.zeros(matrix.shape[1]), math.inf
    # Few columns: the best of all choices of those that are not zero is the exact answer.
    for chosen in range(2 ** matrix.shape[1]):
        columns = [i for i in range(matrix.shape[1]) if chosen >> i & 1 and norms[i] > 0]
        found, *_ = np.linalg.lstsq(scaled[:, columns], wanted, rcond=None)
        error = float(np.square(scaled[:, columns] @ found - wanted).sum())
        if (found >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(matrix.shape[1]), error
            best[columns] = found / norms[columns]
    return [float(value) for value in best]


Links = Mapping[Collective, Link]
"""A link as each collective finds it: an implementation may be far from its ring."""


def same_link(link: Link) -> Links:
    """A link that every collective makes full use of."""
    return dict.fromkeys(COLLECTIVES, link)


@dataclass(frozen=True)
class Cluster:
    """Machines with a link each, of several ranks each.

    Args:
        machines: Number of machines.
        gpus: Ranks of a machine.
        between: The link of a machine, which its ranks share.
        inside: The link of a rank to the others of its machine.
    """

    machines: int
    gpus: int
    between: Links
    inside: Links

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.machines * self.gpus

    def seconds(self, collective: Collective, num_bytes: float, calls: int = 1) -> float:
        """Seconds of a collective over all ranks, of ``num_bytes`` in all.

        Reductions and gathers run inside machines and between them one after the other, so that a
        byte crosses a machine's link once a half. An all-to-all is pairwise: every rank's message
        to every rank of another machine crosses it.
        """
        if collective != "all_to_all" or 1 in (self.machines, self.gpus):
            parts = ((self.gpus, self.inside), (self.machines, self.between))
            return sum(
                collective_seconds(collective, num_bytes, count, links[collective], calls=calls)
                for count, links in parts
            )
        inside, between = self.inside[collective], self.between[collective]
        near, far = self.gpus - 1, self.ranks - self.gpus
        latency = calls * (near * inside.alpha + far * between.alpha)
        share = num_bytes / self.ranks
        return latency + share * (near * inside.beta + self.gpus * far * between.beta)


@dataclass(frozen=True)
class Hardware:
    """Cost of computation on a rank.

    Args:
        forward: Seconds of one forward of one image.
        forward_fixed: Seconds of one forward of no image.
        overhead: A step without its optimizer, over ``2 K + 3`` forwards.
        optimizer: Seconds an entry that a rank updates.
        encode: Seconds an entry that is encoded, by codec.
        decode: Seconds an entry that is decoded, by codec.
        one_bit: Seconds an entry of what else a 1-bit optimizer does.
        sharded: Seconds a step of ZeRO-3's bookkeeping.
        slowdown: Factor by which ranks that share cores slow each other down; 1 with cores, or a
            GPU, of their own.
    """

    forward: float
    forward_fixed: float = 0.0
    overhead: float = 1.0
    optimizer: float = 0.0
    encode: Mapping[str, float] = field(default_factory=dict)
    decode: Mapping[str, float] = field(default_factory=dict)
    one_bit: float = 0.0
    sharded: float = 0.0
    slowdown: float = 1.0

    def encodes(self, codec: str) -> bool:
        """Whether it has a cost for what ``codec`` (or ``none``, or a 1-bit optimizer) encodes."""
        return (name := encoder_of(codec)) is None or name in self.encode


@dataclass(frozen=True)
class Workload:
    """Computation and traffic of a step.

    Args:
        num_parameters: Of the model.
        attack_steps: ``K``; 0 is natural training.
        micro_batch: Images of a rank, in one of ``accumulation`` micro-steps.
        accumulation: Micro-steps of a step.
        zero_stage: 0 to 3.
        codec: ``none``, a codec, or a 1-bit optimizer after its freeze (under ZeRO-0).
        sides: ``double`` encodes the mean too; under ZeRO-3, parameters as int8.
        resident: Under ZeRO-3, parameters are gathered once for the attack, not in each of its
            steps.
    """

    num_parameters: int
    attack_steps: int
    micro_batch: int
    accumulation: int = 1
    zero_stage: int = 0
    codec: str = "none"
    sides: Literal["single", "double"] = "double"
    resident: bool = True

    @property
    def is_one_bit(self) -> bool:
        """Whether momentum travels, and no gradient."""
        return self.codec in ONE_BIT

    @property
    def payload(self) -> float:
        """Bytes of all gradients, or of the momentum, once encoded."""
        if self.codec == "none":
            return float(_FLOAT * self.num_parameters)
        return _bytes_per_entry("sign" if self.is_one_bit else self.codec) * self.num_parameters

    @property
    def reductions(self) -> int:
        """Times a step that gradients travel: in every micro-step from stage 2 on."""
        return self.accumulation if self.zero_stage >= 2 else 1

    @property
    def gathers(self) -> int:
        """Times a step that ZeRO-3 gathers all parameters.

        Forward and backward of an update share one gather, up to the number of parameters that
        DeepSpeed keeps for it by default.
        """
        of_attack = min(1, self.attack_steps) if self.resident else self.attack_steps
        of_update = 1 if self.num_parameters <= _MAX_REUSE else 2
        return self.accumulation * (of_attack + of_update)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; nothing overlaps."""

    attack: float
    update: float
    optimizer: float
    codec: float
    gradients: float
    parameters: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return math.fsum(dataclasses.astuple(self))


def step_time(work: Workload, hardware: Hardware, cluster: Cluster) -> StepTime:
    """Predict one optimizer step."""
    forward = hardware.forward_fixed + hardware.forward * work.micro_batch
    floor = hardware.slowdown * hardware.overhead * work.accumulation * forward
    updated = work.num_parameters / (cluster.ranks if work.zero_stage else 1)
    optimizer = hardware.optimizer * updated
    optimizer += hardware.one_bit * work.num_parameters * work.is_one_bit
    optimizer += hardware.sharded * (work.zero_stage == 3)
    return StepTime(
        attack=2 * work.attack_steps * floor,
        update=3 * floor,
        optimizer=hardware.slowdown * optimizer,
        codec=hardware.slowdown * _codec_seconds(work, hardware, cluster.ranks),
        gradients=work.reductions * _gradient_seconds(work, cluster),
        parameters=_parameter_seconds(work, cluster),
    )


def encoder_of(codec: str) -> str | None:
    """The codec that encodes what travels: a 1-bit optimizer's is ``sign``; None for ``none``."""
    if codec == "none":
        return None
    return "sign" if codec in ONE_BIT else codec


def codec_entries(work: Workload, ranks: int) -> tuple[float, float]:
    """Entries that a rank encodes and decodes in a step."""
    if work.codec == "none" or ranks == 1:
        return 0.0, 0.0
    encoded = decoded = 1.0
    if work.is_one_bit or not CODECS[work.codec].unbiased:
        decoded += 1  # error feedback decodes what was sent
    if work.is_one_bit or (work.zero_stage < 3 and work.sides == "double"):
        encoded += 1 / ranks
        decoded += 1
    times = work.num_parameters * work.reductions
    return encoded * times, decoded * times


def _codec_seconds(work: Workload, hardware: Hardware, ranks: int) -> float:
    encoded, decoded = codec_entries(work, ranks)
    codec = encoder_of(work.codec) or ""
    seconds = encoded * hardware.encode.get(codec, 0.0) + decoded * hardware.decode.get(codec, 0.0)
    if work.zero_stage == 3 and work.codec != "none" and work.sides == "double" and ranks > 1:
        entries = work.gathers * work.num_parameters
        seconds += entries * hardware.encode.get("int8", 0.0) / ranks
        seconds += entries * hardware.decode.get("int8", 0.0)
    return seconds


def _gradient_seconds(work: Workload, cluster: Cluster) -> float:
    """One reduction of gradients, or exchange of momentum."""
    if work.codec == "none":
        kind: Collective = "reduce_scatter" if work.zero_stage == 3 else "all_reduce"
        return cluster.seconds(kind, work.payload)
    # Momentum is one piece; pieces of gradients travel a few at a time, and wait together.
    pieces = 1 if work.is_one_bit or work.zero_stage == 3 else work.num_parameters / _PIECE
    calls = math.ceil(pieces / _TOGETHER)
    there = cluster.seconds("all_to_all", work.payload, calls)
    if work.zero_stage == 3:
        return there
    is_encoded = work.is_one_bit or work.sides == "double"
    back = work.payload if is_encoded else float(_FLOAT * work.num_parameters)
    return there + cluster.seconds("all_gather", back, calls)


def _parameter_seconds(work: Workload, cluster: Cluster) -> float:
    whole = float(_FLOAT * work.num_parameters)
    if work.zero_stage == 0:
        return 0.0
    if work.zero_stage < 3:
        return cluster.seconds("all_gather", whole)
    if work.codec != "none" and work.sides == "double":
        whole = _bytes_per_entry("int8") * work.num_parameters
    return work.gathers * cluster.seconds("all_gather", whole)


def _bytes_per_entry(codec: str) -> float:
    return build_codec(codec).bytes_of(2**20) / 2**20


def crossing_mbit(
    plain: Workload,
    coded: Workload,
    hardware: Hardware,
    *,
    machines: int,
    gpus: int,
    inside: Links,
    alpha: float,
    factor: float = 1.1,
) -> float | None:
    """Bandwidth between machines from which ``plain`` takes at most ``factor`` times ``coded``.

    Args:
        plain: A workload that sends more.
        coded: One that sends less.
        hardware: Of both.
        machines: Number of machines.
        gpus: Ranks of a machine.
        inside: Links inside machines.
        alpha: Latency between machines, in seconds.
        factor: Ratio that counts as close enough.

    Returns:
        Megabits a second; 0 where any bandwidth will do, None where none does.
    """

    def seconds(work: Workload, beta: float) -> float:
        between = same_link(Link(alpha, beta))
        return step_time(work, hardware, Cluster(machines, gpus, between, inside)).total

    # Both are linear in beta; of a byte a second, because a difference of small numbers is lost.
    fixed = factor * seconds(coded, 0.0) - seconds(plain, 0.0)
    slope = (seconds(plain, 1.0) - seconds(plain, 0.0)) - factor * (
        seconds(coded, 1.0) - seconds(coded, 0.0)
    )
    if slope <= 0:
        return 0.0 if fixed >= 0 else None
    return 8e-6 * slope / fixed if fixed > 0 else None
