"""Robust evaluation: accuracy under attack, result records, pictures."""

from dat_ds.evaluation.accuracy import Record, evaluate
from dat_ds.evaluation.environment import commit, hardware, versions
from dat_ds.evaluation.pictures import draw_examples
from dat_ds.evaluation.record import describe
from dat_ds.evaluation.report import describe_training
from dat_ds.evaluation.task import Task, task_of

__all__ = [
    "Record",
    "Task",
    "commit",
    "describe",
    "describe_training",
    "draw_examples",
    "evaluate",
    "hardware",
    "task_of",
    "versions",
]
