"""A step that went wrong, in files from which it can be repeated.

In the folder of a run::

    faults/step-00000012/
      rank-1.pt          batch, sample indices, random state and BatchNorm buffers of a rank, and
                         the config: tensors and plain types, read without running code
      model.safetensors, model.json    the weights at the start of the step, where they were there
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_ds.data import BatchPlan, PlannedBatch
from dat_ds.engine import hooks
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.exported import write_model
from dat_ds.engine.safe_loading import read_file
from dat_ds.errors import CheckpointError
from dat_ds.files import writing
from dat_ds.models.saved import WEIGHTS_NAME

FAULTS = "faults"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Reproducer:
    """What a rank keeps of a step.

    Attributes:
        kind: What was not finite: ``"loss"``, ``"gradient"`` or ``"weight"``.
        step: Optimizer step, counted from 1.
        rank: Whose batch it is.
        ranks: Ranks of the run.
        value: The loss, in words; empty where it was finite.
        samples: Dataset indices of the images that are to blame, as far as it is known.
        checkpoint: Name of the newest checkpoint before the step; None where there is none.
        total_steps: Length of the run.
        micro_batch: Images of a rank in a full micro-step.
        stronger_steps: Attack steps that the guard has changed to; 0 where it has not.
        attack_precision: Of the attack's passes.
        loss_scale: Factor on a float16 loss.
        carries: Whether the attack went on with perturbations of earlier steps, which are not kept.
        config: The run's.
        batches: Micro-batches of the step; empty where they were too large.
        random_state: Global generators at the start of the step; None where they were not kept.
        buffers: The rank's buffers then; None where they were not kept.
    """

    kind: str
    step: int
    rank: int
    ranks: int
    value: str
    samples: Sequence[int]
    checkpoint: str | None
    total_steps: int
    micro_batch: int
    stronger_steps: int
    attack_precision: str | None
    loss_scale: float
    carries: bool
    config: Mapping[str, Any]
    batches: Sequence[PlannedBatch]
    random_state: Mapping[str, Any] | None
    buffers: Mapping[str, Tensor] | None

    def write(self, file: Path) -> None:
        """Write it.

        Raises:
            CheckpointError: If that fails.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {
            "format": FORMAT,
            "samples": list(self.samples),
            "config": json.dumps(self.config),
            "batches": [_plain(batch) for batch in self.batches],
        }
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(values, file)


def read_reproducer(file: Path) -> Reproducer:
    """Read what :meth:`Reproducer.write` wrote, without running code of the file.

    Raises:
        CheckpointError: If it is missing, damaged, or something else.
    """
    values = read_file(file)
    if not isinstance(values, dict) or not {"format", "batches", "step"} <= set(values):
        raise CheckpointError(
            f"{file} is not a step that a run has kept: give RUN/{FAULTS}/step-.../rank-....pt, or "
            "its folder."
        )
    if values.pop("format") != FORMAT:
        raise CheckpointError(f"{file} was written by another version of dat_ds: replay it there.")
    try:
        values["config"] = json.loads(values["config"])
        values["batches"] = [_planned(batch) for batch in values["batches"]]
        return Reproducer(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}.") from None


def write_weights(engine: AdversarialEngine, folder: Path, limit_gib: float) -> bool:
    """Write the engine's weights of this moment as a saved model; a collective.

    Returns:
        Whether they were written: not where they are larger than ``limit_gib``.
    """
    bytes_each = max(p.element_size() for p in engine.module.parameters())
    if hooks.gathered_numel(engine.deepspeed) * bytes_each > limit_gib * 2**30:
        return False
    write_model(engine, folder)
    return True


def holds_weights(folder: Path) -> bool:
    """Whether the weights at the start of the step lie beside a reproducer."""
    return (folder / WEIGHTS_NAME).is_file()


def size_of(batches: Sequence[PlannedBatch]) -> int:
    """Bytes of images and labels."""
    return sum(x.nbytes + y.nbytes for x, y, _ in batches)


def _plain(batch: PlannedBatch) -> dict[str, Any]:
    x, y, plan = batch
    assert plan is not None
    names = ("epoch", "step", "micro_step", "first_position", "weight")
    values = {name: getattr(plan, name) for name in names}
    return {**values, "x": x.cpu(), "y": y.cpu(), "indices": list(plan.indices)}


def _planned(values: dict[str, Any]) -> PlannedBatch:
    x, y = values.pop("x"), values.pop("y")
    return x, y, BatchPlan(**{**values, "indices": tuple(values["indices"])})
