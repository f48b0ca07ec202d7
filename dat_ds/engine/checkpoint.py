"""Checkpoints of a run: complete, exact, and never half written.

In a folder of :class:`dat_ds.checkpoints.CheckpointFolder`::

    step-00000120/    DeepSpeed's files (parameters, optimizer, schedule, loss scale), and
      rank-0.pt ...   what every rank has of its own: random state, BatchNorm buffers, EMA,
                      error feedback, what the attack carries along, the user's client state
      state.json      step, ranks, config, data position, state of the trainer
      manifest.json   size and SHA-256 of every other file
      model.safetensors, model.json    the model alone, for dat_ds.models.load
      reference/      the model as it was at the start, where the objective needs it
"""

from __future__ import annotations

import functools
import io
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import safe_open
from torch import Tensor

from dat_ds.checkpoints import (
    FORMAT,
    PARTIAL,
    STATE,
    CheckpointFolder,
    check_name,
    damage_in_words,
    damage_of,
    described,
    files_in,
    name_of_step,
    read_state,
    write_manifest,
)
from dat_ds.config import RunConfig
from dat_ds.engine import hooks
from dat_ds.engine.exported import exported_weights
from dat_ds.engine.random_state import random_state, restore_random_state
from dat_ds.engine.safe_loading import read_file
from dat_ds.errors import CheckpointError, NumericsError
from dat_ds.files import write_json
from dat_ds.models import PixelModel, save_weights
from dat_ds.models.pretrained import read_weights
from dat_ds.models.saved import WEIGHTS_NAME
from dat_ds.ranks import Ranks

if TYPE_CHECKING:
    from dat_ds.engine.adversarial import AdversarialEngine

logger = logging.getLogger("dat_ds")

