"""Claims about samples: converted where there is one way to, else refused in a readable line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dat_ds.data import DistributedLoader, evaluation_batches
from dat_ds.data.samples import Collator
from dat_ds.errors import DataError

GREY = torch.randint(256, (1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RGB = torch.randint(256, (3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
PIXELS = RGB.float() / 255


class Samples(Dataset[Any]):
    """Samples made by a function of the index."""

    def __init__(self, size: int, sample: Any) -> None:
        self.size, self.sample = size, sample

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


def reversed_array() -> np.ndarray:
    array = PIXELS.flip(-1).numpy()[:, :, ::-1]
    array.flags.writeable = False
    return array


IMAGES = {
    "float32": (PIXELS, PIXELS),
    "float64": (PIXELS.double(), PIXELS),
    "float16": (PIXELS.half(), PIXELS.half().float()),
    "with gradient": (PIXELS.clone().requires_grad_(), PIXELS),
    "uint8": (RGB, PIXELS),
    "float array": (PIXELS.numpy(), PIXELS),
    "float64 array": (PIXELS.double().numpy(), PIXELS),
    "uint8 array": (RGB.numpy(), PIXELS),
    "read-only, reversed array": (reversed_array(), PIXELS),
    "PIL RGB": (Image.fromarray(RGB.permute(1, 2, 0).numpy()), PIXELS),
    "PIL L": (Image.fromarray(GREY[0].numpy()), GREY.float() / 255),
    "three by three pixels": (torch.rand(3, 3, 3), None),
    "more channels than pixels": (torch.rand(13, 2, 3), None),
}


@pytest.mark.parametrize("image", IMAGES)
def test_images_become_float32_pixels(image: str) -> None:
    given, expected = IMAGES[image]
    x, y = Collator()([(given, 3), (given, 1)], [0, 1])
    expected = given if expected is None else expected
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert torch.equal(x, torch.stack([expected, expected]))
    assert y.tolist() == [3, 1]


def test_a_pil_image_has_the_pixels_of_torchvision() -> None:
    from torchvision.transforms.functional import to_tensor

    image = Image.fromarray(RGB.permute(1, 2, 0).numpy())
    assert torch.equal(Collator()([(image, 0)], [0])[0][0], to_tensor(image))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (2, torch.tensor([2])),
        (-4, torch.tensor([-4])),
        (True, torch.tensor([1])),
        (np.int64(2), torch.tensor([2])),
        (np.uint8(2), torch.tensor([2])),
        (torch.tensor(2, dtype=torch.int32), torch.tensor([2])),
        (np.array(2), torch.tensor([2])),
        (torch.tensor([0.25, 0.75]), torch.tensor([[0.25, 0.75]])),
        ([0.25, 0.75], torch.tensor([[0.25, 0.75]])),
        (torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([[0, 1]])),
    ],
    ids=str,
)
def test_labels_become_int64_or_stay_probabilities(label: Any, expected: Tensor) -> None:
    y = Collator()([(PIXELS, label)], [0])[1]
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("image_key", ["image", "img", "pixel_values"])
@pytest.mark.parametrize("label_key", ["label", "labels"])
def test_a_dict_is_read_by_its_keys(image_key: str, label_key: str) -> None:
    sample = {"id": 7, image_key: PIXELS, label_key: 2}
    x, y = Collator()([sample], [0])
    assert torch.equal(x[0], PIXELS)
    assert y.tolist() == [2]


IMAGE_REFUSALS = {
    "int64": (RGB.long(), r"Sample 5 has an image of torch.int64: give floating-point pixels"),
    "uint16 array": (
        RGB.numpy().astype(np.uint16),
        r"Sample 5 has an image of torch.uint16: give floating-point pixels",
    ),
    "array of objects": (np.array([None]), r"Sample 5 has an array of object: give float32"),
    "channels last": (
        torch.rand(6, 5, 3),
        r"Sample 5 has an image of shape \[6, 5, 3\], with the channels last: give .*"
        r"x\.transpose\(2, 0, 1\) of an array or x\.permute\(2, 0, 1\) of a tensor\.",
    ),
    "channels last, uint8": (np.zeros((6, 5, 1), np.uint8), r"x\.transpose\(2, 0, 1\)"),
    "no channel": (torch.rand(6, 5), r"shape \[6, 5\]: give .* A grey image is x\[None\]\."),
    "a batch": (torch.rand(1, 3, 6, 5), r"shape \[1, 3, 6, 5\]: give \(channels, height, width\)"),
    "PIL RGBA": (
        Image.new("RGBA", (5, 6)),
        r"Sample 5 has a PIL image of mode RGBA: give mode L or RGB, such as image\.convert",
    ),
    "PIL 16 bits": (Image.new("I;16", (5, 6)), r"PIL image of mode I;16"),
    "list": ([[0.0]], r"Sample 5 has an image of class list: give a tensor"),
    "None": (None, r"Sample 5 has an image of class NoneType"),
}


@pytest.mark.parametrize("image", IMAGE_REFUSALS)
def test_an_image_that_could_only_be_guessed_is_refused(image: str) -> None:
    given, message = IMAGE_REFUSALS[image]
    with pytest.raises(DataError, match=message):
        Collator()([(given, 0)], [5])


SAMPLE_REFUSALS = {
    "triple": ((PIXELS, 1, 2), r"Sample 5 is a tuple of 3: give \(image, label\), or write a co"),
    "image alone": (PIXELS, r"Sample 5 is of class Tensor: give \(image, label\)"),
    "no label key": (
        {"image": PIXELS, "y": 1},
        r"Sample 5 has the keys image, y: give exactly one of image, img, pixel_values and one of",
    ),
    "two image keys": ({"image": PIXELS, "img": PIXELS, "label": 1}, r"the keys image, img, label"),
    "label text": ((PIXELS, "cat"), r"Sample 5 has a label of class str \('cat'\): give a class"),
    "label None": ((PIXELS, None), r"Sample 5 has a label of class NoneType: give a class index"),
}


@pytest.mark.parametrize("sample", SAMPLE_REFUSALS)
def test_a_sample_that_is_no_image_with_label_is_refused(sample: str) -> None:
    given, message = SAMPLE_REFUSALS[sample]
    with pytest.raises(DataError, match=message):
        Collator()([given], [5])


def test_samples_of_different_shapes_are_named() -> None:
    samples = [(torch.rand(3, 6, 5), 0), (torch.rand(3, 6, 5), 0), (torch.rand(3, 7, 5), 0)]
    with pytest.raises(
        DataError,
        match=r"Sample 2 has an image of shape \[3, 7, 5\], sample 8 one of \[3, 6, 5\]: give all",
    ):
        Collator()(samples, [8, 4, 2])
    labels = [(PIXELS, torch.rand(2)), (PIXELS, torch.rand(3))]
    with pytest.raises(DataError, match=r"Sample 1 has a label of shape \[3\], sample 0 one of"):
        Collator()(labels, [0, 1])


def triples(samples: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_own_collate_function_makes_the_batches(num_workers: int) -> None:
    data = Samples(5, lambda i: (torch.full((3, 6, 5), i, dtype=torch.uint8), i, f"{i}.png"))
    loader = DistributedLoader(
        data, micro_batch=2, rank=1, ranks=2, num_workers=num_workers, collate_fn=triples
    )
    (x, y), (empty, no_label) = loader
    assert torch.equal(x[:, 0, 0, 0], y.float() / 255)
    assert y.tolist() == list(loader.sampler._order(0)[2:4])
    assert (empty.shape, no_label.shape) == ((0, 3, 6, 5), (0,))
    assert (empty.dtype, no_label.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: torch.stack([x for x, _ in s]), "collate_fn is of class Tensor: give"),
        (lambda s: {"x": 1}, "collate_fn has the keys x: give exactly one"),
        (lambda s: (torch.rand(3, 3, 6, 5), torch.zeros(2)), r"has images of shape \[3, 3, 6, 5\]"),
        (lambda s: (torch.rand(2, 3, 6, 5), 1), r"has labels of shape \[\] for 2 samples"),
        (lambda s: (torch.rand(2, 6, 5, 3), [1, 2]), "with the channels last"),
        (lambda s: (torch.rand(2, 5), [1, 2]), r"an image of shape \[5\]: give \(channels"),
    ],
)
def test_a_batch_of_a_users_own_function_is_checked(function: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Collator(function)([(PIXELS, 0), (PIXELS, 1)], [0, 1])


class Stream(IterableDataset[Any]):
    """No sample at all."""

    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(TensorDataset(PIXELS[None], torch.zeros(1))), r"are a DataLoader.*its dataset"),
        ({"train": [], "test": []}, "a dict with the keys train, test: pass one"),
        (iter([]), "list_iterator, an iterator, which can be read only once"),
        (Stream(), r"a stream \(Stream\), .*: pass a map-style dataset"),
        (3, "a int without __len__ and __getitem__"),
    ],
    ids=["DataLoader", "dict", "iterator", "stream", "number"],
)
def test_what_is_no_dataset_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluation_batches(data, batch_size=2)
    with pytest.raises(DataError, match=message):
        DistributedLoader(data, micro_batch=2)


def test_evaluation_reads_the_same_samples() -> None:
    from dat_ds.attacks import ThreatModel
    from dat_ds.evaluation import evaluate

    images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    pil = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    kinds = [
        TensorDataset(images.float() / 255, torch.arange(6) % 2),
        Samples(6, lambda i: {"img": pil[i], "label": np.int64(i % 2)}),
    ]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    threat = ThreatModel("linf", 0.1)
    first, second = (evaluate(model, data, threat, ["pgd-2"]).to_dict() for data in kinds)
    assert first == second
    with pytest.raises(DataError, match="Sample 4 has a label of class NoneType"):
        evaluate(model, Samples(6, lambda i: (pil[i], None if i == 4 else 0)), threat, [])
