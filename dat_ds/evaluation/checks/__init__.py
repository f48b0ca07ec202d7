"""Self-doubt: named checks of a model, and of the files of a finished evaluation."""

from dat_ds.evaluation.checks.finding import Check, Finding, Status
from dat_ds.evaluation.checks.model import MODEL_CHECKS, check_model

__all__ = ["MODEL_CHECKS", "Check", "Finding", "Status", "check_model"]
