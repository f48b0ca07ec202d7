"""Errors a user can mend; the command line prints their text, no traceback, and exits with 2."""


class UserError(Exception):
    """A mistake in what the user asked for: the message says what is wrong and what to type."""


class ConfigError(UserError, ValueError):
    """One or more problems in the run config, all of them in one message."""


class DataError(UserError):
    """Data that is missing, unreadable or inconsistent with the config."""


class ModelError(UserError):
    """A model that cannot be built or loaded as asked."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or does not belong to this run."""


class ExportError(UserError):
    """A model that cannot be exported, or uploaded, as asked."""


class NumericsError(RuntimeError):
    """Training met a non-finite loss; no further update was made."""


INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""
FAULT = 75
"""Exit code after a :class:`FaultError`: temporary, to be started again (EX_TEMPFAIL)."""


class FaultError(RuntimeError):
    """A rank that hangs, is stopped or has died; the run can go on from its newest checkpoint."""
