"""The datasets by name, one reader a file."""

from dat_ds.data.method import DatasetMethod
from dat_ds.data.readers.cifar import Cifar10, Cifar100
from dat_ds.data.readers.digits import Digits
from dat_ds.data.readers.huggingface import HuggingFace
from dat_ds.data.readers.imagefolder import ImageFolder
from dat_ds.data.readers.npz import Npz
from dat_ds.data.readers.synthetic import Synthetic
from dat_ds.data.readers.timm import Timm
from dat_ds.data.readers.torchvision import Torchvision
from dat_ds.data.readers.webdataset import WebDataset
from dat_ds.method import Table, table_of

DATASETS: Table[DatasetMethod] = table_of(
    "dataset",
    DatasetMethod,
    [
        Digits,
        Cifar10,
        Cifar100,
        Npz,
        ImageFolder,
        Timm,
        Torchvision,
        HuggingFace,
        WebDataset,
        Synthetic,
    ],
)
"""The choices of ``dat.data``: a new dataset is a file and a place in this list."""
