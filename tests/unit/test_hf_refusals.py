"""What the callback of Hugging Face's Trainer refuses, all problems at once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dat_ds.errors import ConfigError
from dat_ds.integrations.hf.settings import CallbackArguments
from tests.hf_tiny import PixelDicts, our_hooks, trainer_of, vit
from tests.unit.hf_helpers import callback_of


def test_all_problems_of_the_settings_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        callback_of(
            threat_model={"norm": "linf", "eps": 8},
            attack={"name": "pdg"},
            evaluation={"atacks": []},
            objective={"name": "trades", "beta": -1},
        )
    for part in ("eps", "'pdg'", "evaluation.atacks", "objective.beta"):
        assert part in str(caught.value)


def test_a_key_of_another_section_is_told_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match=r"belongs to another section: dat\.threat_model\.eps\."):
        callback_of(attack={"name": "pgd", "eps": "8/255"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": {"name": "free"}}, "replays"),
        ({"objective": "rotation"}, "head of its own"),
        ({"objective": {"name": "at", "unlabelled_weight": 0.5}}, "unlabelled_weight"),
        ({"attack": None}, "attack is missing"),
        ({"weight_perturbation": {"name": "awp", "radius": -1}}, "weight_perturbation.radius"),
    ],
)
def test_what_needs_the_engine_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(vit(), tmp_path, [callback_of(**settings)])


def test_models_without_images_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    text = transformers.BertForSequenceClassification(config)
    with pytest.raises(ConfigError, match="'input_ids', not 'pixel_values'"):
        trainer_of(text, tmp_path, [callback_of()])
    with pytest.raises(ConfigError, match="problem_type='regression'"):
        trainer_of(vit(problem_type="regression"), tmp_path, [callback_of()])


def test_missing_labels_and_scales_are_refused(tmp_path: Path) -> None:
    class Unlabelled(PixelDicts):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"pixel_values": super().__getitem__(index)["pixel_values"]}

    trainer = trainer_of(vit(), tmp_path, [callback_of()], train_dataset=Unlabelled(8))
    with pytest.raises(ConfigError, match="no labels"):
        trainer.train()
    with pytest.raises(ConfigError, match="Robust accuracy needs labels"):
        trainer_of(vit(), tmp_path, [callback_of()], eval_dataset=Unlabelled(8)).evaluate()
    with pytest.raises(ConfigError, match="scale of pixel_values is unknown"):
        trainer_of(vit(), tmp_path, [callback_of(mean=None, std=None)])


def test_monitors_of_the_deepspeed_file_are_checked_when_the_trainer_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = {
        "train_batch_size": "auto",
        "wandb": {"enabled": True},
        "csv_monitor": {"output_pth": ""},
    }
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    arguments.deepspeed_plugin = SimpleNamespace(
        zero_stage=2, hf_ds_config=SimpleNamespace(config=config)
    )
    with pytest.raises(ConfigError) as caught:
        callback_of().on_init_end(arguments, None, None, model=vit())
    first, second = str(caught.value).split("\n")
    assert first.startswith("wandb.enabled=true, but the package 'wandb' is not installed")
    assert second.startswith("Unknown key in the run config: csv_monitor.output_pth")


class _OwnLoss(transformers.Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        outputs = model(**inputs)
        return F.cross_entropy(outputs["logits"], inputs["labels"])


class _NoForward(transformers.Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(model, "module", model).forward(**inputs).loss


@pytest.mark.parametrize(
    ("kind", "message"), [(_OwnLoss, "not the model's output 'loss'"), (_NoForward, "went by")]
)
def test_a_loss_computed_elsewhere_is_refused(tmp_path: Path, kind: Any, message: str) -> None:
    model = vit()
    with pytest.raises(ConfigError, match=message):
        trainer_of(model, tmp_path, [callback_of()], kind=kind).train()
    assert our_hooks(model) == []


def test_fine_tuning_is_the_trainers_own_matter() -> None:
    with pytest.raises(ConfigError, match=r"dat\.finetuning is not read under .*Trainer, which is"):
        CallbackArguments(threat_model={"eps": 0.1}, attack="pgd").resolve(
            {"finetuning": {"linear_probe": True}}
        )
