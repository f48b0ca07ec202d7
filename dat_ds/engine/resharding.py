"""A checkpoint on other shards than it was written from: other ranks, another ZeRO stage.

Each rank's file in a checkpoint says which elements of which parameters lie where in what DeepSpeed
saved for that rank. From that, every tensor of this run's optimizer is filled element by element,
whatever the two layouts are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from dat_ds.engine import hooks
from dat_ds.engine.hooks import Piece
from dat_ds.engine.safe_loading import read_file
from dat_ds.errors import CheckpointError
from dat_ds.optim.ema import WeightEma

_WEIGHT = "weight"
_MODEL_STATES = "mp_rank_00_model_states.pt"


def layout_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Where the parameters lie on this rank; plain types, to be saved with a checkpoint."""
    return {
        "optimizer": type(hooks.basic_optimizer(engine)).__name__,
        "masters": [weights.pieces for weights in hooks.master_weights(engine)],
        "held": hooks.held_pieces(engine),
        "averaged": hooks.trained_pieces(engine),
    }


def is_resharded(saved: Mapping[str, Any] | None, engine: DeepSpeedEngine) -> bool:
    """Whether what :func:`layout_of` said of a checkpoint is not so on this rank.

    Args:
        saved: None of checkpoints of earlier versions, which go on as they were.
        engine: The engine that goes on.
    """
    # Versions without "averaged" averaged frozen weights, too.
    return saved is not None and {"averaged": saved["held"], **saved} != layout_of(engine)


@dataclass(frozen=True)
class _Flat:
    """A flat tensor of a checkpoint with what belongs to its elements.

    Attributes:
        values: Flat tensors by name, the master weights among them.
        scalars: What the optimizer holds for the tensor as a whole, such as its step count.
    """

    values: dict[str, Tensor]
    scalars: dict[str, Any]


class _Elements:
    """Elements of parameters, found by the parameter's name."""

    def __init__(self) -> None:
        self._places: dict[str, list[tuple[int, int, int, _Flat]]] = defaultdict(list)

    def add(self, pieces: Sequence[Piece], flat: _Flat) -> None:
        """Add a flat tensor and what lies in it."""
        for name, first, numel, offset in pieces:
            self._places[name].append((first, numel, offset, flat))

    def holds(self, name: str) -> bool:
        """Whether there is any element of a parameter."""
        return name in self._places

    def flats(self, pieces: Sequence[Piece]) -> list[_Flat]:
        """The tensors that hold elements of ``pieces``, each once."""
        found = {id(flat): flat for p in pieces for *_, flat in self._places.get(p[0], ())}
        return list(found.values())

    @torch.no_grad()
    def fill(self, target: Tensor, pieces: Sequence[Piece], value: str) -> None:
        """Fill a flat tensor; what is padding in it becomes 0.

        Raises:
            CheckpointError: If elements are missing.
        """
        # Made in one go on the CPU, where the checkpoint is.
        flat = torch.zeros(target.numel(), dtype=target.dtype)
        for name, first, numel, offset in pieces:
            copied = 0
            for start, count, position, source in self._places.get(name, ()):
                left, right = max(first, start), min(first + numel, start + count)
                if left >= right or value not in source.values:
                    continue
                taken = source.values[value].narrow(0, position + left - start, right - left)
                flat.narrow(0, offset + left - first, right - left).copy_(taken)
                copied += right - left
            if copied != numel:
                raise CheckpointError(
                    f"The checkpoint has {copied} of the {numel} elements of {name} ({value}) that "
                    "this rank holds: the files of all ranks must lie in it."
                )
        target.copy_(flat.view_as(target))


