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
import json
import logging
import shutil
from collections.abc import Collection, Mapping
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
    name_of_step,
    read_state,
    write_manifest,
)
from dat_ds.engine import hooks
from dat_ds.engine.checkpoint_writer import CheckpointWriter, Job, deepspeeds_files, snapshot
from dat_ds.engine.exported import exported_state, exported_weights, spec_of, write_model
from dat_ds.engine.rank_state import leave_behind, rank_state, restore_rank_state
from dat_ds.engine.resharding import is_resharded, load_resharded
from dat_ds.engine.safe_loading import read_file
from dat_ds.errors import CheckpointError, NumericsError
from dat_ds.files import replace_text
from dat_ds.finetuning.lora import plain_names
from dat_ds.models import save_weights
from dat_ds.models.pretrained import read_weights
from dat_ds.models.saved import SPEC_NAME, WEIGHTS_NAME
from dat_ds.ranks import Ranks

if TYPE_CHECKING:
    from dat_ds.engine.adversarial import AdversarialEngine

logger = logging.getLogger("dat_ds")

REFERENCE = "reference"
_LISTED = 8


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
        self._writer: CheckpointWriter | None = None

    def save(
        self,
        engine: AdversarialEngine,
        state: Mapping[str, Any],
        *,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        in_background: bool = False,
    ) -> Path:
        """Write a checkpoint of this moment; a collective.

        It is written beside the earlier ones and renamed when complete, so a crash or a full disk
        never costs an earlier checkpoint. One that is being written is finished first.

        Args:
            engine: The engine, between two optimizer steps.
            state: JSON-serialisable state of the training loop.
            tag: Name of the checkpoint; None for ``step-`` and the number of steps.
            client_state: What this rank wants back: plain types and tensors.
            in_background: Whether training may go on while a copy of the state, in the memory of
                the host, is written; :meth:`finish_if_written` and :meth:`finish` complete it.

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
        self.finish(ranks)
        _refuse_different_places(engine, self.folder / name)
        engine.watch.check()
        with exported_weights(engine):
            model_state = exported_state(engine)
        self._refuse_damage(engine, model_state)
        with ranks.together():
            if ranks.is_main:
                self._make_room(partial / name, engine)
        state = {
            "format": FORMAT,
            "step": engine.global_steps,
            "accumulation": engine.accumulation,
            "data_position": engine.data_position,
            **engine.identity.to_state(),
            **state,
        }
        own = {**rank_state(engine), "client_state": dict(client_state or {})}
        jobs = deepspeeds_files(engine.deepspeed, partial / name, copied=in_background)
        jobs.append(_own_file(partial / name, ranks.rank, snapshot(own) if in_background else own))
        if ranks.is_main:
            jobs += _main_files(partial / name, engine, model_state, state)
        self._writer = CheckpointWriter(partial / name, jobs, in_background=in_background)
        if not in_background:
            self.finish(ranks)
        return self.folder / name

    def finish_if_written(self, ranks: Ranks) -> None:
        """Give a checkpoint its place once all ranks have written it; a collective.

        Raises:
            CheckpointError: If a file of it cannot be written; earlier checkpoints are intact.
        """
        if self._writer is not None and not ranks.max(not self._writer.is_done):
            self.finish(ranks)

    def finish(self, ranks: Ranks) -> None:
        """Wait for a checkpoint that is being written, and give it its place; a collective.

        Raises:
            CheckpointError: If a file of it cannot be written; earlier checkpoints are intact.
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        with ranks.together():
            writer.wait()
        shards = cast("list[dict[str, dict[str, Any]]]", ranks.gather(writer.entries))
        with ranks.together():
            if ranks.is_main:
                write_manifest(writer.folder, {k: v for shard in shards for k, v in shard.items()})
                self.publish(writer.folder)
                if self._keep is not None:
                    self.prune(self._keep)

    def save_best(self, engine: AdversarialEngine) -> None:
        """Keep the model alone as the best so far; a collective."""
        with exported_weights(engine):
            write_model(engine, self.best_folder)

    def load(
        self,
        checkpoint: Path,
        engine: AdversarialEngine,
        *,
        verified: bool = False,
        changed: Collection[str] = (),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Continue ``engine``, with all that belongs to it, from a checkpoint; a collective.

        The number of ranks, the ZeRO stage, and how ranks and accumulation make up the global
        batch may be others than the checkpoint's.

        Args:
            checkpoint: Its folder.
            engine: The engine, between two optimizer steps.
            verified: Whether its files have been compared with its manifest already.
            changed: Keys or sections of the config that differ from the checkpoint's on purpose.

        Returns:
            The state of the training loop that was saved with it, and this rank's client state;
            a rank that was added gets that of another.

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
            engine.identity.check(checkpoint, state, changed)
            file = f"rank-{ranks.rank % state['ranks']}.pt"
            _check_complete(checkpoint, engine, file)
            _check_model(checkpoint, engine)
            own = read_file(checkpoint / file)
            if engine.ema is not None and own["ema"] is None:  # one for all ranks
                own["ema"] = read_file(checkpoint / "rank-0.pt")["ema"]
            restarts = engine.identity.restarts_epoch(changed)
            engine.move_loader(state["step"], state.get("data_position", {}), restarts=restarts)
        hyperparameters = hooks.hyperparameters(engine.deepspeed)
        resharded = bool(ranks.max(is_resharded(own.get("layout"), engine.deepspeed)))
        if resharded:
            with ranks.together():
                load_resharded(checkpoint, engine.deepspeed, engine.ema, state["ranks"])
            own["ema"] = None
        else:
            place, _ = engine.deepspeed.load_checkpoint(str(checkpoint.parent), checkpoint.name)
            if place is None:
                raise CheckpointError(
                    f"Checkpoint {checkpoint} is incomplete: DeepSpeed reads none."
                )
        if changed:
            hooks.set_hyperparameters(engine.deepspeed, hyperparameters)
        leave_behind(own, state, engine, resharded=resharded)
        restore_rank_state(own, engine)
        if engine.reference is not None:
            # Not what the model was made from this time, but what the run started with.
            weights = read_weights(checkpoint / REFERENCE / WEIGHTS_NAME)
            engine.reference.load_state_dict(weights)
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
            shutil.rmtree(partial.parent, ignore_errors=True)
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


def _check_complete(checkpoint: Path, engine: AdversarialEngine, own: str) -> None:
    needed = [own, WEIGHTS_NAME]
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
        for name, tensor in plain_names(engine.module.state_dict(keep_vars=True)).items()
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


def _own_file(folder: Path, rank: int, own: Mapping[str, Any]) -> Job:
    name = f"rank-{rank}.pt"
    return Job(lambda: torch.save(own, folder / name), (name,))


def _main_files(
    folder: Path,
    engine: AdversarialEngine,
    model_state: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> list[Job]:
    """The files that one rank writes for all: the model, the reference, ``state.json``."""
    spec = spec_of(engine)
    jobs = [Job(lambda: save_weights(folder, model_state, spec), (WEIGHTS_NAME, SPEC_NAME))]
    if engine.reference is not None:
        reference = engine.reference.state_dict()  # frozen: no copy is needed
        names = tuple(f"{REFERENCE}/{name}" for name in (WEIGHTS_NAME, SPEC_NAME))
        jobs.append(Job(lambda: save_weights(folder / REFERENCE, reference, spec), names))
    text = json.dumps(state, indent=1) + "\n"  # as it is now
    jobs.append(Job(lambda: replace_text(folder / STATE, text), (STATE,)))
    return jobs
