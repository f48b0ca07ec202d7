"""Whether a checkpoint is of the run that asks for it: its config and its training data.

A run may go on with other ranks, another ZeRO stage and other places of its files: the samples of
each step, the random starts of attacks and the losses stay the same. What changes the trajectory
has to be named.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dat_ds.config import RunConfig
from dat_ds.data.fingerprint import difference
from dat_ds.errors import CheckpointError
from dat_ds.finetuning import FinetuningConfig

_NOT_THE_TRAJECTORY = (
    "dat.evaluation",
    "dat.checkpoint",
    "dat.fault",
    "dat.logging",
    "dat.numerics",
    "dat.overfitting",
    "dat.engine.resident_parameters_gib",
    "dat.output_dir",
    "dat.data.path",
    "dat.data.download",
    "dat.data.damaged",
    "dat.data.most_damaged",
    "dat.data.extra.path",
    "dat.data.extra.download",
    "dat.data.num_workers",
    "dat.data.pin_memory",
    "dat.model.pretrained",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "dump_state",
    "log_level",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
)
# The global batch is compared in the place of its factors.
_WHERE_IT_RUNS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_GLOBAL_BATCH = "train_batch_size"
_DATA = "dat.data"
_GROUPS = "dat.finetuning"  # decides which elements have a state in the optimizer
_ORDER = (_DATA, "dat.seed", _GLOBAL_BATCH)  # what a position in the data is relative to
_RESHARDED_FROM = 3  # format of state.json since which a checkpoint says how it is sharded
_MISSING = object()


@dataclass(frozen=True)
class Identity:
    """What a run is known by.

    Args:
        run: Its config.
        ranks: Number of processes.
        global_batch: Samples of an optimizer step.
        data: Fingerprint of its training data; None where there is none.
    """

    run: RunConfig
    ranks: int
    global_batch: int
    data: Mapping[str, Any] | None

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint's ``state.json`` holds of it."""
        return {
            "ranks": self.ranks,
            "global_batch": self.global_batch,
            "config": self.run.to_dict(),
            "data": self.data,
        }

    def check(
        self, checkpoint: Path, state: Mapping[str, Any], changed: Collection[str] = ()
    ) -> None:
        """Refuse a checkpoint of another run.

        Args:
            checkpoint: Its folder.
            state: Its ``state.json``.
            changed: Keys of the config, or sections of it, that differ on purpose.

        Raises:
            CheckpointError: With all differences, and what to write.
        """
        differences = self._differences(state, changed)
        if differences:
            raise CheckpointError(
                f"Checkpoint {checkpoint} belongs to another run:\n"
                + "\n".join(f"  {words}" for words in differences)
                + "\nUse the config that made it; or, where a key differs on purpose, name it "
                "(dat-ds train: --changed KEY); or start a new run in another folder (dat-ds "
                "train: --set dat.output_dir=...)."
            )

    def restarts_epoch(self, changed: Collection[str]) -> bool:
        """Whether the order of the data differs on purpose, so that a new epoch has to begin."""
        if any(_is_in(name, _ORDER) for name in changed):
            return True
        return any(_is_in(key, changed) for key in _ORDER)

    def _differences(self, state: Mapping[str, Any], changed: Collection[str]) -> list[str]:
        saved, now = _flatten(state["config"]), _flatten(self.run.to_dict())
        if not any(_is_in(key, [_GROUPS]) for key in saved):
            # From before there was this section: all parameters were trained alike.
            saved |= _flatten(FinetuningConfig().to_dict(), f"{_GROUPS}.")
        free = [*_NOT_THE_TRAJECTORY, *changed]
        if state["format"] >= _RESHARDED_FROM:
            free += _WHERE_IT_RUNS
            saved[_GLOBAL_BATCH], now[_GLOBAL_BATCH] = state["global_batch"], self.global_batch
        else:
            saved["ranks"], now["ranks"] = state["ranks"], self.ranks
        unknown = [name for name in changed if not any(_is_in(key, [name]) for key in saved | now)]
        if unknown:
            raise CheckpointError(
                f"--changed {unknown[0]}: the config has no such key or section. Write one such as "
                "dat.schedule or optimizer.params.lr."
            )
        tuned = [key for key in sorted(saved.keys() | now.keys()) if _is_in(key, [_GROUPS])]
        tuned = [key for key in tuned if saved.get(key, _MISSING) != now.get(key, _MISSING)]
        if any(_is_in(key, changed) for key in tuned):
            raise CheckpointError(
                f"--changed: {tuned[0]} differs, which decides what parameters have a state in the "
                "optimizer, so a run goes on with that of its checkpoint. Start a new run from its "
                "weights: dat.model.pretrained=RUN."
            )
        found = [
            f"{key}: checkpoint {_shown(saved.get(key, _MISSING))}, "
            f"this run {_shown(now.get(key, _MISSING))}"
            for key in sorted(saved.keys() | now.keys())
            if saved.get(key, _MISSING) != now.get(key, _MISSING) and not _is_in(key, free)
        ]
        data = difference(state.get("data"), self.data)
        if data is not None and not _is_in(_DATA, changed):
            found.append(f"{_DATA}: other training data: {data}")
        return found


def _shown(value: Any) -> str:
    return "has none" if value is _MISSING else repr(value)


def _is_in(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of ``names`` or lies in one of them."""
    return any(key == name or key.startswith(name + ".") for name in names)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
