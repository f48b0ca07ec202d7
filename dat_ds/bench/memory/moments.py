"""Memory of a rank at each moment of a training step, term by term.

Parameters, gradients and the optimizer's states are those of ZeRO (Rajbhandari et al., SC 2020,
arXiv 1910.02054, section 3): of ``N`` ranks each keeps a share of the optimizer's states under
stage 1, of the gradients too under stage 2, of the parameters too under stage 3. What DeepSpeed
0.19.8 keeps besides, its buckets and the copies that it makes, was read in its source; and what the
collectives of a CPU (gloo) stage, in torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dat_ds.bench.memory.state import OptimizerBytes
from dat_ds.bench.memory.trace import Passes

START = "start"
"""The model is built, and DeepSpeed takes it over."""
ATTACK = "attack"
"""Forwards and backwards to the pixels."""
UPDATE = "update"
"""The outer forward and backward."""
REDUCTION = "reduction"
"""Gradients are averaged, in the last part of the backward."""
STEP = "step"
"""The optimizer's."""
MOMENTS = (START, ATTACK, UPDATE, REDUCTION, STEP)

_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the memory of a rank depends on, but for its batch.

    Attributes:
        trainable: Elements of each parameter that is trained.
        frozen: Elements of the others, together.
        buffer_bytes: Of the model's buffers.
        stage: ZeRO stage.
        ranks: ``N``.
        width: Bytes of an element of the parameters and of their gradients: 4, or 2 in bf16, fp16.
        gradient_width: Bytes of an element in which gradients are accumulated.
        optimizer: The optimizer's own.
        accumulation: Micro-steps of an optimizer step.
        reduce_bucket: Elements of DeepSpeed's bucket of gradients.
        prefetch: Elements of parameters that ZeRO-3 gathers ahead.
        max_live: Elements of gathered parameters that ZeRO-3 keeps at most.
        persistence: Parameters of fewer elements stay gathered under ZeRO-3.
        overlaps: Whether stages 1 and 2 have two buckets.
        resident_bytes: ``dat.engine.resident_parameters_gib``.
        offloads_optimizer: Whether the optimizer's states and its gradients lie on the host.
        offloads_parameters: Whether ZeRO-3's shards do.
        averages: Whether ``dat.ema`` is on.
        perturbs: Whether weights are perturbed, of which a copy is kept meanwhile.
        has_reference: Whether a frozen copy of the model is kept.
        on_cpu: Whether the device is the host: memory that is set aside counts from when it is
            written to, and gloo's collectives copy.
    """

    trainable: tuple[int, ...]
    stage: int
    ranks: int
    optimizer: OptimizerBytes
    frozen: int = 0
    buffer_bytes: int = 0
    width: int = _FLOAT
    gradient_width: int = _FLOAT
    accumulation: int = 1
    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    persistence: int = 100_000
    overlaps: bool = False
    resident_bytes: float = 4 * 2.0**30
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    averages: bool = False
    perturbs: bool = False
    has_reference: bool = False
    on_cpu: bool = False

    @property
    def parameters(self) -> int:
        """Elements that are trained."""
        return sum(self.trainable)

    @property
    def share(self) -> int:
        """Elements that a rank's optimizer updates, with the padding that makes shares alike."""
        if self.stage == 0:
            return self.parameters
        if self.stage == 3:
            return sum(math.ceil(size / self.ranks) for size in self.trainable)
        return 2 * math.ceil(self.parameters / (2 * self.ranks))

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer updates float32 copies of the parameters."""
        return self.stage > 0 or self.width < _FLOAT


@dataclass
class Ledger:
    """Bytes of a rank, by moment and term.

    Attributes:
        device: On the device; on a CPU everything.
        host: In the memory of the host, next to a GPU.
    """

    on_cpu: bool = False
    device: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, moment: str, term: str, size: float, *, on_host: bool = False) -> None:
        """Add bytes to a term at a moment."""
        if size:
            found = self.host if on_host and not self.on_cpu else self.device
            terms = found.setdefault(moment, {})
            terms[term] = terms.get(term, 0) + round(size)

    def peaks(self, *, on_host: bool = False) -> dict[str, int]:
        """Bytes by moment."""
        found = self.host if on_host else self.device
        return {moment: sum(terms.values()) for moment, terms in found.items()}

    def peak(self, *, on_host: bool = False) -> int:
        """The most of all moments."""
        return max(self.peaks(on_host=on_host).values(), default=0)


def memory_of(setting: Setting, attack: Passes | None, update: Passes, image_bytes: int) -> Ledger:
    """Bytes of a rank at each moment, from the second step on, when all states are there.

    Args:
        setting: See there.
        attack: Passes of the attack's batch; None for natural training.
        update: Passes of the outer batch.
        image_bytes: Of the images of both that are alive at once.
    """
    ledger = Ledger(on_cpu=setting.on_cpu)
    _start(setting, ledger)
    for moment in (ATTACK, UPDATE, REDUCTION, STEP):
        _kept(setting, ledger, moment)
        ledger.add(moment, "images", image_bytes)
    if attack is not None:
        _accumulated(setting, ledger, ATTACK)
        _gathered(setting, ledger, ATTACK)
        _activations(ledger, ATTACK, attack, attack.peak)
    _update(setting, ledger, update)
    _reduction(setting, ledger)
    _step(setting, ledger)
    return ledger


def _kept(s: Setting, ledger: Ledger, moment: str) -> None:
    """What lies there between two steps."""
    optimizer_on_host = s.offloads_optimizer
    if s.stage == 3:
        shard = s.width * (s.share + math.ceil(s.frozen / s.ranks))
        ledger.add(moment, "parameters", shard, on_host=s.offloads_parameters)
        small = sum(size for size in s.trainable if size < s.persistence)
        if s.ranks > 1:
            ledger.add(moment, "gathered parameters", s.width * small)
    else:
        whole = s.parameters if s.stage == 0 else s.ranks * s.share
        ledger.add(moment, "parameters", s.width * (whole + s.frozen))
    ledger.add(moment, "buffers", s.buffer_bytes)
    if s.has_masters:
        ledger.add(moment, "master weights", _FLOAT * s.share, on_host=optimizer_on_host)
    ledger.add(moment, "optimizer", s.optimizer.state * s.share, on_host=optimizer_on_host)
    if s.averages:
        held = s.share if s.stage == 3 else s.parameters + s.frozen
        ledger.add(moment, "average", _FLOAT * held, on_host=s.offloads_parameters)
    if s.has_reference:
        ledger.add(moment, "reference", s.width * (s.parameters + s.frozen))
    if s.stage == 3:
        ledger.add(moment, "gradients", s.gradient_width * s.share, on_host=optimizer_on_host)
        ledger.add(moment, "bucket", s.width * _bucket(s))
    if optimizer_on_host:
        ledger.add(moment, "gradients", _FLOAT * s.share, on_host=True)
        if s.stage < 3:
            ledger.add(moment, "staging", s.width * s.share, on_host=True)
            largest = s.width * max(s.trainable)
            ledger.add(moment, "staging", largest)
            ledger.add(moment, "staging", largest, on_host=True)
            if s.accumulation > 1:
                ledger.add(moment, "gradients", s.width * s.share, on_host=True)


def _accumulated(s: Setting, ledger: Ledger, moment: str) -> None:
    """Gradients of the micro-steps before, under ZeRO-0 to 2; those on the host are kept anyway."""
    if s.accumulation == 1 or s.stage == 3 or s.offloads_optimizer:
        return
    held = s.share if s.stage == 2 else s.parameters
    ledger.add(moment, "gradients", s.gradient_width * held)


def _bucket(s: Setting) -> int:
    """Elements of DeepSpeed's bucket that count."""
    return min(s.reduce_bucket, s.parameters) if s.on_cpu else s.reduce_bucket


