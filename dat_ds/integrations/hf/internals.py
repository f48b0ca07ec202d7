"""Every reach into transformers' internals, each pinned by a test in ``tests/unit/test_hf*.py``.

Written against transformers 5.24 and accelerate 1.15.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler


def come_first(callback: TrainerCallback) -> None:
    """Move a callback that is being told of an event to the front of the Trainer's.

    What a callback adds to the logs is seen by those after it alone, and the Trainer puts its
    reporters (TensorBoard, W&B) first. The list is known only to the handler that is calling.
    """
    handler = _caller(CallbackHandler)
    if handler is None or callback not in handler.callbacks or handler.callbacks[0] is callback:
        return
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def calling_trainer() -> Trainer | None:
    """The Trainer that is telling a callback of an event, which names only its parts."""
    return _caller(Trainer)


def mend_checkpoint_loads(
    trainer: Trainer,
    restore: Callable[[PreTrainedModel, str | Path], None],
    after_best: Callable[[], None],
) -> bool:
    """Have a Trainer restore every tensor, of the best checkpoint and of one that it resumes from.

    DeepSpeed's checkpoints hold the model's own names, and adapters are peft's to load: both are
    left to the Trainer.

    Args:
        trainer: Any.
        restore: Loads a checkpoint's folder into a model; called where the Trainer's own load
            missed tensors.
        after_best: Called when the best checkpoint is in the model.

    Returns:
        Whether this call did it; False where an earlier one has.
    """
    if hasattr(trainer._load_best_model, "is_whole"):
        return False
    load_best, load_from = trainer._load_best_model, trainer._load_from_checkpoint

    @functools.wraps(load_best)
    def load_best_model() -> None:
        with _mended(trainer, trainer.model, trainer.state.best_model_checkpoint, restore):
            load_best()
        after_best()

    @functools.wraps(load_from)
    def load_from_checkpoint(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        module = trainer.model if model is None else model
        with _mended(trainer, module, resume_from_checkpoint, restore):
            load_from(resume_from_checkpoint, model)

    load_best_model.is_whole = True  # type: ignore[attr-defined]
    trainer._load_best_model, trainer._load_from_checkpoint = load_best_model, load_from_checkpoint
    return True


@contextlib.contextmanager
def _mended(
    trainer: Trainer,
    model: nn.Module,
    folder: str | Path,
    restore: Callable[[PreTrainedModel, str | Path], None],
) -> Iterator[None]:
    """Carry out the Trainer's load, and ``restore`` where it missed tensors."""
    is_adapter = getattr(model, "_hf_peft_config_loaded", False)
    if not isinstance(model, PreTrainedModel) or is_adapter:
        yield
        return
    found: list[Any] = []
    # In the place of its warnings, which would tell of what is mended right after.
    trainer._issue_warnings_after_load = found.append
    try:
        yield
    finally:
        del trainer._issue_warnings_after_load
    if any(each.missing_keys or each.unexpected_keys for each in found):
        restore(model, folder)


def wrap_evaluation_collators(trainer: Trainer, wrapper: Callable[[Any], Any]) -> None:
    """Put ``wrapper`` around the collators of what a Trainer that is being made evaluates on.

    No event comes before an evaluation's first forward.
    """
    for name in ("get_eval_dataloader", "get_test_dataloader"):
        setattr(trainer, name, _wrapping(getattr(trainer, name), wrapper))


def _caller(kind: type[Any]) -> Any:
    """The nearest object of a kind among those whose methods are being carried out; else None."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None


def _wrapping(make: Callable[..., Any], wrapper: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        loader = make(*args, **kwargs)
        wrap_collator(loader, wrapper)
        return loader

    return made


def evaluation_prefix(logs: Mapping[str, float]) -> str | None:
    """``"eval"`` of an evaluation's logs, or the prefix it was given; None for other logs."""
    ending = "_samples_per_second"
    prefixes = [key.removesuffix(ending) for key in logs if key.endswith(ending)]
    return next((prefix for prefix in prefixes if prefix != "train"), None)


def wrap_collator(loader: Any, wrapper: Callable[[Any], Any]) -> None:
    """Put ``wrapper`` around the collator of a Trainer's data loader, before it is iterated."""
    loader = getattr(loader, "base_dataloader", loader)
    if not getattr(loader.collate_fn, "is_wrapped", False):
        loader.collate_fn = wrapper(loader.collate_fn)


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper: torch's, or that of DeepSpeed's engine."""
    return getattr(optimizer, "optimizer", optimizer)


def loss_scale(optimizer: Any) -> float:
    """The factor on a float16 loss right now, accelerate's or DeepSpeed's; 1 without one."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    return float(getattr(bare_optimizer(optimizer), "loss_scale", 1.0))
