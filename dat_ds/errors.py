"""Errors that a user can correct: the command line prints their text and exits with 2."""


class UserError(Exception):
    """A mistake in what the user asked for: the message says what is wrong and what to type."""


class ConfigError(UserError, ValueError):
    """One or more problems in the run config, all of them in one message."""


class DataError(UserError):
    """Data that is missing, unreadable or inconsistent with the config."""


class DamagedImageError(DataError):
    """One image that cannot be converted to pixels; the others may well be in order."""


class ModelError(UserError):
    """A model that cannot be built or loaded as asked."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or does not belong to this run."""


class ExportError(UserError):
    """A model that cannot be exported, or uploaded, as asked."""


_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "tried to allocate",
    "calculation overflowed",
    "multiplication overflow",
)
"""What torch says of sizes beyond memory, and of those beyond 64 bits."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not as much memory as was asked for."""
    if isinstance(error, MemoryError):
        return True
    # torch has a class of its own for accelerators alone.
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _MEMORY)


class NumericsError(RuntimeError):
    """Training met numbers that it cannot go on with; no further update was made."""


class LossScaleError(NumericsError):
    """float16 gradients overflow at the smallest loss scale; no update was made."""


INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""
FAULT = 75
"""Exit code after a :class:`FaultError`: temporary, to be started again (EX_TEMPFAIL)."""


class FaultError(RuntimeError):
    """A rank that hangs, is stopped or has died; the run can go on from its newest checkpoint."""