def _gathered(s: Setting, ledger: Ledger, moment: str) -> None:
    """ZeRO-3's whole parameters, and the flat copies that come before them."""
    if s.stage < 3 or s.ranks == 1:
        return
    large = sum(size for size in s.trainable if size >= s.persistence) + s.frozen
    whole = s.width * (s.parameters + s.frozen)
    is_resident = moment == ATTACK and whole <= s.resident_bytes
    live = large if is_resident else min(large, s.max_live)
    ledger.add(moment, "gathered parameters", s.width * live)
    ledger.add(moment, "staging", s.width * min(large, max(s.prefetch, max(s.trainable))))


def _activations(ledger: Ledger, moment: str, passes: Passes, alive: int) -> None:
    saved = min(passes.saved, alive)
    ledger.add(moment, "activations", saved)
    ledger.add(moment, "transient", alive - saved)


def _update(s: Setting, ledger: Ledger, passes: Passes) -> None:
    """The moment of the backward at which activations and gradients together are the most."""
    whole = s.width * (s.parameters + s.frozen)
    if s.perturbs:
        ledger.add(UPDATE, "perturbation", 2 * (s.width * s.share if s.stage == 3 else whole))
    if s.stage == 3:
        # Gathered parameters go as the backward does.
        _gathered(s, ledger, UPDATE)
        _activations(ledger, UPDATE, passes, passes.peak)
        return

    def gradients(done: int) -> int:
        if s.stage == 2:
            return s.width * (min(done, s.reduce_bucket) if s.on_cpu else 0)
        return s.width * (s.parameters if s.accumulation > 1 else done)

    done, alive = max(passes.timeline, key=lambda point: point[1] + gradients(point[0]))
    _activations(ledger, UPDATE, passes, alive)
    ledger.add(UPDATE, "bucket" if s.stage == 2 else "gradients", gradients(done))
    if s.stage == 2:
        if not s.on_cpu:
            ledger.add(UPDATE, "bucket", s.width * s.reduce_bucket * (1 + s.overlaps))
        if s.accumulation > 1:
            _accumulated(s, ledger, UPDATE)
        elif s.parameters > s.reduce_bucket and not s.offloads_optimizer:
            ledger.add(UPDATE, "gradients", s.gradient_width * s.share)