def load_resharded(
    checkpoint: Path, engine: DeepSpeedEngine, ema: WeightEma | None, saved_ranks: int
) -> None:
    """Go on from a checkpoint whose shards are not this run's.

    Master weights, the optimizer's state, the schedule, the loss scale, the weights of the model
    and their moving average are those of the checkpoint, to the bit.

    Args:
        checkpoint: Its folder, with the files of all ranks as they were written.
        engine: Of the same model and optimizer; any number of ranks and any ZeRO stage.
        ema: Moving average of its weights, as this rank holds it; None where there is none.
        saved_ranks: Ranks that wrote the checkpoint.

    Raises:
        CheckpointError: If it was written without its layout (dat_ds 0.1), with an optimizer of
            another class, or lacks elements.
    """
    common = _common_of(checkpoint)
    ranks = [_read(checkpoint / f"rank-{rank}.pt") for rank in range(saved_ranks)]
    for own in ranks:
        if "layout" not in own:
            raise CheckpointError(
                f"Checkpoint {checkpoint} was written by an earlier version, without what resuming "
                "on other ranks or at another ZeRO stage needs: resume it once as it was "
                f"({saved_ranks} rank(s), its own ZeRO stage); the next checkpoint has it."
            )
    _check_optimizer(checkpoint, ranks[0]["layout"]["optimizer"], engine)
    elements, groups = _read_masters(checkpoint, common, [own["layout"] for own in ranks])
    _load_optimizer(engine, elements, groups)
    _add_frozen(checkpoint, common, [own["layout"] for own in ranks], elements)
    _load_weights(engine, elements)
    hooks.copy_master_weights(engine)
    if ema is not None:
        _load_average(ema, hooks.trained_pieces(engine), ranks)
    hooks.release_parameters(engine)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(common["lr_scheduler"])
    engine.global_steps = common["global_steps"]
    engine.global_samples = common.get("global_samples", 0)
    engine.skipped_steps = common["skipped_steps"]
    hooks.load_loss_scale(engine, _optimizer_file(checkpoint, common, 0))


def _read(file: Path) -> dict[str, Any]:
    """A file whose tensors are read from the disk when they are used."""
    values: dict[str, Any] = read_file(file, mmap=True)
    return values


def _common_of(checkpoint: Path) -> dict[str, Any]:
    """What DeepSpeed saved once for all ranks."""
    whole = checkpoint / _MODEL_STATES
    return _read(whole if whole.exists() else checkpoint / f"zero_pp_rank_0_{_MODEL_STATES}")


def _check_optimizer(checkpoint: Path, saved: str, engine: DeepSpeedEngine) -> None:
    now = type(hooks.basic_optimizer(engine)).__name__
    if saved != now:
        raise CheckpointError(
            f"Checkpoint {checkpoint} holds the state of {saved}, and this run's optimizer is "
            f"{now}: on other ranks or at another ZeRO stage the class has to stay. Keep "
            "zero_optimization.offload_optimizer as it was."
        )


