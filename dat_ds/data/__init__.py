"""Images, labels, and the plan of which rank reads which of them."""

from dat_ds.contracts import UNLABELLED, classes_of, pseudo_label
from dat_ds.data.damaged import Readable
from dat_ds.data.datasets import DataSplits, build_data, splits_of
from dat_ds.data.images import FolderImages, TensorImages
from dat_ds.data.loader import (
    DistributedLoader,
    EvaluationBatches,
    Loader,
    PlannedBatch,
    evaluation_batches,
)
from dat_ds.data.method import DatasetMethod
from dat_ds.data.mixing import Mixed
from dat_ds.data.mixture import Mixture
from dat_ds.data.readers import DATASETS
from dat_ds.data.sampler import (
    BatchPlan,
    DistributedBatchSampler,
    FixedShare,
    SampleKey,
    hold_out,
    plan_step,
    shard_evenly,
)
from dat_ds.data.samples import CollateFunction, is_stream
from dat_ds.data.stream import StreamLoader
from dat_ds.data.transforms import AUGMENTATIONS, Augmented, file_of
from dat_ds.data.unlabelled import PartlyLabelled

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "UNLABELLED",
    "Augmented",
    "BatchPlan",
    "CollateFunction",
    "DataSplits",
    "DatasetMethod",
    "DistributedBatchSampler",
    "DistributedLoader",
    "EvaluationBatches",
    "FixedShare",
    "FolderImages",
    "Loader",
    "Mixed",
    "Mixture",
    "PartlyLabelled",
    "PlannedBatch",
    "Readable",
    "SampleKey",
    "StreamLoader",
    "TensorImages",
    "build_data",
    "classes_of",
    "evaluation_batches",
    "file_of",
    "hold_out",
    "is_stream",
    "plan_step",
    "pseudo_label",
    "shard_evenly",
    "splits_of",
]
