"""Training with the callback of Hugging Face's Trainer, in one process."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.requirements import Requirement
from torch import Tensor, nn

from dat_ds.attacks import SampleGenerator, ThreatModel, build_attack, pgd
from dat_ds.errors import ConfigError, DataError
from dat_ds.integrations.hf import AdversarialTrainer
from dat_ds.models import build_model, save_weights
from dat_ds.objectives import Trades
from tests.distributed import tiny
from tests.hf_tiny import MEAN, STD, PixelDicts, clip, our_hooks, trainer_of, vit
from tests.unit.hf_helpers import ATTACK, THREAT, callback_of

SIZE = 32
SMALL = {"num_labels": tiny.CLASSES, "image_size": SIZE}
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}


def timm_wrapper() -> nn.Module:
    config = transformers.TimmWrapperConfig(
        architecture="resnet18", num_labels=tiny.CLASSES, do_pooling=True
    )
    return transformers.TimmWrapperForImageClassification(config)


MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, **WIDTHS)
    ),
    "deit": lambda: transformers.DeiTForImageClassification(
        transformers.DeiTConfig(**SMALL, **WIDTHS)
    ),
    "beit": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(**SMALL, **WIDTHS)
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SMALL, **WIDTHS)
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            **SMALL, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(**SMALL, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    ),
    "timm": timm_wrapper,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_train_two_steps(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    callback = callback_of(objective="trades")
    data = PixelDicts(8, size=SIZE)
    trainer = trainer_of(
        model, tmp_path, [callback], train_dataset=data, eval_dataset=data, logging_steps=1
    )
    trainer.train()
    assert our_hooks(model) == []
    assert max(float((p - start[k]).detach().abs().max()) for k, p in model.named_parameters()) > 0
    assert {"robust_accuracy", "natural_loss", "consistency_loss"} <= set(
        trainer.state.log_history[0]
    )


def plain_steps(model: nn.Module, data: PixelDicts, count: int) -> None:
    """SGD on adversarial images, written out by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    threat = ThreatModel("linf", 0.1)
    for step in range(count):
        x, y = data.pixels[4 * step : 4 * step + 4], data.labels[4 * step : 4 * step + 4]

        def logits(images: Tensor) -> Tensor:
            return model((images - 0.5) / 0.5).logits

        model.eval()
        source = SampleGenerator(0, step)
        x_adv = pgd(logits, x, y, threat=threat, steps=2, step_size=0.05, generator=source)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(logits(x_adv), y).backward()
        optimizer.step()


