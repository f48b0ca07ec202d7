"""Hugging Face's Trainer on real digits, with and without the callback; about a minute on a CPU.

With ZeRO-2, or 3, on two ranks: deepspeed --num_accelerators 2 recipes/hf_digits.py --zero 2
"""

import argparse
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from dat_ds.data import build_data
from dat_ds.integrations.hf import AdversarialTrainingCallback

ATTACKS = {"naturally": "none", "adversarially": {"name": "pgd", "steps": 5, "step_size": "1/16"}}


class Normalized(Dataset[dict[str, Any]]):
    """Samples as an image processor gives them to the Trainer."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.data[index]
        return {"pixel_values": (x - 0.5) / 0.5, "labels": y}


def train(how: str, attack: Any, options: argparse.Namespace) -> None:
    """Train a model and tell its accuracies."""
    set_seed(0)
    zero = {
        "zero_optimization": {"stage": options.zero},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    arguments = TrainingArguments(
        output_dir="runs/hf_digits",
        deepspeed=None if options.zero is None else zero,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    width = {"hidden_size": 64, "intermediate_size": 256, "initializer_range": 0.1}
    config = ViTConfig(**images, **width, num_hidden_layers=4, num_attention_heads=4)
    digits, threat = build_data("digits"), {"norm": "linf", "eps": "2/16"}
    scale = {"mean": [0.5], "std": [0.5]}
    callback = AdversarialTrainingCallback(threat_model=threat, attack=attack, **scale)
    trainer = Trainer(
        ViTForImageClassification(config),
        arguments,
        train_dataset=Normalized(digits.train),
        eval_dataset=Normalized(digits.test),
        callbacks=[callback],
    )
    trainer.train()
    found = trainer.evaluate()
    clean, robust = (found[f"eval_{kind}_accuracy"] for kind in ("natural", "robust"))
    if trainer.is_world_process_zero():
        print(f"Trained {how}: clean {clean:.1%}, under PGD-20 {robust:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zero", type=int, help="ZeRO stage, under DeepSpeed")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    for how, attack in ATTACKS.items():
        train(how, attack, parser.parse_args())
