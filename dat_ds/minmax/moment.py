"""Where in the run a micro-batch is, and the random numbers that are drawn there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dat_ds.attacks import SampleGenerator

Stream = Literal["start", "probe", "views"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A micro-batch's place in the run: the only maker of random streams in training.

    Attributes:
        seed: Of the run.
        step: Optimizer steps done.
        progress: Share of the run that is done, in [0, 1].
        slot: Micro-steps done since the last optimizer step.
        first_image: Index of the micro-batch's first image within the step's global batch.
        indices: Those of all its images, where they do not follow one another.
    """

    seed: int
    step: int
    progress: float = 0.0
    slot: int = 0
    first_image: int = 0
    indices: Sequence[int] | None = None

    def generator(self, stream: Stream) -> SampleGenerator:
        """The beginning of a stream: a function of the run's seed, the step and each image's index.

        Args:
            stream: ``"start"`` of an attack, GradAlign's ``"probe"``, or the ``"views"`` that an
                objective makes of its images: draws that must not be one another's.
        """
        return SampleGenerator(self.seed, self.step, self.first_image, self.indices, stream)
