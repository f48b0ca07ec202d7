"""One step of min-max training, whoever trains: inner maximisation, outer forward, metrics.

An engine or a Trainer is a shell around it: it opens the model, hands over micro-batches, and takes
the optimizer's steps.
"""

from dat_ds.minmax.batch import BatchReader, MicroBatch, refusal_of_unlabelled
from dat_ds.minmax.finite import FiniteWatch, NonFinite
from dat_ds.minmax.inner import Access, InnerMaximisation
from dat_ds.minmax.metrics import PhaseTimer, StepMetrics, num_correct
from dat_ds.minmax.moment import Moment
from dat_ds.minmax.outer import OuterForward, OuterTerms, fill_up
from dat_ds.minmax.reference import frozen_copy, settle
from dat_ds.minmax.watch import BatchWatch, FaultyBatchError
from dat_ds.minmax.weights import (
    PerturbedWeights,
    WeightPerturbation,
    refuse_sharded,
    weight_perturbation,
)

__all__ = [
    "Access",
    "BatchReader",
    "BatchWatch",
    "FaultyBatchError",
    "FiniteWatch",
    "InnerMaximisation",
    "MicroBatch",
    "Moment",
    "NonFinite",
    "OuterForward",
    "OuterTerms",
    "PerturbedWeights",
    "PhaseTimer",
    "StepMetrics",
    "WeightPerturbation",
    "fill_up",
    "frozen_copy",
    "num_correct",
    "refusal_of_unlabelled",
    "refuse_sharded",
    "settle",
    "weight_perturbation",
]
