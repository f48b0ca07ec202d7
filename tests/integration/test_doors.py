"""Claim: every door takes, converts or refuses each kind of input as docs/inputs.md says.

"Works" and "converted" mean the loss, or the images, of the plain kind: float32 pixels, class
indices as int64, logits as a tensor.
"""

from __future__ import annotations

import re
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import dat_ds
from dat_ds.attacks import ThreatModel, apgd, pgd
from dat_ds.errors import UserError
from dat_ds.evaluation import evaluate
from dat_ds.integrations.hf import AdversarialTrainingCallback
from tests.hf_tiny import trainer_of, vit

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"
THREAT = ThreatModel("linf", 0.05)
COUNT, CLASSES = 8, 4
PGD: dict[str, Any] = {"name": "pgd", "steps": 2, "step_size": 0.02, "random_start": False}


def batch(classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(COUNT, 3, 8, 8, generator=generator) * 255).round() / 255
    y = torch.randint(classes, (COUNT,), generator=generator)
    y[0] = 2 % classes  # an index that is not a probability
    return x, y


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, outputs))


class Packed(nn.Module):
    """A model that hands its logits over in something else."""

    def __init__(self, pack: Callable[[Tensor, bool], Any], outputs: int = CLASSES) -> None:
        super().__init__()
        self.body = network(outputs)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.body(x), self.training)


def one_hot(y: Tensor) -> Tensor:
    return nn.functional.one_hot(y, CLASSES)


def with_first(y: Tensor, value: int) -> Tensor:
    y = y.clone()
    y[0] = value
    return y


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[3, 0, 0, 0] = value
    return x


IMAGES: dict[str, Callable[[Tensor], Any]] = {
    "float32 in [0, 1]": lambda x: x,
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "uint8 levels": lambda x: (x * 255).byte(),
    "int64 levels": lambda x: (x * 255).long(),
    "float levels of 0 to 255": lambda x: x * 255,
    "normalised": lambda x: (x - 0.5) / 0.25,
    "one pixel out of range": lambda x: spoiled(x, 1.02),
    "NaN": lambda x: spoiled(x, float("nan")),
    "infinite": lambda x: spoiled(x, float("inf")),
}
LABELS: dict[str, Callable[[Tensor], Any]] = {
    "int64 `(B,)`": lambda y: y,
    "int32": lambda y: y.int(),
    "uint8": lambda y: y.byte(),
    "`(B, 1)`": lambda y: y[:, None],
    "one-hot integers": one_hot,
    "one-hot floats": lambda y: one_hot(y).float(),
    "floats `(B,)`": lambda y: y.float(),
    "several labels an image": lambda y: (one_hot(y) + one_hot((y + 1) % CLASSES)).float(),
    "the index K": lambda y: with_first(y, CLASSES),
    "255": lambda y: with_first(y, 255),
    "-1": lambda y: with_first(y, -1),
    "-100": lambda y: with_first(y, -100),
}
Named = namedtuple("Named", "logits aux")
OUTPUTS: dict[str, Callable[[Tensor, bool], Any]] = {
    "a tensor": lambda z, _: z,
    "a dict with `logits`": lambda z, _: {"logits": z},
    "an object with `logits`": lambda z, _: SimpleNamespace(logits=z),
    "a named tuple with `logits`": lambda z, _: Named(z, z[:, :1]),
    "a tuple, in training with auxiliary logits": lambda z, training: (z, 2 * z) if training else z,
    "a tuple of logits and features": lambda z, _: (z, z[:, :2]),
    "class indices": lambda z, _: z.argmax(1),
    "maps of logits": lambda z, _: z[:, :, None, None],
}


class Samples(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


# ---- the doors: each gives a tensor that tells whether it did the same


def by_attack(model: nn.Module, x: Any, y: Any) -> Tensor:
    return pgd(model, x, y, threat=THREAT, steps=2, step_size=0.02, random_start=False)


def by_apgd(model: nn.Module, x: Any, y: Any) -> Tensor:
    return apgd(model, x, y, threat=THREAT, steps=2, random_start=False)


def by_evaluation(model: nn.Module, x: Any, y: Any) -> Tensor:
    record = evaluate(model, Samples(x, y), THREAT, ["pgd-2"], batch_size=4)
    assert record.natural_acc is not None
    return torch.tensor([record.natural_acc, record.robust_acc["pgd-2"]])


def by_engine(model: nn.Module, x: Any, y: Any) -> Tensor:
    config = {
        "train_micro_batch_size_per_gpu": COUNT,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "dat": {
            "threat_model": {"norm": "linf", "eps": THREAT.eps},
            "attack": PGD,
            "schedule": {"name": "constant"},
        },
    }
    engine, *_ = dat_ds.initialize(model=model, config=config)
    try:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        return torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    finally:
        engine.close()


class Columns(Samples):
    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.x[index], "labels": self.y[index]}


