"""Checkpoints of a run: complete, exact, and never half written.

``<run>/checkpoints/``::

    latest            name of the newest complete checkpoint
    step-00000120/    DeepSpeed's files (parameters, optimizer, schedule, loss scale), and
      rank-0.pt ...   what every rank has of its own: random state, BatchNorm buffers, EMA,
                      error feedback
      state.json      step, ranks, config, best validation so far
      model.safetensors, model.json    the model alone, for dat_ds.models.load
  reference/      the model as it was at the start, where the objective needs it
    best/             model.safetensors, model.json of the best validation
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_ds.config import RunConfig
from dat_ds.engine import hooks
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.errors import CheckpointError
from dat_ds.files import replace_text, write_json, writing
from dat_ds.models import PixelModel, save_weights
from dat_ds.models.pretrained import read_weights
from dat_ds.models.saved import WEIGHTS_NAME
from dat_ds.optim import WeightEma

REFERENCE = "reference"
_FORMAT = 1
# May differ between a run and its continuation: they do not change the trajectory.
_FREE_KEYS = (
    "dat.evaluation",
    "dat.checkpoint",
    "dat.logging",
    "dat.engine.resident_parameters_gib",
    "dat.output_dir",
    "dat.data.path",
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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``<run>/checkpoints``.
        keep: Newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    @property
    def best_folder(self) -> Path:
        """Where the best model is kept."""
        return self.folder / "best"

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where there is none."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        return self.folder / pointer.read_text(encoding="utf-8").strip()

    def save(
        self,
        engine: AdversarialEngine,
        ema: WeightEma | None,
        state: Mapping[str, Any],
        model_state: Mapping[str, Tensor],
    ) -> None:
        """Write a checkpoint of this moment; a collective.

        It is written beside the earlier ones and renamed when complete, so a crash or a full disk
        never costs an earlier checkpoint.

        Args:
            engine: The engine, between two optimizer steps.
            ema: Its weight average.
            state: JSON-serialisable state of the training loop.
            model_state: The model alone, on rank 0.

        Raises:
            CheckpointError: If there is no room or the files cannot be written.
        """
        ranks, name = engine.ranks, f"step-{engine.global_steps:08d}"
        partial = self.folder / ".partial"
        with ranks.together():
            if ranks.is_main:
                self._make_room(partial, engine)
        try:
            engine.deepspeed.save_checkpoint(str(partial), tag=name, save_latest=False)
            torch.save(_rank_state(engine, ema), partial / name / f"rank-{ranks.rank}.pt")
            if ranks.is_main:
                _save_model(partial / name, engine, model_state)
                if engine.reference is not None:
                    reference = engine.reference.state_dict()
                    _save_model(partial / name / REFERENCE, engine, reference)
        except (OSError, RuntimeError) as error:
            if not _is_write_error(error):
                raise
            raise CheckpointError(
                f"Cannot write a checkpoint into {partial}: {error}. Earlier checkpoints are "
                "intact: make room and repeat the command with --resume auto."
            ) from None
        with ranks.together():
            if ranks.is_main:
                identity = {"format": _FORMAT, "step": engine.global_steps, "ranks": ranks.count}
                config = engine.run.to_dict()
                write_json(partial / name / "state.json", {**identity, "config": config, **state})
        with ranks.together():
            if ranks.is_main:
                self._publish(partial / name)

    def save_best(self, engine: AdversarialEngine, model_state: Mapping[str, Tensor]) -> None:
        """Keep the model alone as the best so far; a collective."""
        with engine.ranks.together():
            if engine.ranks.is_main:
                _save_model(self.best_folder, engine, model_state)

    def load(
        self, checkpoint: Path, engine: AdversarialEngine, ema: WeightEma | None
    ) -> dict[str, Any]:
        """Continue ``engine`` and ``ema`` from a checkpoint; a collective.

        Returns:
            The state of the training loop that was saved with it.

        Raises:
            CheckpointError: If it is incomplete or belongs to another run, with all differences.
        """
        ranks = engine.ranks
        with ranks.together():
            state = read_state(checkpoint)
            _check_identity(checkpoint, state, engine.run, ranks.count)
            rank_file = checkpoint / f"rank-{ranks.rank}.pt"
            if not rank_file.exists():
                raise CheckpointError(f"Checkpoint {checkpoint} is incomplete: {rank_file.name}.")
            if engine.reference is not None and not (checkpoint / REFERENCE).exists():
                raise CheckpointError(f"Checkpoint {checkpoint} is incomplete: {REFERENCE}.")
        engine.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        own = torch.load(rank_file, map_location="cpu", weights_only=True)
        if ema is not None and not _holds_ema(engine):
            main = torch.load(checkpoint / "rank-0.pt", map_location="cpu", weights_only=True)
            own["ema"] = main["ema"]
        _restore_rank_state(own, engine, ema)
        if engine.reference is not None:
            # Not what the model was made from this time, but what the run started with.
            file = checkpoint / REFERENCE / WEIGHTS_NAME
            engine.reference.load_state_dict(read_weights(file))
        return state

    def _make_room(self, partial: Path, engine: AdversarialEngine) -> None:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"Cannot make {partial}: {error.strerror}.") from None
        # In float32: parameters, master weights, two moments, the average, the exported model, and
        # the reference.
        needed = (6 + (engine.reference is not None)) * hooks.gathered_numel(engine.deepspeed) * 4
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise CheckpointError(
                f"No room for a checkpoint in {self.folder}: it takes about {needed / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free. Earlier checkpoints are intact: make room and "
                "repeat the command with --resume auto."
            )

    def _publish(self, complete: Path) -> None:
        final = self.folder / complete.name
        shutil.rmtree(final, ignore_errors=True)
        with writing(final):
            os.replace(complete, final)
        replace_text(self.folder / "latest", final.name)
        for old in sorted(self.folder.glob("step-*"))[: -self._keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)


def _is_write_error(error: OSError | RuntimeError) -> bool:
    """Whether a file could not be written, and not a rank that died meanwhile."""
    # torch's writer reports a full disk as a RuntimeError of its own.
    return isinstance(error, OSError) or any(
        words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "file write")
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: If it is missing or unreadable.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint of dat_ds: {error}.") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{checkpoint}/state.json has a format this version cannot read.")
    return state


def _save_model(folder: Path, engine: AdversarialEngine, state: Mapping[str, Tensor]) -> None:
    spec = engine.module.spec if isinstance(engine.module, PixelModel) else {}
    save_weights(folder, state, spec)


def _rank_state(engine: AdversarialEngine, ema: WeightEma | None) -> dict[str, Any]:
    state: dict[str, Any] = {
        "rng_cpu": torch.get_rng_state(),
        "buffers": {name: b.detach().cpu() for name, b in engine.module.named_buffers()},
        "ema": ema.state_dict() if ema is not None and _holds_ema(engine) else None,
        "strategy": engine.inner.strategy.state_dict(),
        "attack_precision": engine.attack_precision,
    }
    if engine.averaging_optimizer is not None:
        state["optimizer"] = engine.averaging_optimizer.rank_state_dict()
    if engine.compression is not None:
        state["compression"] = engine.compression.state_dict()
    if engine.ranks.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(engine.ranks.device)
    return state


def _holds_ema(engine: AdversarialEngine) -> bool:
    """Whether this rank writes the average: its own where weights differ, else one for all."""
    is_own = engine.run.zero_stage == 3 or engine.replicas_differ
    return is_own or engine.ranks.is_main


@torch.no_grad()
def _restore_rank_state(
    state: Mapping[str, Any], engine: AdversarialEngine, ema: WeightEma | None
) -> None:
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(state["buffers"][name])
    if ema is not None and state["ema"] is not None:
        ema.load_state_dict(state["ema"])
    if engine.averaging_optimizer is not None:
        engine.averaging_optimizer.load_rank_state_dict(state["optimizer"])
        hooks.copy_master_weights(engine.deepspeed)
    if engine.compression is not None:
        engine.compression.load_state_dict(state["compression"])
    # Until 2026 "free" held what the strategy of that name carries along, and None for others.
    carried = state["strategy"] if "strategy" in state else state["free"]
    engine.inner.strategy.load_state_dict(carried or {})
    engine.inner.precision = state["attack_precision"]
    torch.set_rng_state(state["rng_cpu"])
    if "rng_cuda" in state and engine.ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng_cuda"], engine.ranks.device)


def _check_identity(checkpoint: Path, state: Mapping[str, Any], run: RunConfig, ranks: int) -> None:
    saved, now = _flatten(state["config"]), _flatten(run.to_dict())
    saved["ranks"], now["ranks"] = state["ranks"], ranks
    missing = object()
    differences = [
        f"  {key}: checkpoint {_shown(saved.get(key, missing), missing)}, "
        f"this run {_shown(now.get(key, missing), missing)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key, missing) != now.get(key, missing) and not _is_free(key)
    ]
    if differences:
        raise CheckpointError(
            f"Checkpoint {checkpoint} belongs to another run:\n" + "\n".join(differences) + "\n"
            "Repeat the command that made it, or start a new run with --set dat.output_dir=..."
        )


def _shown(value: Any, missing: object) -> str:
    return "has none" if value is missing else repr(value)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in _FREE_KEYS)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
