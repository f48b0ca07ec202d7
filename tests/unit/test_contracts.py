"""Claims about what images, labels and outputs may be, one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dat_ds.attacks import ThreatModel, apgd, build_attack, fat, multi_norm, pgd
from dat_ds.attacks.attack import CallableAttack
from dat_ds.contracts import (
    Gate,
    as_images,
    as_labels,
    as_pictures,
    faulty_images,
    logits_of,
    tensor_of,
)
from dat_ds.errors import ConfigError, DataError, ModelError
from dat_ds.evaluation import evaluate
from dat_ds.minmax import BatchReader, Moment
from dat_ds.objectives import build_objective
from dat_ds.ranks import Ranks

pytestmark = pytest.mark.fast

THREAT = ThreatModel("linf", 0.05)
NAN, INF = float("nan"), float("inf")


def pictures(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, outputs))


# ---- images


@pytest.mark.parametrize(
    ("value", "is_faulty"),
    [
        (0.0, False),
        (1.0, False),
        (1 + 5e-7, False),
        (1.001, True),
        (-0.001, True),
        (NAN, True),
        (INF, True),
        (-INF, True),
    ],
)
def test_one_pixel_makes_its_image_faulty_and_no_other(value, is_faulty):
    x = pictures()
    x[2, 1, 3, 3] = value
    assert faulty_images(x, 0.0, 1.0).tolist() == [False, False, is_faulty, False]


def test_another_pixel_range_has_other_limits():
    x = torch.tensor([[-1.0], [1.0], [1.5]])
    assert faulty_images(x, -1.0, 1.0).tolist() == [False, False, True]
    assert faulty_images(x[:0], -1.0, 1.0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_short_floats_are_computed_with_in_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert as_images(pictures().to(dtype)).dtype == expected
    assert as_images(pictures().to(dtype), network()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 3, 8, 8)), "numpy.ndarray: give a tensor"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8: give floating-point pixels"),
        (torch.zeros(3), "the shape (3,)"),
    ],
)
def test_other_things_are_no_images(x, words):
    with pytest.raises(DataError) as caught:
        as_images(x)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((2, 8, 8, 3), "x.permute(0, 3, 1, 2)"),
        ((3, 8, 8), "x.unsqueeze(0) for a single one"),
        ((2, 9), "give (B, C, H, W)."),
    ],
)
def test_a_layout_is_refused_with_the_call_that_mends_it(shape, remedy):
    with pytest.raises(DataError) as caught:
        as_pictures(torch.zeros(shape))
    assert remedy in str(caught.value)


# ---- labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_indices_of_any_integer_type_are_int64(dtype, shape):
    labels = as_labels(torch.tensor([2, 0, 1], dtype=dtype).view(shape), 3)
    assert labels.y.dtype == torch.int64
    assert labels.y.tolist() == [2, 0, 1]


@pytest.mark.parametrize("y", [[2, 0, 1], np.array([2, 0, 1]), np.array([2, 0, 1], dtype=np.int8)])
def test_lists_and_arrays_are_labels_too(y):
    assert as_labels(y, 3).y.tolist() == [2, 0, 1]


def test_one_hot_rows_name_their_class_and_others_are_faulty():
    labels = as_labels(torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 2], [0, 0, 0]]), 4)
    assert labels.y[0] == 1
    assert labels.faulty is not None
    assert labels.faulty.tolist() == [False, True, True, True]


def test_rows_that_sum_to_one_are_probabilities_and_others_are_faulty():
    given = torch.tensor([[0.25, 0.75], [1.0, 0.5], [1.5, -0.5], [NAN, 1.0]])
    labels = as_labels(given, 4)
    assert labels.y is given or torch.equal(labels.y[:3], given[:3])
    assert labels.faulty is not None
    assert labels.faulty.tolist() == [False, True, True, True]


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_number_an_image_is_the_probability_of_the_second_of_two_classes(shape):
    labels = as_labels(torch.tensor([0.0, 0.25, 3.0]).view(shape), 3)
    assert labels.y[:2].tolist() == [[1.0, 0.0], [0.75, 0.25]]
    assert labels.faulty is not None
    assert labels.faulty.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (torch.zeros(2), "3 images have labels of shape (2,)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "shape (3, 8, 8)"),
        (torch.zeros((), dtype=torch.int64), "shape ()"),
        (["cat", "dog", "cat"], "Labels are a list"),
        (None, "Labels are a NoneType"),
    ],
)
def test_other_things_are_no_labels(y, words):
    with pytest.raises(DataError) as caught:
        as_labels(y, 3)
    assert words in str(caught.value)


def test_a_gate_knows_the_classes_once_the_model_has_put_them_out():
    gate = Gate("classes")
    y = torch.tensor([0, 3])
    assert not gate.outside(y).any()
    gate.expect(as_labels(y, 2))
    with pytest.raises(DataError, match=r"hold 3 \(image 1 of 2\): class indices go from 0 to 2"):
        gate.outputs(torch.zeros(2, 3), 2)
    assert gate.outside(y).tolist() == [False, True]
    with pytest.raises(DataError, match="rows for 5 classes: give 3"):
        gate.labels(torch.full((2, 5), 0.2), 2)


@pytest.mark.parametrize(
    ("reads", "without", "expected"),
    [
        ("classes", "no", [1, 1, 1, 0]),
        ("partly labelled", "no", [1, 0, 1, 0]),
        ("partly labelled", None, [0, 0, 1, 0]),
    ],
)
def test_missing_labels_and_pseudo_labels_pass_where_they_are_of_use(reads, without, expected):
    y = torch.tensor([-1, -2, -100, 0])
    assert Gate(reads, without).outside(y).int().tolist() == expected


# ---- outputs


@pytest.mark.parametrize(
    "outputs",
    [
        torch.ones(2, 4),
        {"logits": torch.ones(2, 4), "features": torch.zeros(2, 9)},
        {"scores": torch.ones(2, 4), "loss": torch.zeros(())},
        SimpleNamespace(logits=torch.ones(2, 4)),
        (torch.ones(2, 4), torch.zeros(2, 4)),
        [torch.ones(2, 4)],
        (torch.ones(2, 4), None, [torch.zeros(2, 1, 4)]),
    ],
)
def test_the_logits_are_found(outputs):
    assert torch.equal(logits_of(outputs, 2), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (None, "a NoneType without a tensor"),
        ((torch.ones(2, 4), torch.ones(2, 9)), "a tuple of tensors (2, 4), (2, 9)"),
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 9)}, "with the keys a, b"),
        (torch.ones(2, 4, dtype=torch.int64), "torch.int64, such as classes"),
        (torch.ones(3, 4), "the shape (3, 4) for 2 images"),
        (torch.ones(2, 4, 1, 1), "not logits of classes"),
        (torch.ones(2, 0), "not logits of classes"),
    ],
)
def test_other_outputs_are_refused_with_what_they_are(outputs, words):
    with pytest.raises(ModelError) as caught:
        logits_of(outputs, 2)
    assert words in str(caught.value)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_one_output_is_the_logit_of_the_second_of_two_classes(shape):
    z = torch.tensor([1.5, -2.0])
    found = logits_of(z.view(shape), 2)
    assert torch.equal(found, torch.tensor([[0.0, 1.5], [0.0, -2.0]]))
    torch.testing.assert_close(found.softmax(1)[:, 1], z.sigmoid())
    assert torch.equal(tensor_of(z.view(shape), 2), z.view(shape))


# ---- attacks and evaluation


def binary_cross_entropy(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    values = nn.functional.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none")
    return values.flatten(1).sum(1)


@pytest.mark.parametrize(
    "y",
    [torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), torch.tensor([[1, 1, 0, 0]] * 3)],
)
def test_several_labels_an_image_are_attacked_with_a_loss_of_ones_own(y):
    x, model = pictures(3), network()
    with pytest.raises(DataError, match="several labels an image are not supported"):
        pgd(model, x, y, threat=THREAT, steps=1, step_size=0.05)
    options = {"threat": THREAT, "steps": 3, "loss": binary_cross_entropy, "random_start": False}
    for x_adv in (
        pgd(model, x, y, step_size=0.02, restarts=2, **options),
        apgd(model, x, y, **options),
    ):
        before, after = (binary_cross_entropy(model(images), y) for images in (x, x_adv))
        assert (after > before).all()


def test_regression_is_attacked_with_a_loss_of_ones_own():
    x, y, model = pictures(3), torch.tensor([7.0, -2.0, 0.5]), network(1)
    x_adv = pgd(
        model,
        x,
        y,
        threat=THREAT,
        steps=3,
        step_size=0.02,
        loss=lambda z, target: (z.squeeze(1) - target).square(),
        random_start=False,
    )
    assert ((model(x_adv).squeeze(1) - y).abs() > (model(x).squeeze(1) - y).abs()).all()


def test_an_attack_of_ones_own_that_leaves_the_ball_is_named():
    x, y = pictures(), torch.tensor([0, 1, 2, 3])
    wrong = {
        "left the ball: image 2 of the batch lies 0.2 from": lambda m, x, y, g: (
            x + torch.tensor([0, 0, 0.2, 0])[:, None, None, None]
        ),
        "left the pixel range [0, 1]: image 0 of the batch spans [": lambda m, x, y, g: x + 0.04,
        "returned NoneType": lambda m, x, y, g: None,
        "returned torch.float32 of shape (2, 3, 8, 8) for images of shape": lambda m, x, y, g: x[
            :2
        ],
        "returned torch.int64": lambda m, x, y, g: x.long(),
        "returned NaN or infinite pixels in image 0": lambda m, x, y, g: x * NAN,
        "returned NaN or infinite pixels in image 3": lambda m, x, y, g: (
            x + torch.tensor([0, 0, 0, float("inf")])[:, None, None, None]
        ),
    }
    for words, function in wrong.items():
        with pytest.raises(ConfigError) as caught:
            CallableAttack(threat=THREAT, user_function=function)(network(), x, y)
        assert words in str(caught.value)


def test_an_attack_of_ones_own_may_write_into_its_images():
    x, y = pictures(), torch.tensor([0, 1, 2, 3])
    kept = x.clone()
    attack = CallableAttack(
        threat=THREAT, user_function=lambda m, x, y, g: x.sub_(0.05).clamp_(0, 1)
    )
    x_adv = attack(network(), x, y)
    assert torch.equal(x, kept)
    assert torch.equal(x_adv, (kept - 0.05).clamp(0, 1))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_attacks_and_evaluation_work_without_gradients_around_them(around):
    model, y = network(), torch.tensor([0, 1, 2, 3])
    options = {"threat": THREAT, "steps": 2, "random_start": False}
    plain = pgd(model, pictures(), y, step_size=0.02, **options)
    record = evaluate(model, list(zip(pictures(), y, strict=True)), THREAT, ["pgd-2"])
    with around():
        x, labels = pictures(), y.clone()
        assert torch.equal(pgd(model, x, labels, step_size=0.02, **options), plain)
        assert apgd(model, x, labels, **options).shape == x.shape
        assert fat(model, x, labels, step_size=0.02, **options).shape == x.shape
        multi_norm(model, x, labels, step_size=0.02, other_norms={"l2": 0.5}, **options)
        again = evaluate(model, list(zip(x, labels, strict=True)), THREAT, ["pgd-2"])
        assert again == record
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = network()
    with pytest.raises(ModelError, match=r"made under torch\.inference_mode"):
        pgd(model, pictures(), torch.tensor([0, 1, 2, 3]), threat=THREAT, steps=1, step_size=0.1)


class Cut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = network(), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.body(x)
        return self.body(x.detach())


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_model_without_a_gradient_to_its_images_is_refused(how):
    model = Cut(how)
    for called in (model, lambda x: model(x)):
        with pytest.raises(ModelError, match="carry no gradient to its images"):
            pgd(called, pictures(), torch.zeros(4).long(), threat=THREAT, steps=1, step_size=0.1)


def test_a_model_that_cannot_take_the_images_says_which():
    attack = build_attack({"name": "pgd", "threat_model": {"norm": "linf", "eps": 0.1}})
    with pytest.raises(ModelError, match=r"images of shape \(4, 1, 8, 8\), torch\.float32"):
        attack(network(), pictures()[:, :1], torch.zeros(4).long())


@pytest.mark.parametrize("width", [3, 5])
def test_rows_for_another_number_of_classes_are_refused(width):
    y = torch.tensor([0, 1, 2, 0])
    for rows in (nn.functional.one_hot(y, width), nn.functional.one_hot(y, width).float()):
        with pytest.raises(DataError, match=f"4 outputs, and the labels are rows for {width}"):
            pgd(network(), pictures(), rows, threat=THREAT, steps=1, step_size=0.1)


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_a_model_in_float64_is_attacked_in_float64(given):
    model, y = network().double(), torch.tensor([0, 1, 2, 3])
    assert pgd(model, pictures().to(given), y, threat=THREAT, steps=1, step_size=0.1).dtype == (
        torch.float64
    )


def test_outputs_that_are_not_finite_are_refused():
    model, y = network(), torch.tensor([0, 1, 2, 3])
    data = list(zip(pictures(), y, strict=True))
    with torch.no_grad():
        model[3].bias[1] = NAN
    with pytest.raises(ModelError, match="NaN or infinite outputs for 4 of 4 images"):
        pgd(model, pictures(), y, threat=THREAT, steps=1, step_size=0.1)
    with pytest.raises(ModelError, match="NaN or infinite outputs for 4 of 4 images"):
        evaluate(model, data, THREAT, [])


def test_an_evaluation_names_the_sample_that_is_at_fault():
    x = pictures(6)
    x[4, 0, 0, 0] = NAN
    data = list(zip(x, [0] * 6, strict=True))
    with pytest.raises(DataError, match=r"Sample 4: Images hold NaN"):
        evaluate(network(), data, THREAT, [], batch_size=3)


@pytest.mark.parametrize(
    ("outputs", "attack"), [(2, "apgd-t-5"), (2, "apgd-dlr-5"), (1, "apgd-t-5")]
)
def test_an_evaluation_attack_of_more_classes_than_there_are_is_refused(outputs, attack):
    data = list(zip(pictures(), [0, 1, 1, 0], strict=True))
    with pytest.raises(
        ConfigError, match=f"'{attack}' compares the . largest logits, and there are 2"
    ):
        evaluate(network(outputs), data, THREAT, [attack])


# ---- batches of a run


def reader(ranks: int, objective: str = "at") -> BatchReader:
    processes = Ranks(rank=0, count=ranks, device=torch.device("cpu"), cpu_group=None)
    return BatchReader(build_objective({"name": objective}), processes, THREAT)


def moment(step: int) -> Moment:
    return Moment(seed=0, step=step)


def test_on_one_cpu_a_faulty_image_is_told_before_its_step(tmp_path):
    batches, x = reader(1), pictures()
    batches.watch.folder, batches.watch.file_name = tmp_path, "images/{}.png".format
    batches.read(x, torch.zeros(4).long(), moment(0), samples=[9, 8, 7, 6])
    x[1, 0, 0, 0] = 2.0
    with pytest.raises(DataError) as caught:
        batches.read(x, torch.zeros(4).long(), moment(1), samples=[5, 4, 3, 2])
    message = str(caught.value)
    assert "outside the pixel range [0, 1]" in message
    assert "image 1 of micro-step 0 in step 2 on rank 0, sample 4 (images/4.png)" in message
    kept = np.load(tmp_path / "faulty_image_rank0_step2.npz")
    assert np.array_equal(kept["image"], x[1].numpy())
    assert kept["label"] == 0
    assert kept["sample"].tolist() == [4]
    batches.read(pictures(), torch.zeros(4).long(), moment(2))


def test_on_several_ranks_it_is_told_when_asked_for_with_every_sample(tmp_path):
    batches, x = reader(2), pictures()
    batches.watch.folder = tmp_path
    batches.read(x, torch.zeros(4).long(), moment(0), samples=[9, 8, 7, 6])
    batches.watch.check_here()
    x[1, 0, 0, 0], x[3] = NAN, x[3] * 255
    batches.read(pictures(), torch.zeros(4).long(), moment(1), samples=[5, 4, 3, 2])
    batches.read(x, torch.zeros(4).long(), moment(2), samples=[15, 14, 13, 12])
    batches.read(x[:2], torch.zeros(2).long(), moment(3), samples=[25, 24])
    with pytest.raises(DataError) as caught:
        batches.watch.check_here()
    message = str(caught.value)
    assert "NaN or infinite pixels. This is image 1 of micro-step 0 in step 3" in message
    assert "samples 14, 12, 24; 3 faulty images since the last look" in message
    assert (tmp_path / "faulty_image_rank0_step3.npz").exists()
    batches.watch.check_here()


def test_images_of_several_sizes_are_watched_alike(tmp_path):
    batches = reader(2)
    batches.watch.folder = tmp_path
    batches.read(pictures(), torch.zeros(4).long(), moment(0))
    batches.read(pictures(), torch.zeros(4).long(), moment(1))
    batches.read(torch.full((2, 3, 12, 12), NAN), torch.zeros(2).long(), moment(2))
    with pytest.raises(DataError, match=r"faulty\. This is image 0 of micro-step 0 in step 3"):
        batches.watch.check_here()


def test_a_faulty_label_is_named_beside_pixels_that_were_rounded():
    x = pictures()
    x[0, 0, 0, 0] = 1.0005
    with pytest.raises(DataError, match=r"^Labels hold -100"):
        reader(1).read(x, torch.tensor([-100, 0, 0, 0]), moment(0), rounding=1e-3)


def test_a_label_out_of_range_never_becomes_an_index():
    batches = reader(2)
    batches.gate.num_classes = 4
    batches.read(pictures(), torch.zeros(4).long(), moment(0))
    part = batches.read(pictures(), torch.tensor([1, 7, 2, -100]), moment(1))
    assert part.y.tolist() == [1, 0, 2, 0]
    with pytest.raises(DataError, match="Labels hold 7: class indices go from 0 to 3"):
        batches.watch.check_here()


@pytest.mark.parametrize("y", [["a"] * 4, None, 3])
def test_other_things_than_labels_are_refused_in_training_too(y):
    with pytest.raises(DataError, match=r"^Labels are"):
        reader(1).read(pictures(), y, moment(0))


def test_an_objective_without_labels_needs_none():
    part = reader(1, "rotation").read(pictures(), None, moment(0))
    assert len(part.y) == len(part.x)


def test_an_empty_batch_is_no_fault():
    part = reader(1).read(pictures(0), torch.zeros(0).long(), moment(0))
    assert part.x.shape == (1, 3, 8, 8)
    assert part.num_images == 0


def test_the_rounding_of_normalised_values_is_clamped_and_more_is_a_fault():
    batches, x = reader(1), pictures()
    x[0, 0, 0, 0] = 1.0005
    part = batches.read(x, torch.zeros(4).long(), moment(0), rounding=1e-3)
    assert part.x.max() == 1
    x[0, 0, 0, 0] = 1.002
    with pytest.raises(DataError, match="overshoot"):
        batches.read(x, torch.zeros(4).long(), moment(1), rounding=1e-3)


def test_pictures_that_are_kept_nowhere_are_still_told(monkeypatch):
    batches, x = reader(1), pictures()
    batches.watch.folder = Path("/proc/no/such/folder")
    with pytest.raises(DataError) as caught:
        batches.read(x * 300, torch.zeros(4).long(), moment(0))
    assert "kept in" not in str(caught.value)


class NothingIsRead(TorchDispatchMode):
    """Refuses every operation whose result the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("label", [torch.int64, torch.float32])
def test_after_the_first_batch_nothing_waits_for_the_device(label):
    batches = reader(2)
    y = torch.tensor([0, 1, 2, 3])
    y = torch.nn.functional.one_hot(y, 4).to(label) if label.is_floating_point else y
    batches.read(pictures(), y, moment(0))
    batches.gate.outputs(torch.zeros(4, 4), 4)
    with NothingIsRead():
        for step in range(1, 4):
            batches.read(pictures() * step, y, moment(step))
    with pytest.raises(DataError, match="8 faulty images"):
        batches.watch.check_here()