def _reduction(s: Setting, ledger: Ledger) -> None:
    """The last bucket's, with no activation left."""
    width, sent = s.width, min(s.reduce_bucket, s.parameters)
    if s.stage == 0:
        ledger.add(REDUCTION, "gradients", width * s.parameters)
        ledger.add(REDUCTION, "staging", width * sent)
        return
    if s.stage < 3:
        buckets = (1 + s.overlaps) * (sent if s.on_cpu else s.reduce_bucket)
        ledger.add(REDUCTION, "bucket", width * buckets)
        left = max(0, s.parameters - sent) if s.stage == 1 else 0
        ledger.add(REDUCTION, "gradients", width * left)
        if not s.offloads_optimizer:
            copies = 1 + (s.accumulation > 1 and s.stage == 2)
            kept = s.gradient_width * s.share * copies
            # The flat copy is gone when the share is copied out of the last bucket.
            is_one = s.parameters <= s.reduce_bucket
            ledger.add(REDUCTION, "staging", max(width * sent, kept) if is_one else width * sent)
            ledger.add(REDUCTION, "gradients", 0 if is_one and copies == 1 else kept)
        else:
            ledger.add(REDUCTION, "staging", width * sent)
        return
    copies = 1 + (s.on_cpu and s.ranks > 1)
    ledger.add(REDUCTION, "staging", width * sent * copies)


def _step(s: Setting, ledger: Ledger) -> None:
    """The optimizer's step, and the gather of what it has updated."""
    optimizer, on_host = s.optimizer, s.offloads_optimizer
    if s.stage == 0:
        ledger.add(STEP, "gradients", s.width * s.parameters)
        if s.has_masters:
            ledger.add(STEP, "gradients", _FLOAT * s.parameters)
        works_on = s.parameters if optimizer.whole else max(s.trainable)
        ledger.add(STEP, "transient", optimizer.transient * works_on)
        return
    if not on_host:
        ledger.add(STEP, "gradients", _FLOAT * s.share)
    # One flat tensor is updated as a whole; before, gradients were copied into one.
    copied = 0 if on_host else s.gradient_width * s.share
    works = max(copied, optimizer.transient * s.share)
    if s.stage < 3 and s.on_cpu and s.ranks > 1:
        gathering = s.width * s.ranks * s.share - (0 if on_host else _FLOAT * s.share)
        works = max(works, gathering)
    ledger.add(STEP, "transient", works, on_host=on_host)


def _start(s: Setting, ledger: Ledger) -> None:
    """From the built model to DeepSpeed's tensors: while it takes over, or what it then keeps."""
    whole = _FLOAT * (s.parameters + s.frozen)
    taking, kept = Ledger(s.on_cpu), Ledger(s.on_cpu)
    if s.has_reference:
        taking.add(START, "reference", whole)
    taking.add(START, "parameters", whole)
    if 0 < s.stage < 3:
        taking.add(START, "transient", s.width * s.parameters)
    elif s.stage == 3:
        taking.add(START, "transient", s.width * s.share, on_host=s.offloads_parameters)
    _kept(s, kept, START)
    if s.stage == 0 and s.has_masters:
        # DeepSpeed makes the states by a step with gradients of zero.
        kept.add(START, "gradients", _FLOAT * s.share)
    else:
        kept.device[START].pop("optimizer", None)
        kept.host.get(START, {}).pop("optimizer", None)
    if s.on_cpu:
        kept.device[START].pop("bucket", None)  # not yet written to
    larger = max((taking, kept), key=Ledger.peak)
    ledger.device[START] = larger.device[START]
    if not s.on_cpu:
        host = max((taking, kept), key=lambda each: each.peak(on_host=True)).host.get(START)
        ledger.host |= {} if not host else {START: host}


def terms_of(ledgers: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Names of the terms of any moment, in the order in which they are told."""
    order = (
        "parameters",
        "gathered parameters",
        "buffers",
        "master weights",
        "optimizer",
        "average",
        "reference",
        "gradients",
        "perturbation",
        "bucket",
        "staging",
        "images",
        "activations",
        "transient",
    )
    found = {term for terms in ledgers.values() for term in terms}
    return [term for term in order if term in found]