REFERENCE = "reference"
_LISTED = 8
# May differ between a run and its continuation: they do not change the trajectory.
_FREE_KEYS = (
    "dat.evaluation",
    "dat.checkpoint",
    "dat.logging",
    "dat.numerics",
    "dat.overfitting",
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


def tell_of_partial_checkpoints(engine: DeepSpeedEngine) -> None:
    """Have DeepSpeed's own ``save_checkpoint`` say, once, what it leaves out.

    Args:
        engine: DeepSpeed's engine.
    """

    @functools.wraps(engine.save_checkpoint)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        vars(engine).pop("save_checkpoint", None)  # uncovers the class's own
        logger.warning(
            "engine.deepspeed.save_checkpoint leaves out what DeepSpeed does not know of, such as "
            "carried perturbations, the errors of compression, the average of the weights and the "
            "loader's position: call engine.save_checkpoint, and engine.load_checkpoint."
        )
        return engine.save_checkpoint(*args, **kwargs)

    vars(engine)["save_checkpoint"] = save_checkpoint


def damage_by_ranks(checkpoint: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint's files, each read by one rank; a collective.

    Returns:
        Sentences, the same on all ranks; empty where every file is as it was written.
    """
    own = damage_of(checkpoint, first=ranks.rank, every=ranks.count)
    shards = cast("list[list[str]]", ranks.gather(own))
    return list(dict.fromkeys(problem for shard in shards for problem in shard))


class Checkpoints(CheckpointFolder):
    """The checkpoints of one run.

    Args:
        folder: ``<run>/checkpoints``, or a folder of the user's own.
        keep: Newest checkpoints to keep; None for all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        super().__init__(folder)
        self._keep = keep

    def save(
        self,
        engine: AdversarialEngine,
        state: Mapping[str, Any],
        *,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint of this moment; a collective.

        It is written beside the earlier ones and renamed when complete, so a crash or a full disk
        never costs an earlier checkpoint.

        Args:
            engine: The engine, between two optimizer steps.
            state: JSON-serialisable state of the training loop.
            tag: Name of the checkpoint; None for ``step-`` and the number of steps.
            client_state: What this rank wants back: plain types and tensors.

        Returns:
            Folder of the checkpoint.

        Raises:
            CheckpointError: In the middle of an optimizer step, for a tag or client state that
                cannot be written, or if there is no room or the files cannot be written.
            DataError: If a batch since the last look held a faulty image or label.
            NumericsError: If weights are not finite.
        """
        ranks, partial = engine.ranks, self.folder / PARTIAL
        name = name_of_step(engine.global_steps) if tag is None else tag
        with ranks.together():
            refuse_mid_step(engine)
            check_name(name)
            _check_client_state(client_state)
        _refuse_different_places(engine, self.folder / name)
        engine.watch.check()
        with exported_weights(engine):
            model_state = hooks.full_state_dict(engine.deepspeed)
        self._refuse_damage(engine, model_state)
        with ranks.together():
            if ranks.is_main:
                self._make_room(partial, engine)
        try:
            DeepSpeedEngine.save_checkpoint(
                engine.deepspeed, str(partial), tag=name, save_latest=False
            )
            own = {**_rank_state(engine), "client_state": dict(client_state or {})}
            torch.save(own, partial / name / f"rank-{ranks.rank}.pt")
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
                "intact: make room and continue from the newest (dat-ds train: --resume auto)."
            ) from None
        ranks.barrier()  # until every rank's files are there
        with ranks.together():
            if ranks.is_main:
                written = {
                    "format": FORMAT,
                    "step": engine.global_steps,
                    "ranks": ranks.count,
                    "config": engine.run.to_dict(),
                    "data_position": engine.data_position,
                }
                write_json(partial / name / STATE, {**written, **state})
        self._seal(partial / name, ranks)
        with ranks.together():
            if ranks.is_main:
                self.publish(partial / name)
                if self._keep is not None:
                    self.prune(self._keep)
        return self.folder / name

    @staticmethod
    def _seal(complete: Path, ranks: Ranks) -> None:
        """Write the manifest of a checkpoint, each rank having read its share; a collective."""
        own: dict[str, dict[str, Any]] = {}
        with ranks.together():
            own = described(complete, files_in(complete)[ranks.rank :: ranks.count])
        shards = cast("list[dict[str, dict[str, Any]]]", ranks.gather(own))
        with ranks.together():
            if ranks.is_main:
                write_manifest(complete, {k: v for shard in shards for k, v in shard.items()})

    def save_best(self, engine: AdversarialEngine) -> None:
        """Keep the model alone as the best so far; a collective."""
        with exported_weights(engine):
            model_state = hooks.full_state_dict(engine.deepspeed)
        with engine.ranks.together():
            if engine.ranks.is_main:
                _save_model(self.best_folder, engine, model_state)

    def load(
        self, checkpoint: Path, engine: AdversarialEngine, *, verified: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Continue ``engine``, with all that belongs to it, from a checkpoint; a collective.

        Args:
            checkpoint: Its folder.
            engine: The engine, between two optimizer steps.
            verified: Whether its files have been compared with its manifest already.

        Returns:
            The state of the training loop that was saved with it, and this rank's client state.

        Raises:
            CheckpointError: If it is damaged, incomplete or belongs to another run, with all
                differences; the engine is then as before.
        """
        ranks = engine.ranks
        with ranks.together():
            refuse_mid_step(engine)
            state = read_state(checkpoint)
        damage = [] if verified else damage_by_ranks(checkpoint, ranks)
        with ranks.together():
            if damage:
                raise CheckpointError(self._damaged(checkpoint, damage))
            _check_identity(checkpoint, state, engine.run, ranks.count)
            _check_complete(checkpoint, engine)
            _check_model(checkpoint, engine)
            own = read_file(checkpoint / f"rank-{ranks.rank}.pt")
            if engine.ema is not None and own["ema"] is None:  # one for all ranks
                own["ema"] = read_file(checkpoint / "rank-0.pt")["ema"]
            engine.move_loader(state["step"], state.get("data_position", {}))
        place, _ = engine.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if place is None:
            raise CheckpointError(f"Checkpoint {checkpoint} is incomplete: DeepSpeed reads none.")
        _restore_rank_state(own, engine)
        if engine.reference is not None:
            # Not what the model was made from this time, but what the run started with.
            file = checkpoint / REFERENCE / WEIGHTS_NAME
            engine.reference.load_state_dict(read_weights(file))
        return state, own.get("client_state", {})

    def _damaged(self, checkpoint: Path, damage: list[str]) -> str:
        others = [path.name for path in self.newest_first() if path != checkpoint]
        there = f" Others in {self.folder}: {', '.join(others)}." if others else ""
        return damage_in_words(checkpoint, damage) + there

    def _refuse_damage(self, engine: AdversarialEngine, model_state: Mapping[str, Tensor]) -> None:
        """Refuse to put a damaged run in the place of a good checkpoint; a collective.

        Whatever has to hold before a checkpoint is written is checked here.

        Args:
            engine: The engine, between two optimizer steps.
            model_state: The model alone, on the main rank.

        Raises:
            NumericsError: If weights are not finite.
        """
        finite = all(bool(t.isfinite().all()) for t in model_state.values())
        finite &= hooks.weights_are_finite(engine.deepspeed)  # which an average may not show yet
        if engine.ranks.max(not finite):
            raise NumericsError(
                f"Weights are not finite after step {engine.global_steps}, so no checkpoint is "
                f"written. {self.latest_in_words()} Usual causes: a learning rate that is too "
                "high, or too short a warm-up."
            )

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
                "continue from the newest (dat-ds train: --resume auto)."
            )


def refuse_mid_step(engine: AdversarialEngine) -> None:
    """Refuse to save or load in the middle of an optimizer step.

    Raises:
        CheckpointError: With how much of the step is done.
    """
    if engine.is_mid_step:
        raise CheckpointError(
            f"In the middle of optimizer step {engine.global_steps + 1} ({engine.micro_step} of "
            f"{engine.accumulation} micro-steps done, with gradients or perturbed weights that a "
            "checkpoint does not hold): call it after the engine.step() that ends the step."
        )


def _check_client_state(client_state: object) -> None:
    """Refuse at once what could not be read again without running code of the file."""
    if client_state is None:
        return
    if not isinstance(client_state, Mapping):
        raise CheckpointError(
            f"client_state is of class {type(client_state).__name__}: give a dict."
        )
    for key, value in client_state.items():
        file = io.BytesIO()
        try:
            torch.save({key: value}, file)
            file.seek(0)
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # whatever pickling the user's objects raises
            raise CheckpointError(
                f"client_state[{key!r}] is of class {type(value).__name__}: give numbers, texts, "
                "tensors, and lists, tuples and dicts of them, such as a state_dict()."
            ) from None


def _refuse_different_places(engine: AdversarialEngine, place: Path) -> None:
    places = engine.ranks.gather(str(place))
    for rank, other in enumerate(places):
        if other != places[0]:
            raise CheckpointError(
                f"Ranks name different checkpoints, rank 0 {places[0]} and rank {rank} {other}: "
                "give one folder and tag, on a file system that all ranks share."
            )


def _check_complete(checkpoint: Path, engine: AdversarialEngine) -> None:
    needed = [f"rank-{engine.ranks.rank}.pt", WEIGHTS_NAME]
    if engine.reference is not None:
        needed.append(f"{REFERENCE}/{WEIGHTS_NAME}")
    for name in needed:
        if not (checkpoint / name).exists():
            raise CheckpointError(f"Checkpoint {checkpoint} is incomplete: {name} is missing.")


def _check_model(checkpoint: Path, engine: AdversarialEngine) -> None:
    with safe_open(checkpoint / WEIGHTS_NAME, "pt") as file:  # reads no weight
        saved = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    now = {
        name: list(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3's are sharded
        for name, tensor in engine.module.state_dict(keep_vars=True).items()
    }
    none = "has none"
    differences = [
        f"  {name}: checkpoint {saved.get(name, none)}, this model {now.get(name, none)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if differences:
        listed = "\n".join(differences[:_LISTED])
        more = len(differences) - _LISTED
        raise CheckpointError(
            f"Checkpoint {checkpoint} is of another model:\n{listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )


def _is_write_error(error: OSError | RuntimeError) -> bool:
    """Whether a file could not be written, and not a rank that died meanwhile."""
    # torch's writer reports a full disk as a RuntimeError of its own.
    return isinstance(error, OSError) or any(
        words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "file write")
    )


def _save_model(folder: Path, engine: AdversarialEngine, state: Mapping[str, Tensor]) -> None:
    spec = engine.module.spec if isinstance(engine.module, PixelModel) else {}
    save_weights(folder, state, spec)


def _rank_state(engine: AdversarialEngine) -> dict[str, Any]:
    ema = engine.ema
    state: dict[str, Any] = {
        **random_state(engine.ranks.device),
        "buffers": {name: b.detach().cpu() for name, b in engine.module.named_buffers()},
        "ema": ema.state_dict() if ema is not None and _holds_ema(engine) else None,
        "strategy": engine.inner.strategy.state_dict(),
        "attack_precision": engine.attack_precision,
    }
    if engine.averaging_optimizer is not None:
        state["optimizer"] = engine.averaging_optimizer.rank_state_dict()
    if engine.compression is not None:
        state["compression"] = engine.compression.state_dict()
    return state


def _holds_ema(engine: AdversarialEngine) -> bool:
    """Whether this rank writes the average: its own where weights differ, else one for all."""
    is_own = engine.run.zero_stage == 3 or engine.replicas_differ
    return is_own or engine.ranks.is_main


@torch.no_grad()
def _restore_rank_state(state: Mapping[str, Any], engine: AdversarialEngine) -> None:
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(state["buffers"][name])
    if engine.ema is not None and state["ema"] is not None:
        engine.ema.load_state_dict(state["ema"])
    if engine.averaging_optimizer is not None:
        engine.averaging_optimizer.load_rank_state_dict(state["optimizer"])
        hooks.copy_master_weights(engine.deepspeed)
    if engine.compression is not None:
        engine.compression.load_state_dict(state["compression"])
    # Until 2026 "free" held what the strategy of that name carries along, and None for others.
    carried = state["strategy"] if "strategy" in state else state["free"]
    engine.inner.strategy.load_state_dict(carried or {})
    engine.inner.precision = state["attack_precision"]
    restore_random_state(state, engine.ranks.device)


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
            "Use the config that made it, or start a new run in another folder (dat-ds train: "
            "--set dat.output_dir=...)."
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
