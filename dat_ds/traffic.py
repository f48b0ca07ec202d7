"""Purpose of a collective's bytes; the engine counts them by this name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_kind: ContextVar[str | None] = ContextVar("kind_of_traffic", default=None)


@contextlib.contextmanager
def kind_of_traffic(kind: str) -> Iterator[None]:
    """Count the collectives that this thread starts inside as ``kind``.

    Args:
        kind: ``gradients``, ``momentum``, ``parameters``, ``norms``, ``features``, or ``setup``,
            which happens once a run.
    """
    token = _kind.set(kind)
    try:
        yield
    finally:
        _kind.reset(token)


def current_kind() -> str | None:
    """The innermost :func:`kind_of_traffic`; None outside."""
    return _kind.get()
