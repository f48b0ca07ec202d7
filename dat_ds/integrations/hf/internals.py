"""Every reach into transformers' internals, each pinned by a test in ``tests/unit/test_hf*.py``.

Written against transformers 5.24 and accelerate 1.15.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback
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


def wrap_evaluation_collators(wrapper: Callable[[Any], Any]) -> None:
    """Put ``wrapper`` around the collators of what a Trainer that is being made evaluates on.

    No event comes before an evaluation's first forward. The Trainer is known only as the one that
    is telling its callbacks of its end of ``__init__``.
    """
    trainer = _caller(Trainer)
    if trainer is not None:
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
