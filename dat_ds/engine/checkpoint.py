"""Checkpoints of a run: complete, exact, and never half written.

``<run>/checkpoints/``, or a folder of the user's own::

    latest            name of the newest complete checkpoint
    step-00000120/    DeepSpeed's files (parameters, optimizer, schedule, loss scale), and
      rank-0.pt ...   what every rank has of its own: random state, BatchNorm buffers, EMA,
                      error feedback, what the attack carries along, the user's client state
      state.json      step, ranks, config, data position, sizes of the files, state of the trainer
      model.safetensors, model.json    the model alone, for dat_ds.models.load
  reference/      the model as it was at the start, where the objective needs it
    best/             model.safetensors, model.json of the best validation
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import safe_open
from torch import Tensor

from dat_ds.config import RunConfig
from dat_ds.engine import hooks
from dat_ds.engine.exported import exported_weights
from dat_ds.engine.random_state import random_state, restore_random_state
from dat_ds.errors import CheckpointError, NumericsError
from dat_ds.files import replace_text, write_json, writing
from dat_ds.models import PixelModel, save_weights
from dat_ds.models.pretrained import read_weights
from dat_ds.models.saved import WEIGHTS_NAME

if TYPE_CHECKING:
    from dat_ds.engine.adversarial import AdversarialEngine

logger = logging.getLogger("dat_ds")

REFERENCE = "reference"
_FORMAT = 1
_LISTED = 8
_PARTIAL, _REPLACED = ".partial", ".replaced"
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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``<run>/checkpoints``, or a folder of the user's own.
        keep: Newest checkpoints to keep; None for all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
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

    def latest_in_words(self) -> str:
        """A sentence that says where the newest checkpoint is."""
        latest = self.latest()
        return "No checkpoint was written yet." if latest is None else f"Last checkpoint: {latest}."

    def named(self, tag: str | None) -> Path:
        """The checkpoint ``tag``, or the newest one.

        Raises:
            CheckpointError: If there is no such checkpoint, with those that there are.
        """
        if tag is not None:
            _check_name(tag)
        checkpoint = self.latest() if tag is None else self.folder / tag
        if checkpoint is not None and checkpoint.is_dir():
            return checkpoint
        if (self.folder / "state.json").exists():
            raise CheckpointError(
                f"{self.folder} is one checkpoint: write the folder that it lies in, "
                f"{str(self.folder.parent)!r}, and tag={self.folder.name!r}."
            )
        what = "no checkpoint" if checkpoint is None else f"no checkpoint {checkpoint.name!r}"
        there = sorted(path.parent.name for path in self.folder.glob("*/state.json"))
        known = f"it has {', '.join(there)}" if there else "nor any other"
        raise CheckpointError(f"There is {what} in {self.folder} ({known}).")

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
        ranks, partial = engine.ranks, self.folder / _PARTIAL
        name = f"step-{engine.global_steps:08d}" if tag is None else tag
        with ranks.together():
            refuse_mid_step(engine)
            _check_name(name)
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
                    "format": _FORMAT,
                    "step": engine.global_steps,
                    "ranks": ranks.count,
                    "config": engine.run.to_dict(),
                    "data_position": engine.data_position,
                    "files": _sizes(partial / name),
                }
                write_json(partial / name / "state.json", {**written, **state})
        with ranks.together():
            if ranks.is_main:
                self._publish(partial / name)
        return self.folder / name

    def save_best(self, engine: AdversarialEngine) -> None:
        """Keep the model alone as the best so far; a collective."""
        with exported_weights(engine):
            model_state = hooks.full_state_dict(engine.deepspeed)
        with engine.ranks.together():
            if engine.ranks.is_main:
                _save_model(self.best_folder, engine, model_state)

    def load(
        self, checkpoint: Path, engine: AdversarialEngine
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Continue ``engine``, with all that belongs to it, from a checkpoint; a collective.

        Returns:
            The state of the training loop that was saved with it, and this rank's client state.

        Raises:
            CheckpointError: If it is incomplete or belongs to another run, with all differences;
                the engine is then as before.
        """
        ranks = engine.ranks
        with ranks.together():
            refuse_mid_step(engine)
            state = read_state(checkpoint)
            _check_identity(checkpoint, state, engine.run, ranks.count)
            _check_complete(checkpoint, state, engine)
            _check_model(checkpoint, engine)
            own = _read_rank_state(checkpoint / f"rank-{ranks.rank}.pt")
            if engine.ema is not None and own["ema"] is None:  # one for all ranks
                own["ema"] = _read_rank_state(checkpoint / "rank-0.pt")["ema"]
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

    def _publish(self, complete: Path) -> None:
        final, replaced = self.folder / complete.name, self.folder / _REPLACED
        with writing(final):
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                os.replace(final, replaced)
            os.replace(complete, final)
        replace_text(self.folder / "latest", final.name)
        shutil.rmtree(replaced, ignore_errors=True)
        if self._keep is None:
            return
        for old in sorted(self.folder.glob("step-*"))[: -self._keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)


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


def _check_name(tag: object) -> None:
    if not isinstance(tag, str) or not re.fullmatch(r"[\w-][\w.=+-]*", tag) or tag == "latest":
        raise CheckpointError(
            f"tag={tag!r} cannot name a checkpoint: write letters, digits, '-', '_' and '.', such "
            "as 'epoch-3', and not 'latest'."
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


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in ``folder``, by its name there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_complete(checkpoint: Path, state: Mapping[str, Any], engine: AdversarialEngine) -> None:
    # Checkpoints of earlier versions do not list their files.
    needed = dict.fromkeys([f"rank-{engine.ranks.rank}.pt", WEIGHTS_NAME]) | state.get("files", {})
    if engine.reference is not None:
        needed.setdefault(f"{REFERENCE}/{WEIGHTS_NAME}", None)
    for name, size in needed.items():
        file = checkpoint / name
        if not file.exists():
            raise CheckpointError(f"Checkpoint {checkpoint} is incomplete: {name} is missing.")
        if size is not None and file.stat().st_size != size:
            raise CheckpointError(
                f"Checkpoint {checkpoint} is incomplete: {name} has {file.stat().st_size} of "
                f"{size} bytes."
            )


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


def _read_rank_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"Cannot read {file}: {reason}. The file is damaged.") from None
    return state


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