def test_training_equals_plain_pytorch(tmp_path: Path) -> None:
    model, plain, data = vit(), vit(), PixelDicts(20)
    trainer_of(model, tmp_path, [callback_of()], train_dataset=data, max_steps=5).train()
    plain_steps(plain, data, 5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_without_an_attack_nothing_changes(tmp_path: Path) -> None:
    natural, model, data = vit(), vit(), PixelDicts(20)
    trainer_of(natural, tmp_path, [], train_dataset=data, max_steps=5).train()
    trainer_of(
        model, tmp_path, [callback_of(attack="none")], train_dataset=data, max_steps=5
    ).train()
    for ours, theirs in zip(model.parameters(), natural.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_items": False}], ids=["items", "means"])
def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    models, data = [vit(), vit()], PixelDicts(24)
    for model, (batch, accumulation) in zip(models, [(8, 1), (4, 2)], strict=True):
        if options:
            model.accepts_loss_kwargs = False
        trainer_of(
            model,
            tmp_path,
            [callback_of(objective="trades")],
            train_dataset=data,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        ).train()
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_weights_get_one_gradient_a_micro_step_however_many_attack_steps(tmp_path: Path) -> None:
    model, calls = vit(), []
    head = model.classifier.weight
    handle = head.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    attack = {**ATTACK, "steps": 7}
    trainer_of(model, tmp_path, [callback_of(attack=attack)], gradient_accumulation_steps=2).train()
    handle.remove()
    assert len(calls) == 2 * 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool, mode: str) -> None:
    models, data = [vit(), vit()], PixelDicts(12)
    for model, checkpointing in zip(models, [False, True], strict=True):
        arguments: dict[str, Any] = {}
        if checkpointing:
            arguments["activation_checkpointing"] = True
            arguments["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        callback = callback_of(attack={**ATTACK, "model_mode": mode})
        trainer_of(
            model, tmp_path, [callback], train_dataset=data, max_steps=3, **arguments
        ).train()
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_bf16_autocast_trains_and_torch_compile_is_the_same(tmp_path: Path) -> None:
    data = PixelDicts(12)
    half, compiled, plain = vit(), vit(), vit()
    trainer_of(half, tmp_path, [callback_of()], train_dataset=data, max_steps=3, bf16=True).train()
    trainer_of(
        compiled,
        tmp_path,
        [callback_of()],
        train_dataset=data,
        max_steps=3,
        torch_compile_backend="eager",
    ).train()
    trainer_of(plain, tmp_path, [callback_of()], train_dataset=data, max_steps=3).train()
    for one, two, three in zip(*(m.parameters() for m in (half, compiled, plain)), strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0.05)
        torch.testing.assert_close(two, three, rtol=0, atol=1e-5)


class _Fails(transformers.TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")


class _BadLabel(PixelDicts):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        return {**item, "labels": item["labels"] + (100 if index > 8 else 0)}


@pytest.mark.parametrize("event", ["on_step_end", "on_pre_optimizer_step", "on_log", "forward"])
def test_an_error_in_training_leaves_no_hook(tmp_path: Path, event: str) -> None:
    model = vit()
    fails = event != "forward"
    trainer = trainer_of(
        model,
        tmp_path,
        [callback_of(), *([_Fails(event)] if fails else [])],
        train_dataset=PixelDicts(64) if fails else _BadLabel(64),
        logging_steps=1,
        max_steps=4,
    )
    with pytest.raises(RuntimeError if fails else DataError):
        trainer.train()
    assert our_hooks(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_the_trainer_leaves_no_hook_even_between_step_begin_and_forward(tmp_path: Path) -> None:
    model = vit()
    trainer = trainer_of(
        model,
        tmp_path,
        [_Fails("on_step_begin")],
        kind=AdversarialTrainer,
        trainer_options={"threat_model": THREAT, "attack": ATTACK, "mean": MEAN, "std": STD},
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert our_hooks(model) == []


def test_resuming_equals_going_on(tmp_path: Path) -> None:
    settings = {
        "objective": "trades",
        "attack": {**ATTACK, "steps": 3, "steps_from": 1, "eps_warmup": 0.5},
    }
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 3}
    whole = trainer_of(vit(), tmp_path / "whole", [callback_of(**settings)], **common)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = trainer_of(vit(seed=1), tmp_path / "again", [callback_of(**settings)], **common)
    again.train(resume_from_checkpoint=str(checkpoint))
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    natural = trainer_of(vit(), tmp_path, [])
    trainer = trainer_of(vit(), tmp_path, [callback_of()])
    for kind, each in {"natural": natural, "robust": trainer}.items():
        each.train()
        each.save_model(str(tmp_path / kind))
    names = [sorted(p.name for p in (tmp_path / kind).iterdir()) for kind in ("natural", "robust")]
    assert names[0] == names[1]
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "robust").eval()
    values = torch.stack([item["pixel_values"] for item in PixelDicts(4)])
    with torch.no_grad():
        expected = trainer.model.eval()(values).logits
        torch.testing.assert_close(loaded(values).logits, expected)


def test_a_section_an_object_and_a_name_say_the_same(tmp_path: Path) -> None:
    threat = ThreatModel("linf", 0.1)
    variants = [
        callback_of(objective={"name": "trades"}, attack={**ATTACK, "loss": "kl"}),
        callback_of(
            objective=Trades(),
            threat_model=threat,
            attack=build_attack({**ATTACK, "loss": "kl", "threat_model": threat}),
        ),
        callback_of(objective="trades", threat_model={"norm": "linf", "eps": "0.1"}),
    ]
    models = []
    for callback in variants:
        models.append(vit())
        trainer_of(models[-1], tmp_path, [callback]).train()
    for one, two, three in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_label_smoothing_goes_to_the_objective(tmp_path: Path) -> None:
    smoothed, ours, data = vit(), vit(), PixelDicts(12)
    settings = {"threat_model": THREAT, "attack": ATTACK, "mean": MEAN, "std": STD}
    trainer = trainer_of(
        smoothed,
        tmp_path,
        [],
        kind=AdversarialTrainer,
        trainer_options=settings,
        train_dataset=data,
        label_smoothing_factor=0.2,
    )
    trainer.train()
    objective = {"name": "at", "label_smoothing": 0.2}
    trainer_of(ours, tmp_path, [callback_of(objective=objective)], train_dataset=data).train()
    for one, two in zip(smoothed.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.2"):
        trainer_of(vit(), tmp_path, [callback_of()], label_smoothing_factor=0.2)


def test_a_loss_function_gets_adversarial_outputs(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    custom, ours, data = vit(), vit(), PixelDicts(12)
    settings = {"threat_model": THREAT, "attack": ATTACK, "mean": MEAN, "std": STD}
    options = {"compute_loss_func": loss_of}
    trainer_of(
        custom,
        tmp_path,
        [],
        kind=AdversarialTrainer,
        trainer_options={**settings, **options},
        train_dataset=data,
    ).train()
    trainer_of(ours, tmp_path, [callback_of()], train_dataset=data).train()
    for one, two in zip(custom.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="AdversarialTrainer, which keeps them"):
        trainer_of(vit(), tmp_path, [callback_of()], trainer_options=options).train()
    with pytest.raises(ConfigError, match="loss of its own"):
        trainer_of(
            vit(),
            tmp_path,
            [],
            kind=AdversarialTrainer,
            trainer_options={**settings, **options, "objective": "trades"},
        )


def test_fare_keeps_an_encoders_features(tmp_path: Path) -> None:
    model = clip()
    callback = callback_of(objective="fare", evaluation={"attacks": ["pgd-3"]})
    trainer = trainer_of(
        model,
        tmp_path,
        [callback],
        train_dataset=PixelDicts(64),
        eval_dataset=PixelDicts(8),
        max_steps=8,
        learning_rate=0.05,
        optim="adamw_torch",
        optim_args=None,
    )
    before, _ = trainer.evaluate(), trainer.train()
    after = trainer.evaluate()
    assert before["eval_natural_loss"] == 0
    assert after["eval_robust_loss"] > 0
    assert our_hooks(model) == []


def test_other_objectives_and_attacks_train(tmp_path: Path) -> None:
    helper = build_model(
        "vit_tiny_patch16_224",
        num_classes=tiny.CLASSES,
        img_size=8,
        patch_size=4,
        depth=1,
        embed_dim=16,
        num_heads=2,
    )
    save_weights(tmp_path / "helper", helper.state_dict(), helper.spec)
    hat = {"name": "hat", "helper_model": str(tmp_path / "helper")}
    views = {"name": "multi_norm", "steps": 2, "other_norms": {"l2": 0.5}, "combine": "average"}
    for settings in (
        {"objective": "mart"},
        {"objective": "alp"},
        {"objective": hat},
        {"objective": "trades", "attack": views},
        {"attack": {**ATTACK, "keep_tokens": 0.5}},
        {"attack": {**ATTACK, "precision": "bf16"}},
        {"attack": "apgd"},
        {"attack": lambda model, x, y, generator: (x + 0.1).clamp(0, 1)},
    ):
        model = vit()
        start = [p.detach().clone() for p in model.parameters()]
        trainer_of(model, tmp_path, [callback_of(**settings)]).train()
        assert all(p.isfinite().all() for p in model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


# ---- what we rely on


def test_versions_are_those_that_were_tested() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^hf = (\[.*\])$", project, re.MULTILINE)
    assert found is not None
    extra = [Requirement(line) for line in json.loads(found[1])]
    assert {r.name for r in extra} == {"accelerate", "transformers"}
    for requirement in extra:
        assert requirement.specifier.contains(version(requirement.name)), requirement


def test_importing_dat_ds_does_not_import_the_trainer() -> None:
    code = "import sys, dat_ds, dat_ds.attacks; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_loss_that_is_nan_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = vit()
    outputs = 0

    def spoil(_module: nn.Module, _given: object, logits: Tensor) -> Tensor:
        nonlocal outputs
        outputs += model.training
        return logits * float("nan") if model.training and outputs > 1 else logits

    model.classifier.register_forward_hook(spoil)
    trainer = trainer_of(
        model, tmp_path, [callback_of()], train_dataset=PixelDicts(12), logging_steps=1
    )
    logging.getLogger("dat_ds").propagate = True
    trainer.train()
    told = [r.getMessage() for r in caplog.records if "The loss is nan" in r.getMessage()]
    assert len(told) == 1
    assert "in step 2, micro-step 0, on rank 0" in told[0]
