"""A model that the Trainer saved, judged by an independent library."""

from __future__ import annotations

from pathlib import Path

import foolbox
import torch
import transformers

from dat_ds.attacks import ThreatModel, fgsm
from dat_ds.integrations.hf import AdversarialTrainingCallback
from dat_ds.integrations.hf.forward import PixelView
from dat_ds.integrations.hf.pixels import PixelScale
from tests.hf_tiny import MEAN, STD, PixelDicts, trainer_of, vit


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.model(values).logits


def test_foolbox_finds_the_same_images_for_a_saved_model(tmp_path: Path) -> None:
    threat, data = ThreatModel("linf", 0.1), PixelDicts(16)
    callback = AdversarialTrainingCallback(
        threat_model=threat, attack={"name": "pgd", "steps": 2}, mean=MEAN, std=STD
    )
    trainer = trainer_of(vit(), tmp_path, [callback], train_dataset=data, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path))
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    theirs = foolbox.PyTorchModel(
        Logits(loaded).eval(), bounds=(0, 1), preprocessing={"mean": MEAN, "std": STD, "axis": -3}
    )
    attack = foolbox.attacks.LinfFastGradientAttack()
    _, clipped, fooled = attack(theirs, data.pixels, data.labels, epsilons=threat.eps)
    view = PixelView(trainer.model.eval(), PixelScale(MEAN, STD), "classes")
    x_adv = fgsm(view, data.pixels, data.labels, threat=threat)
    torch.testing.assert_close(x_adv, clipped)
    with torch.no_grad():
        assert torch.equal(view(x_adv).argmax(1) != data.labels, fooled)
