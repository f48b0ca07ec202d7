"""Metrics of an optimizer step: sums kept on the device, read by the host only when asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dat_ds.attacks import InputGradient
from dat_ds.minmax.batch import MicroBatch
from dat_ds.minmax.outer import OuterTerms


class PhaseTimer:
    """Seconds spent in named phases, without synchronising the device while they run.

    Args:
        device: On CUDA, phases are timed by events on its stream; elsewhere by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []
        self._open: tuple[str, object] | None = None

    def enter(self, phase: str) -> None:
        """End the running phase, if any, and start ``phase``."""
        now = self._stamp()
        self._close(now)
        self._open = (phase, now)

    def leave(self) -> None:
        """End the running phase."""
        if self._open is not None:
            self._close(self._stamp())
            self._open = None

    def _close(self, now: object) -> None:
        if self._open is not None:
            self._spans.append((*self._open, now))

    def _stamp(self) -> object:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event
        return time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far; waits for the device."""
        totals: dict[str, float] = {}
        for phase, start, end in self._spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1000
            else:
                assert isinstance(start, float)
                assert isinstance(end, float)
                elapsed = end - start
            totals[phase] = totals.get(phase, 0.0) + elapsed
        return totals


@dataclass
class StepMetrics:
    """Metrics of this rank, over the micro-steps of one or several optimizer steps.

    Losses are weighted as the gradient is (see :class:`dat_ds.data.BatchPlan`), so the mean over
    ranks of :attr:`terms` is the mean over the global batch.
    """

    timer: PhaseTimer
    gradient: InputGradient
    terms: dict[str, Tensor] = field(default_factory=dict)
    num_correct_adv: Tensor | float = 0.0
    num_adv: Tensor | int = 0
    num_correct_natural: Tensor | float = 0.0
    num_natural: Tensor | int = 0
    bytes_sent: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    attack_parameter_gathers: int = 0

    def add(
        self, outer: OuterTerms, part: MicroBatch, *, factor: float, classifies: bool, natural: bool
    ) -> None:
        """Add what the outer forward of a micro-batch found.

        Args:
            outer: The objective's terms and outputs.
            part: Their micro-batch.
            factor: Of its terms in the sums.
            classifies: Whether outputs are logits of the classes that labels name.
            natural: Whether training is natural, so that the outputs are those of natural images.
        """
        self.add_terms(outer.terms, factor)
        if part.num_images == 0 or not classifies:
            return
        logits = outer.logits_adv if natural else outer.logits
        if logits is not None:
            self.add_natural(*num_correct(logits, part.y, part.labelled))
        if not natural:
            self.add_robust(*num_correct(outer.logits_adv, part.y, part.labelled))

    def add_terms(self, terms: dict[str, Tensor], factor: float) -> None:
        """Add ``factor * term`` of each named term."""
        for name, value in terms.items():
            scaled = value.detach() * factor
            self.terms[name] = self.terms[name] + scaled if name in self.terms else scaled

    def add_natural(self, num_correct: Tensor, count: Tensor | int) -> None:
        """Add correctly classified natural images out of ``count``."""
        self.num_correct_natural = self.num_correct_natural + num_correct
        self.num_natural = self.num_natural + count

    def add_robust(self, num_correct: Tensor, count: Tensor | int) -> None:
        """Add correctly classified adversarial images out of ``count``."""
        self.num_correct_adv = self.num_correct_adv + num_correct
        self.num_adv = self.num_adv + count

    def sums(self) -> Tensor:
        """Sums for averaging over ranks, float64 on the CPU, in the order of :meth:`means`."""
        counters = [
            self.num_correct_adv,
            self.num_adv,
            self.num_correct_natural,
            self.num_natural,
            0.0 if self.gradient.num_zero is None else self.gradient.num_zero,
            self.gradient.num_entries,
            0.0 if self.gradient.num_non_finite is None else self.gradient.num_non_finite,
            self.gradient.num_samples,
        ]
        return torch.tensor(
            [*(float(v) for v in self.terms.values()), *(float(v) for v in counters)],
            dtype=torch.float64,
        )

    def means(self, sums: Tensor, count: int) -> dict[str, float | None]:
        """Named means from :meth:`sums`, summed over ranks.

        Args:
            sums: The sums.
            count: Divisor of the sums of terms: the number of ranks, where factors add up
                to 1 on each.

        Returns:
            The objective's terms; ``natural_acc`` and ``robust_acc``, fractions in [0, 1], None
            where no such logits were computed; ``attack_zero_share``, share of attack gradient
            entries that were exactly zero; ``attack_nonfinite_share``, share of samples whose
            attack gradient was not finite.
        """
        values = sums.tolist()
        terms: dict[str, float | None] = {
            name: values[i] / count for i, name in enumerate(self.terms)
        }
        robust, num_adv, natural, num_natural, zero, entries, bad, samples = values[len(terms) :]
        return terms | {
            "natural_acc": natural / num_natural if num_natural else None,
            "robust_acc": robust / num_adv if num_adv else None,
            "attack_zero_share": zero / entries if entries else 0.0,
            "attack_nonfinite_share": bad / samples if samples else 0.0,
        }

    def local(self) -> dict[str, float | int]:
        """This rank's seconds, bytes and counts."""
        seconds = self.timer.seconds()
        return {
            "seconds_attack": seconds.get("attack", 0.0),
            "seconds_update": seconds.get("update", 0.0),
            "attack_retries": self.gradient.num_retries,
            "attack_parameter_gathers": self.attack_parameter_gathers,
            "parameter_gathers": self.collectives.get("parameters", 0),
        }


@torch.no_grad()
def num_correct(
    logits: Tensor, y: Tensor, labelled: Tensor | None = None
) -> tuple[Tensor, Tensor | int]:
    """Correct images and how many count: those whose true class is known.

    Args:
        logits: Logits of one or several views of the images ``(n B, K)``.
        y: Class indices ``(B,)``, or probabilities ``(B, K)``, of which the likeliest counts.
        labelled: Which images count ``(B,)``; None for all.
    """
    classes = y.argmax(dim=1) if y.is_floating_point() else y
    correct = logits.argmax(dim=1).view(-1, len(y)) == classes
    if labelled is None:
        return correct.sum(), correct.numel()
    return (correct & labelled).sum(), labelled.sum() * len(correct)