def trainer(x: Tensor, y: Tensor, tested: Tensor, tested_y: Tensor) -> Any:
    callback = AdversarialTrainingCallback(
        threat_model={"norm": "linf", "eps": THREAT.eps},
        attack=PGD,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        evaluation={"attacks": ["pgd-2"]},
    )
    return trainer_of(
        vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        tempfile.mkdtemp(),
        [callback],
        train_dataset=Columns(x, y),
        eval_dataset=Columns(tested, tested_y),
        max_steps=1,
        per_device_train_batch_size=COUNT,
        per_device_eval_batch_size=COUNT,
    )


def by_callback(_: nn.Module, x: Any, y: Any) -> Tensor:
    made = trainer(x, y, *batch())
    made.train()
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def by_callback_evaluation(_: nn.Module, x: Any, y: Any) -> Tensor:
    metrics = trainer(*batch(), x, y).evaluate()
    return torch.tensor([metrics["eval_natural_accuracy"], metrics["eval_robust_accuracy"]])


DOORS = {
    "`pgd` and the like": by_attack,
    "`apgd`": by_apgd,
    "`evaluate`": by_evaluation,
    "the engine": by_engine,
    "the callback": by_callback,
    "its evaluation": by_callback_evaluation,
}
TAKE_ANY_MODEL = [name for name in DOORS if name not in ("the callback", "its evaluation")]


def outcome(door: str, model: nn.Module, x: Any, y: Any, expected: Tensor) -> str:
    try:
        found = DOORS[door](model, x, y)
    except UserError as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=1e-6)
    return "works"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    x, y = batch()
    return {door: run(network(), x, y) for door, run in DOORS.items()}


def table(heading: str) -> dict[str, dict[str, str]]:
    """Cells of the page's table that stands below a heading: by row and column."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def check(found: str, door: str, heading: str, kind: str) -> None:
    documented = table(heading)[kind][door]
    assert documented in ("works", "converted", "refused")
    assert found == {"converted": "works"}.get(documented, documented), (door, kind)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("door", DOORS)
def test_images(door, kind, expected):
    x, y = batch()
    given, plain = IMAGES[kind](x), expected[door]
    if kind in ("bfloat16", "float16"):
        plain = DOORS[door](network(), given.float(), y)
    check(outcome(door, network(), given, y, plain), door, "Images", kind)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("door", DOORS)
def test_labels(door, kind, expected):
    x, y = batch()
    check(outcome(door, network(), x, LABELS[kind](y), expected[door]), door, "Labels", kind)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("door", TAKE_ANY_MODEL)
def test_outputs(door, kind, expected):
    x, y = batch()
    model = Packed(OUTPUTS[kind])
    check(outcome(door, model, x, y, expected[door]), door, "Outputs", kind)


@pytest.mark.parametrize("door", TAKE_ANY_MODEL)
@pytest.mark.parametrize("shape", ["`(B, 1)`", "`(B,)`"])
def test_one_output_is_the_logit_of_the_second_of_two_classes(door, shape):
    x, y = batch(2)
    two = Packed(lambda z, _: torch.cat([torch.zeros_like(z), z], dim=1), outputs=1)
    plain = DOORS[door](two, x, y)
    for labels in (y, y[:, None].float()):
        one = Packed(lambda z, _: z if shape == "`(B, 1)`" else z.squeeze(1), outputs=1)
        torch.testing.assert_close(DOORS[door](one, x, labels), plain, rtol=0, atol=1e-6)


def test_the_tables_have_every_kind_and_door():
    for heading, kinds, doors in (
        ("Images", IMAGES, DOORS),
        ("Labels", LABELS, DOORS),
        ("Outputs", OUTPUTS, TAKE_ANY_MODEL),
    ):
        cells = table(heading)
        assert list(cells) == list(kinds)
        assert all(list(row) == list(doors) for row in cells.values())


def test_keys_that_a_model_and_data_of_ones_own_leave_unread_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "dat": {
            "threat_model": {"eps": 0.05},
            "attack": PGD,
            "data": {"mixup": 0.8, "augment": "crop", "num_workers": 0},
            "model": {"pretrained": "weights.pt"},
            "schedule": {"max_steps": 4},
        },
    }
    x, y = batch()
    data = torch.utils.data.TensorDataset(x, y)
    dat_ds.initialize(model=network(), config=config, training_data=data)
    assert "dat.data.augment='crop', dat.data.mixup=0.8: no effect on training_data" in caplog.text
    assert "dat.model.pretrained='weights.pt': no effect on the model" in caplog.text
    caplog.clear()
    splits = dat_ds.data.build_data("digits", augment="crop")
    model = dat_ds.models.build_model(
        "resnet18", num_classes=10, in_chans=1, options={"channels": [4] * 4}
    )
    data = torch.utils.data.Subset(splits.train, range(20))
    dat_ds.initialize(model=nn.Sequential(model), config=config, training_data=data)
    assert "no effect" not in caplog.text
