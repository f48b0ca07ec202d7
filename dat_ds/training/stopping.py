"""Stopping a run on SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class StopSignal:
    """Remembers that SIGTERM came, for the training loop to ask between two steps.

    Attributes:
        requested: Whether this process was asked to stop; ranks agree on it themselves.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGTERM inside, instead of dying of it."""

        def request_stop(_signum: int, _frame: object) -> None:
            self.requested = True

        before = signal.signal(signal.SIGTERM, request_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