def _optimizer_file(checkpoint: Path, common: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What DeepSpeed saved of a rank's optimizer."""
    if common.get("optimizer") is not None:
        state: dict[str, Any] = common["optimizer"]
        return state
    found = sorted(checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"))
    if not found:
        raise CheckpointError(f"Checkpoint {checkpoint} lacks the optimizer state of rank {rank}.")
    state = _read(found[0])["optimizer_state_dict"]
    return state


def _read_masters(
    checkpoint: Path, common: Mapping[str, Any], layouts: Sequence[Mapping[str, Any]]
) -> tuple[_Elements, list[dict[str, Any]]]:
    """Master weights and optimizer state of all ranks, and the options of parameter groups."""
    elements, groups = _Elements(), []
    shared = common.get("optimizer") is not None  # ZeRO-0: one file for all ranks
    for rank, layout in enumerate(layouts[:1] if shared else layouts):
        saved = _optimizer_file(checkpoint, common, rank)
        base = saved.get("base_optimizer_state") or saved.get("optimizer_state_dict") or saved
        masters = _masters_in(saved, common, layout)
        for index, (weight, pieces) in enumerate(zip(masters, layout["masters"], strict=True)):
            state = base["state"].get(index, {})
            sized = {k: v for k, v in state.items() if _is_sized(v)}
            values = {_WEIGHT: weight.flatten(), **{k: v.flatten() for k, v in sized.items()}}
            elements.add(pieces, _Flat(values, {k: v for k, v in state.items() if k not in sized}))
        groups = base["param_groups"]
    return elements, [{k: v for k, v in group.items() if k != "params"} for group in groups]


def _masters_in(
    saved: Mapping[str, Any], common: Mapping[str, Any], layout: Mapping[str, Any]
) -> list[Tensor]:
    """The master weights in what DeepSpeed saved of a rank's optimizer."""
    for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        if key in saved:
            return list(saved[key])
    if "fp32_groups" in saved:
        return [master for group in saved["fp32_groups"] for master in group]
    return [common["module"][pieces[0][0]] for pieces in layout["masters"]]


def _is_sized(value: object) -> bool:
    """Whether an optimizer's value is one for each element and not one for the whole tensor."""
    return isinstance(value, Tensor) and value.dim() > 0


def _load_optimizer(
    engine: DeepSpeedEngine, elements: _Elements, groups: Sequence[Mapping[str, Any]]
) -> None:
    optimizer = hooks.basic_optimizer(engine)
    for weights in hooks.master_weights(engine):
        elements.fill(weights.tensor.data, weights.pieces, _WEIGHT)
        flats = elements.flats(weights.pieces)
        state = optimizer.state[weights.tensor] if flats else {}
        for flat in flats:
            for key, value in flat.scalars.items():
                state[key] = value.clone() if isinstance(value, Tensor) else value
        for key in {key for flat in flats for key in flat.values} - {_WEIGHT}:
            if not _is_sized(state.get(key)):
                like = next(flat.values[key] for flat in flats if key in flat.values)
                state[key] = torch.zeros_like(weights.tensor, dtype=like.dtype)
            elements.fill(state[key], weights.pieces, key)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def _add_frozen(
    checkpoint: Path,
    common: Mapping[str, Any],
    layouts: Sequence[Mapping[str, Any]],
    elements: _Elements,
) -> None:
    """Add the weights that no optimizer holds, as the forward passes used them."""
    found: list[tuple[list[Piece], Mapping[str, Tensor]]] = []
    for rank, layout in enumerate(layouts):
        frozen = [piece for piece in layout["held"] if not elements.holds(piece[0])]
        if not frozen:
            return
        shards = checkpoint / f"zero_pp_rank_{rank}_{_MODEL_STATES}"
        if not shards.exists():  # whole on each rank
            for piece in frozen:
                weight = common["module"][piece[0]].flatten()
                elements.add([piece], _Flat({_WEIGHT: weight}, {}))
            return
        found.append((frozen, _read(shards)["frozen_param_fragments"]))
    for frozen, fragments in found:
        for piece in frozen:
            elements.add([piece], _Flat({_WEIGHT: fragments[piece[0]].flatten()}, {}))


def _load_weights(engine: DeepSpeedEngine, elements: _Elements) -> None:
    """Fill the weights that the forward passes use."""
    for weight, piece in zip(hooks.held_weights(engine), hooks.held_pieces(engine), strict=True):
        elements.fill(weight, [piece], _WEIGHT)


def _load_average(
    ema: WeightEma, pieces: Sequence[Piece], ranks: Sequence[Mapping[str, Any]]
) -> None:
    elements, num_updates = _Elements(), 0
    for own in ranks:
        if own["ema"] is None:
            continue
        num_updates = own["ema"]["num_updates"]
        averaged = own["layout"].get("averaged", own["layout"]["held"])
        averages = zip(own["ema"]["averages"], averaged, strict=True)
        for average, piece in averages:
            elements.add([piece], _Flat({_WEIGHT: average.flatten()}, {}))
        if ranks[0]["layout"]["held"] == ranks[-1]["layout"]["held"]:
            break  # whole on each rank
    for average, piece in zip(ema.averages, pieces, strict=True):
        elements.fill(average, [piece], _WEIGHT)
    ema.num_updates = num_updates
