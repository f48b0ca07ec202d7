"""What the callback of Hugging Face's Trainer shares with the engine: weights, passes, labels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dat_ds.attacks import SampleGenerator, ThreatModel, pgd
from dat_ds.errors import ConfigError, DataError
from dat_ds.integrations.hf import AdversarialTrainer
from dat_ds.minmax import inner
from tests.distributed import tiny
from tests.hf_tiny import MEAN, STD, PixelDicts, our_hooks, trainer_of, vit
from tests.unit.hf_helpers import ATTACK, THREAT, callback_of

RADIUS, BETA, WEIGHT = 0.05, 6.0, 0.5
PERTURBATIONS = [{"name": "awp", "radius": RADIUS}, {"name": "sam", "radius": RADIUS}]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=tiny.CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(pixel_values=(x - 0.5) / 0.5).logits


def attacked(model: nn.Module, x: Tensor, y: Tensor, step: int, loss: str = "ce") -> Tensor:
    model.eval()
    images = pgd(
        lambda z: logits_of(model, z),
        x,
        y,
        threat=ThreatModel("linf", THREAT["eps"]),
        steps=ATTACK["steps"],
        step_size=ATTACK["step_size"],
        loss=loss,
        generator=SampleGenerator(0, step),
    )
    model.train()
    return images


def perturb(parameters: list[nn.Parameter], gradients: Any, name: str) -> None:
    """AWP's and SAM's step up the loss, written out."""
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            if name == "sam":
                p += RADIUS * g / norm
            elif p.ndim > 1:
                p += RADIUS * p.norm() * g / g.norm().clamp_min(1e-38)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: p["name"])
def test_perturbed_weights_equal_plain_pytorch(perturbation: Any, tmp_path: Path) -> None:
    ours, plain, data = vit(), vit(), PixelDicts(12)
    callback = callback_of(weight_perturbation=perturbation)
    trainer_of(ours, tmp_path, [callback], train_dataset=data, max_steps=3).train()
    parameters = list(plain.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = data.pixels[4 * step : 4 * step + 4], data.labels[4 * step : 4 * step + 4]
        x_adv = attacked(plain, x, y, step)
        loss = F.cross_entropy(logits_of(plain, x_adv), y)
        saved = [p.detach().clone() for p in parameters]
        perturb(parameters, torch.autograd.grad(loss, parameters), perturbation["name"])
        optimizer.zero_grad()
        F.cross_entropy(logits_of(plain, x_adv), y).backward()
        with torch.no_grad():
            for p, value in zip(parameters, saved, strict=True):
                p.copy_(value)
        optimizer.step()
    for one, two in zip(ours.parameters(), parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


class _Interrupted(Exception):
    pass


def test_an_error_brings_perturbed_weights_back(tmp_path: Path) -> None:
    model = vit()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}

    class Failing(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            super().compute_loss(*args, **kwargs)
            found = dict(model.named_parameters())
            assert any(not torch.equal(p, start[k]) for k, p in found.items())
            raise _Interrupted

    callback = callback_of(weight_perturbation="sam")
    with pytest.raises(_Interrupted):
        trainer_of(model, tmp_path, [callback], kind=Failing).train()
    callback.detach()
    assert all(torch.equal(p, start[k]) for k, p in model.named_parameters())
    assert our_hooks(model) == []


def test_a_perturbation_up_another_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not up yours"):
        trainer_of(
            vit(),
            tmp_path,
            [],
            kind=AdversarialTrainer,
            trainer_options={
                "threat_model": THREAT,
                "attack": ATTACK,
                "mean": MEAN,
                "std": STD,
                "weight_perturbation": "awp",
                "compute_loss_func": lambda outputs, labels, **_: outputs["logits"].mean(),
            },
        )
    reentrant = {"gradient_checkpointing": True}
    reentrant["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="cannot be taken apart"):
        trainer_of(vit(), tmp_path, [callback_of(weight_perturbation="awp")], **reentrant)


def test_folded_batch_norm_trains_the_same_model(tmp_path: Path) -> None:
    models, data = [resnet(), resnet()], PixelDicts(9)  # the last batch is of a single image
    for model, folds in zip(models, (False, True), strict=True):
        callback = callback_of(attack={**ATTACK, "fold_batch_norm": folds})
        trainer_of(model, tmp_path, [callback], train_dataset=data, max_steps=3).train()
    states = [model.state_dict() for model in models]
    start = resnet().state_dict()
    moved = max(float((states[0][k] - start[k]).abs().max()) for k in start if "weight" in k)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0.02 * moved)


@pytest.mark.parametrize(("speedup", "taken"), [(2.0, "bf16"), (1.0, "the model's own precision")])
def test_the_attack_takes_the_faster_precision(
    speedup: float, taken: str, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(inner, "product_speedup", lambda *_: 2.0)
    monkeypatch.setattr(inner, "gradient_speedup", lambda *_: speedup)
    callback = callback_of(attack={**ATTACK, "precision": "auto"})
    with caplog.at_level(logging.INFO, logger="dat_ds"):
        trainer_of(vit(), tmp_path, [callback]).train()
    said = [r.getMessage() for r in caplog.records if "precision='auto'" in r.getMessage()]
    assert len(said) == 1
    assert said[0].endswith(f"taking {taken}.")


def unlabelled(count: int) -> PixelDicts:
    """Of four images one has no label, and one a class that a model gave."""
    data = PixelDicts(count)
    data.labels[1::4] = -1
    data.labels[2::4] = -2 - data.labels[2::4]
    return data


def test_unlabelled_images_equal_plain_pytorch(tmp_path: Path) -> None:
    ours, plain, data = vit(), vit(), unlabelled(12)
    objective = {"name": "trades", "beta": BETA, "unlabelled_weight": WEIGHT}
    trainer = trainer_of(
        ours,
        tmp_path,
        [callback_of(objective=objective)],
        train_dataset=data,
        max_steps=3,
        logging_steps=1,
    )
    trainer.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = data.pixels[4 * step : 4 * step + 4], data.labels[4 * step : 4 * step + 4]
        classes = torch.where(y < -1, -2 - y, y)
        x_adv = attacked(plain, x, classes, step, loss="kl")
        natural, robust = logits_of(plain, torch.cat([x, x_adv])).chunk(2)
        ce = F.cross_entropy(natural, classes, ignore_index=-1, reduction="none")
        p, q = natural.log_softmax(dim=1), robust.log_softmax(dim=1)
        kl = (p.exp() * (p - q)).sum(dim=1)
        weights = torch.where(y >= 0, 1.0, WEIGHT)
        optimizer.zero_grad()
        (weights * (ce + BETA * kl)).mean().backward()
        optimizer.step()
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    accuracies = [e["robust_accuracy"] for e in trainer.state.log_history if "loss" in e]
    assert all(accuracy in (0.0, 0.5, 1.0) for accuracy in accuracies)  # of two true labels


@pytest.mark.parametrize(
    ("settings", "label", "message"),
    [
        ({"objective": "at"}, -1, "the objective 'at' has no use"),
        ({"objective": "trades"}, -100, "write -1"),
        ({"objective": "trades", "attack": {**ATTACK, "loss": "ce"}}, -1, "'loss': 'kl'"),
        ({"objective": {"name": "trades", "grad_align": 0.1}}, -1, "grad_align needs labels"),
    ],
)
def test_labels_that_mean_nothing_are_refused(
    settings: dict[str, Any], label: int, message: str, tmp_path: Path
) -> None:
    data = PixelDicts(8)
    data.labels[::2] = label
    with pytest.raises(DataError, match=message):
        trainer_of(vit(), tmp_path, [callback_of(**settings)], train_dataset=data).train()
