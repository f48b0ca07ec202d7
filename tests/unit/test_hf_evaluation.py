"""Evaluation under the callback of Hugging Face's Trainer, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dat_ds.attacks import ThreatModel
from dat_ds.evaluation import evaluate
from dat_ds.integrations.hf import internals
from dat_ds.integrations.hf.forward import PixelView
from dat_ds.integrations.hf.pixels import PixelScale
from tests.hf_tiny import MEAN, STD, PixelDicts, trainer_of, vit
from tests.unit.hf_helpers import callback_of


def test_evaluation_and_prediction_are_untouched(tmp_path: Path) -> None:
    model, data = vit(), PixelDicts(10)
    ours = trainer_of(model, tmp_path, [callback_of()], eval_dataset=data)
    theirs = trainer_of(model, tmp_path, [], eval_dataset=data)
    before = [p.clone() for p in model.parameters()]
    metrics, plain = ours.evaluate(), theirs.evaluate()
    assert metrics["eval_loss"] == plain["eval_loss"]
    assert (ours.predict(data).predictions == theirs.predict(data).predictions).all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_robust_metrics_equal_an_evaluation_of_the_model(tmp_path: Path) -> None:
    model, data = vit(), PixelDicts(10)
    attacks = ["pgd-5", "pgd-5-2"]
    callback = callback_of(evaluation={"attacks": attacks, "num_examples": 9})
    trainer = trainer_of(model, tmp_path, [callback], eval_dataset=data)
    metrics = trainer.evaluate(metric_key_prefix="val")
    rows = [(data.pixels[i], data.labels[i]) for i in range(9)]
    view = PixelView(model.eval(), PixelScale(MEAN, STD), "classes")
    record = evaluate(view, rows, ThreatModel("linf", 0.1), attacks, batch_size=4)
    assert metrics["val_natural_accuracy"] == record.natural_acc
    for name in attacks:
        assert metrics[f"val_robust_accuracy_{name}"] == record.robust_acc[name]
    outcomes = zip(*(record.outcomes[n] for n in attacks), strict=True)
    withstood = sum(a == b == "1" for a, b in outcomes)
    assert metrics["val_robust_accuracy"] == withstood / 9


def test_robust_accuracy_chooses_the_best_model_and_is_reported(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            seen.append(metrics["eval_robust_accuracy"])

    trainer = trainer_of(
        vit(),
        tmp_path,
        # Early stopping reads the metric, wherever it stands in the list.
        [transformers.EarlyStoppingCallback(2), Watch(), callback_of()],
        eval_dataset=PixelDicts(10),
        max_steps=8,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="robust_accuracy",
        report_to="tensorboard",
    )
    trainer.train()
    assert trainer.state.best_metric == max(seen)
    best = seen.index(max(seen)) + 1
    assert trainer.state.best_global_step == best
    assert len(seen) == min(8, best + 2)
    logged = [e["eval_robust_accuracy"] for e in trainer.state.log_history if "eval_loss" in e]
    assert logged == seen
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload().Scalars("eval/robust_accuracy")
    assert [e.value for e in events] == pytest.approx(seen)


def test_logs_of_an_evaluation_are_told_from_others() -> None:
    assert internals.evaluation_prefix({"eval_samples_per_second": 1.0}) == "eval"
    assert internals.evaluation_prefix({"train_samples_per_second": 1.0}) is None
    assert internals.evaluation_prefix({"loss": 1.0}) is None
