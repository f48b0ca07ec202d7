"""What a Trainer with the callback restores from its checkpoints, and tells in its model card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from dat_ds.errors import CheckpointError, ConfigError
from dat_ds.integrations.hf import AdversarialTrainer
from tests.distributed import tiny
from tests.hf_tiny import MEAN, STD, PixelDicts, trainer_of, vit
from tests.unit.hf_helpers import ATTACK, THREAT, callback_of
from tests.unit.test_hf import MODELS, SIZE

EACH_STEP = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def first_is_best() -> Any:
    """A ``compute_metrics`` whose score falls from evaluation to evaluation."""
    scores = iter(range(0, -100, -1))
    return lambda prediction: {"score": next(scores)}


def files_differ(one: Path, other: Path) -> set[str]:
    """Names of tensors that two saved models do not have alike."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_the_best_checkpoints(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    data = PixelDicts(8, size=SIZE)
    trainer = trainer_of(
        MODELS[name](),
        tmp_path,
        [callback_of(evaluation={"attacks": []}), transformers.EarlyStoppingCallback(5)],
        train_dataset=data,
        eval_dataset=data,
        max_steps=3,
        trainer_options={"compute_metrics": first_is_best()},
        **EACH_STEP,
    )
    logging.getLogger("transformers").propagate = True
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    trainer.save_model(str(tmp_path / "end"))
    assert files_differ(best, tmp_path / "end") == set()
    # The file of the last step has others, so that the comparison can fail.
    assert len(files_differ(best, tmp_path / "checkpoint-3")) > 1
    assert not [r for r in caplog.records if "keys in the checkpoint" in r.getMessage()]


def test_without_the_callback_transformers_restores_a_part() -> None:
    """Where this fails, transformers has mended it, and ``hf/weights.py`` can go."""
    model = vit()
    saved = transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())
    assert saved.keys() != model.state_dict().keys()


def test_weights_in_16_bit_and_beside_float32_come_back_exactly(tmp_path: Path) -> None:
    model = vit().to(torch.bfloat16)
    model.classifier.float()
    trainer = trainer_of(model, tmp_path, [callback_of()])
    trainer.save_model(str(tmp_path / "saved"))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.zero_()
    config = model.config.to_dict()
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert model.config.to_dict() == config
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_a_model_that_was_changed_is_refused(tmp_path: Path) -> None:
    def changed() -> nn.Module:
        model = vit()
        model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, tiny.CLASSES))
        return model

    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(changed(), tmp_path, [callback_of()], **saving).train()
    again = trainer_of(changed(), tmp_path, [callback_of()], **saving)
    with pytest.raises(CheckpointError) as caught:
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    message = str(caught.value)
    assert message.startswith(f"The weights in '{tmp_path}/checkpoint-1' are not those of this ViT")
    assert "(only one of the two has classifier.0.bias, classifier.0.weight, " in message
    assert message.endswith(f"load '{tmp_path}/checkpoint-1' yourself.")


def test_a_callback_that_was_added_later_cannot_resume(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer_of(vit(), tmp_path, [callback_of()], **saving).train()
    again = trainer_of(vit(), tmp_path, [], **saving)
    again.add_callback(callback_of())
    with pytest.raises(ConfigError, match=r"instead of add_callback\.$"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- the model card


def card_of(trainer: transformers.Trainer) -> list[str]:
    trainer.create_model_card(tags="digits")
    return (Path(trainer.args.output_dir) / "README.md").read_text().splitlines()


def test_the_card_tells_attack_ball_and_accuracies_of_the_weights_it_describes(
    tmp_path: Path,
) -> None:
    attacks = ["pgd-2", "pgd-3"]
    callback = callback_of(
        threat_model={"norm": "linf", "eps": "8/255"},
        attack={"name": "pgd", "steps": 2, "step_size": "eps/2"},
        objective="trades",
        weight_perturbation="awp",
        evaluation={"attacks": attacks, "num_examples": 37},
    )
    trainer = trainer_of(
        vit(),
        tmp_path,
        [callback],
        eval_dataset=PixelDicts(40),
        max_steps=3,
        trainer_options={"compute_metrics": first_is_best()},
        **EACH_STEP,
    )
    trainer.train()
    first, *_, last = (e for e in trainer.state.log_history if "eval_robust_accuracy" in e)
    assert first["eval_natural_accuracy"] != last["eval_natural_accuracy"]
    lines = card_of(trainer)
    assert (
        "Trained with the attack `pgd` (steps 2, step_size 4/255), objective `trades`, weight "
        "perturbation `awp`. Threat model: l-infinity, eps 8/255, of pixels in [0, 1]. "
    ) in "\n".join(lines)
    clean, robust = (f"{first[f'eval_{kind}_accuracy']:.1%}" for kind in ("natural", "robust"))
    assert f"| clean accuracy | eval | 37 | 1 | {clean} |" in lines
    whole = f"| robust accuracy, pgd-2, pgd-3 (l-infinity, eps 8/255) | eval | 37 | 1 | {robust} |"
    assert whole in lines
    assert any(line.startswith("| robust accuracy, pgd-3 (l-inf") for line in lines)
    assert any(line.startswith("The weights are those of step 1;") for line in lines)
    for tag in ("digits", "adversarial-training"):
        assert f"- {tag}" in lines
    assert lines.index("## Robustness") < lines.index("## Model description")
    # What is measured of the weights that were loaded counts for them.
    trainer.evaluate(PixelDicts(6), metric_key_prefix="other")
    found = [line for line in card_of(trainer) if line.startswith("| clean accuracy | other")]
    assert found[0].startswith("| clean accuracy | other | 6 | 1 | ")


@pytest.mark.parametrize("kind", [transformers.Trainer, AdversarialTrainer])
def test_a_card_without_an_evaluation_says_so(tmp_path: Path, kind: Any) -> None:
    ours = kind is AdversarialTrainer
    settings = {"threat_model": THREAT, "attack": ATTACK, "mean": MEAN, "std": STD}
    trainer = trainer_of(
        vit(),
        tmp_path,
        [] if ours else [callback_of()],
        kind=kind,
        trainer_options=settings if ours else None,
    )
    lines = card_of(trainer)
    assert lines.count("Robust accuracy has not been measured.") == 1


# ---- a random transform


class RandomCrops(PixelDicts):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        shift = int(torch.randint(8, ()))
        return {**item, "pixel_values": item["pixel_values"].roll(shift, -1)}


@pytest.mark.parametrize(("data", "told"), [(RandomCrops(10), 1), (PixelDicts(10), 0)])
def test_a_random_evaluation_transform_is_told_once(
    data: Any, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("dat_ds").propagate = True
    callback = callback_of(evaluation={"attacks": ["pgd-1"]})
    trainer = trainer_of(vit(), tmp_path, [callback], eval_dataset=data)
    for _ in range(2):
        trainer.evaluate()
    found = [r.getMessage() for r in caplog.records if "its transform is random" in r.getMessage()]
    assert len(found) == told
    assert all("eval_dataset.set_transform(...)" in message for message in found)
