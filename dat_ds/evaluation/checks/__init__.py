"""Self-doubt: named checks of a model, and of the files of a finished evaluation."""

from dat_ds.evaluation.checks.finding import ALARMS, Check, Finding, Status
from dat_ds.evaluation.checks.model import MODEL_CHECKS, check_model
from dat_ds.evaluation.checks.outcome import OUTCOME_CHECKS, check_outcome

__all__ = [
    "ALARMS",
    "MODEL_CHECKS",
    "OUTCOME_CHECKS",
    "Check",
    "Finding",
    "Status",
    "check_model",
    "check_outcome",
]
