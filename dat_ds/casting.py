"""Where the input of a 16-bit network is cast: at its layers, after its own work on pixels.

bfloat16 values near 1 are 0.0039 apart, so pixels that are cast before a network's first operation
leave the epsilon ball. Networks get float32 pixels instead, and each layer casts what it is given
to the dtype of its weights: what a network computes of pixels before its first layer, such as
normalisation with buffers, is in float32.
"""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dat_ds.errors import ConfigError

HALF = (torch.float16, torch.bfloat16)
_WIDE = (torch.float32, torch.float64)

_TORCH = "torch.nn.modules."
_NO_LAYERS = (_TORCH + "container", _TORCH + "module")
_LIBRARIES = ("timm", "torchvision", "transformers")
"""Their variants of torch's layers are hooked as well: none of them normalises pixels. Those of
anyone else may, so their input is left alone."""


_casting: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose layers cast at this moment, so that every attack need not look through them."""


class LayerCasts:
    """Every layer with 16-bit weights casts wider floats that it is given to their dtype.

    Layers are torch's, and other libraries' subclasses of them. Nothing is done where layers of
    ``model`` cast already, or where its ``casts_input`` says that it does all this by itself.

    Args:
        model: In the dtype that it will keep; ZeRO-3 may have sharded its parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = None if model in _casting else model
        self._handles: list[RemovableHandle] = []
        if self._model is None:
            return
        _casting.add(model)
        if getattr(model, "casts_input", False):
            return
        for module in model.modules():
            if _is_layer(type(module)) and not _casts(module):
                dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
                if dtype in HALF:
                    hook = functools.partial(_cast_to_weights, dtype)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Leave nothing on the model."""
        while self._handles:
            self._handles.pop().remove()
        if self._model is not None:
            _casting.discard(self._model)


@contextlib.contextmanager
def casting_at_layers(model: nn.Module) -> Iterator[None]:
    """:class:`LayerCasts` until exit."""
    casts = LayerCasts(model)
    try:
        yield
    finally:
        casts.remove()


def _cast_to_weights(
    dtype: torch.dtype, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook, quickest where one tensor arrives in the dtype of the weights."""
    if len(args) == 1 and not kwargs and getattr(args[0], "dtype", None) is dtype:
        return None
    if not _is_wide((*args, *kwargs.values())):
        return None
    return _narrowed(args, dtype), {name: _narrowed(v, dtype) for name, v in kwargs.items()}


def _is_wide(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype in _WIDE
    return isinstance(value, tuple) and any(_is_wide(item) for item in value)


def _narrowed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in _WIDE else value
    if type(value) is tuple:  # arguments, or the two states of an LSTM
        return tuple(_narrowed(item, dtype) for item in value)
    return value


def _is_layer(kind: type[nn.Module]) -> bool:
    """Whether the code of a module's forward is known to begin with weights."""
    home: str = getattr(kind.forward, "__module__", None) or ""
    if _is_torchs_layer(home):
        return True
    return home.partition(".")[0] in _LIBRARIES and any(
        _is_torchs_layer(base.__module__) for base in kind.__mro__
    )


def _is_torchs_layer(home: str) -> bool:
    return home.startswith(_TORCH) and home not in _NO_LAYERS


def _casts(module: nn.Module) -> bool:
    return any(
        isinstance(hook, functools.partial) and hook.func is _cast_to_weights
        for hook in module._forward_pre_hooks.values()
    )


# ---- operations of a model's own that mix both

_MISMATCH = re.compile(r"dtype|scalar type|input type", re.IGNORECASE)
_OTHER_CAUSES = re.compile(r"not implemented|\b(Long|Int|Bool|Byte)\b")


def refuse_mixed_dtypes(
    model: nn.Module, error: RuntimeError, advice: Mapping[torch.dtype, str]
) -> None:
    """Name the cause of torch's error where a 16-bit model met its float32 input with its weights.

    Args:
        model: Raised ``error`` in its forward.
        error: Any; others than of mixed dtypes are passed over.
        advice: By dtype of the weights, what runs the model as it is.

    Raises:
        ConfigError: With the place, and what to write there.
    """
    found = (p.dtype for p in model.parameters() if p.dtype in HALF)
    dtype = next(found, None)
    text = str(error)
    if dtype is None or not _MISMATCH.search(text) or _OTHER_CAUSES.search(text):
        return
    name = str(dtype).removeprefix("torch.")
    raise ConfigError(
        f"{type(model).__name__} has {name} weights, and an operation of its own"
        f"{_place(error)} takes them together with float32: pixels arrive in float32, and only "
        "torch's layers cast what they are given. Cast before that operation, after "
        "normalisation: x = ((x - mean) / std).to(self.weight.dtype); or "
        f"{advice[dtype]}."
    ) from None


def _place(error: RuntimeError) -> str:
    """`` (FILE, line N)`` of the model's code that ``error`` comes from, where it shows."""
    ours = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_file() or ours in path.parents:
            continue
        if not {"torch", "deepspeed"} & set(path.parts):
            return f" ({path.name}, line {frame.lineno})"
    return ""
