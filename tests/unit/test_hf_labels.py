"""Claim: under the Trainer, labels of every kind give the loss and the step of class indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.integrations.hf import AdversarialTrainer
from tests.distributed import tiny
from tests.hf_tiny import PixelDicts, trainer_of, vit
from tests.unit.hf_helpers import callback_of

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "int32": lambda y: y.int(),
    "a row of one": lambda y: y[None],
    "one-hot integers": lambda y: torch.nn.functional.one_hot(y, tiny.CLASSES),
    "one-hot floats": lambda y: torch.nn.functional.one_hot(y, tiny.CLASSES).float(),
}
PER_IMAGE = {"mart"}  # which takes no probabilities
CASES = [
    (objective, kind)
    for objective in ("at", "trades", "mart", "alp")
    for kind in KINDS
    if not (objective in PER_IMAGE and kind == "one-hot floats")
]


class Relabelled(Dataset[Any]):
    def __init__(self, data: PixelDicts, change: Callable[[Tensor], Any]) -> None:
        self.data, self.change = data, change

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        return {**sample, "labels": self.change(sample["labels"])}


def trained(
    folder: Any, objective: str, change: Callable[[Tensor], Any], **arguments: Any
) -> tuple[list[float], Tensor]:
    """Logged losses and gradient norms, and the weights at the end."""
    attack = {"name": "pgd", "steps": 1, "step_size": 0.05}
    model = vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = trainer_of(
        model,
        folder,
        [callback_of(objective=objective, attack=attack)],
        train_dataset=Relabelled(PixelDicts(10), change),
        logging_steps=1,
        max_steps=2,
        **arguments,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    logged = [value for row in rows for value in (row["loss"], row["grad_norm"])]
    return logged, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("objective", "kind"), CASES)
def test_every_kind_takes_the_step_of_class_indices(tmp_path, objective, kind, accumulation):
    # 10 images in batches of 4: the last batch is uneven, and so are the micro-batches of a step.
    options = {"gradient_accumulation_steps": accumulation}
    expected, weights = trained(tmp_path, objective, lambda y: y, **options)
    logged, found = trained(tmp_path, objective, KINDS[kind], **options)
    assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["one-hot floats", "one-hot integers"])
def test_label_smoothing_gives_the_same_step_too(tmp_path, kind):
    def steps(change: Callable[[Tensor], Any]) -> Tensor:
        model = vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = trainer_of(
            model,
            tmp_path,
            [],
            kind=AdversarialTrainer,
            train_dataset=Relabelled(PixelDicts(8), change),
            label_smoothing_factor=0.1,
            trainer_options={
                "threat_model": {"norm": "linf", "eps": 0.1},
                "attack": {"name": "pgd", "steps": 1, "step_size": 0.05},
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
            },
        )
        trainer.train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(steps(KINDS[kind]), steps(lambda y: y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_gives_the_models_own_loss_class_indices_too(tmp_path, workers):
    def evaluated(change: Callable[[Tensor], Any]) -> tuple[dict[str, float], Any]:
        trainer = trainer_of(
            vit(),
            tmp_path,
            [callback_of(evaluation={"attacks": []})],
            eval_dataset=Relabelled(PixelDicts(10), change),
            dataloader_num_workers=workers,
        )
        predicted = trainer.predict(Relabelled(PixelDicts(10), change))
        return trainer.evaluate(), predicted.label_ids

    kinds = KINDS if not workers else {"one-hot floats": KINDS["one-hot floats"]}
    expected, classes = evaluated(lambda y: y)
    for change in kinds.values():
        metrics, label_ids = evaluated(change)
        assert metrics["eval_loss"] == expected["eval_loss"]
        assert label_ids.tolist() == classes.tolist()
