"""The module behind a model, and another forward for some of its parts while an attack runs."""

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def patched_forwards(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let each module compute another forward, hooks around it as ever, until exit.

    Args:
        forwards: Of modules that :func:`may_be_patched`.
    """
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)  # uncovers the class's own


def module_of(model: object) -> nn.Module | None:
    """A module itself, or the module that a callable has as its ``module``; None without one."""
    found = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    return found if isinstance(found, nn.Module) else None


def may_be_patched(module: nn.Module) -> bool:
    """Whether a module computes its class's forward: another library's wrapper stays in place."""
    return "forward" not in vars(module)


def keep_in_evaluation(module: nn.Module) -> None:
    """Leave a module in evaluation mode, whatever mode the model around it is put into."""
    module.eval()
    vars(module)["train"] = types.MethodType(_stay, module)


def stays_in_evaluation(module: nn.Module) -> bool:
    """Whether :func:`keep_in_evaluation` was called for a module."""
    return getattr(vars(module).get("train"), "__func__", None) is _stay


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
