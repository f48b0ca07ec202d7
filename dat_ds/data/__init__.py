"""Images, labels, and the plan of which rank reads which of them."""

from dat_ds.data.datasets import DATASETS, DataSplits, FolderImages, TensorImages, build_data
from dat_ds.data.loader import DistributedLoader, EvaluationBatches, evaluation_batches
from dat_ds.data.sampler import (
    BatchPlan,
    DistributedBatchSampler,
    SampleKey,
    hold_out,
    plan_step,
    shard_evenly,
)
from dat_ds.data.transforms import AUGMENTATIONS, Augmented

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Augmented",
    "BatchPlan",
    "DataSplits",
    "DistributedBatchSampler",
    "DistributedLoader",
    "EvaluationBatches",
    "FolderImages",
    "SampleKey",
    "TensorImages",
    "build_data",
    "evaluation_batches",
    "hold_out",
    "plan_step",
    "shard_evenly",
]
