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
    """Training met numbers that it cannot go on with; no further update was made."""


class LossScaleError(NumericsError):
    """float16 gradients overflow at the smallest loss scale; no update was made."""
