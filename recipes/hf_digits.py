"""Hugging Face's Trainer on real digits, with and without the callback; about a minute on a CPU.

With ZeRO-2, or 3, on two ranks: deepspeed --num_accelerators 2 recipes/hf_digits.py --zero 2
"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments, ViTForImageClassification

ATTACKS = {"naturally": "none", "adversarially": {"name": "pgd", "steps": 5, "step_size": "1/16"}}


class Normalized:
    """Samples as an image processor gives them to the Trainer."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.data[index]
        return {"pixel_values": (x - 0.5) / 0.5, "labels": y}


def arguments_of(options: argparse.Namespace) -> "TrainingArguments":
    """Of the Trainer: plain, or under DeepSpeed."""
    import torch
    from transformers import TrainingArguments

    deepspeed = {
        "zero_optimization": {"stage": options.zero},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return TrainingArguments(
        output_dir="runs/hf_digits",
        deepspeed=None if options.zero is None else deepspeed,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def tiny_vit() -> "ViTForImageClassification":
    """A vision transformer for the digits of 8 x 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return ViTForImageClassification(config)


def train(how: str, attack: Any, options: argparse.Namespace) -> None:
    """Train a model and tell its accuracies."""
    from transformers import Trainer, set_seed

    from dat_ds.data import build_data
    from dat_ds.integrations.hf import AdversarialTrainingCallback

    set_seed(0)
    # First the arguments: under ZeRO-3 they are what shards a model as it is built.
    arguments = arguments_of(options)
    digits = build_data("digits")
    callback = AdversarialTrainingCallback(
        threat_model={"norm": "linf", "eps": "2/16"}, attack=attack, mean=[0.5], std=[0.5]
    )
    trainer = Trainer(
        tiny_vit(),
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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage, under DeepSpeed")
    parser.add_argument("--epochs", type=float, default=20, help="length of each training")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs <= 0:  # the Trainer would train nothing, without a word
        parser.error(f"--epochs {options.epochs:g}: give a number above 0")
    return options


def train_both(options: argparse.Namespace) -> int:
    """Train with every attack of the table above."""
    for how, attack in ATTACKS.items():
        train(how, attack, options)
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: train_both(options))
