"""Robust fine-tuning of a CLIP image encoder without labels (FARE), by Hugging Face's Trainer.

Takes any CLIP folder or hub id; without one, a tiny encoder of random weights shows that it runs:

    python recipes/hf_clip_fare.py --model openai/clip-vit-base-patch32 --images my_photos/
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's own
STD = [0.26862954, 0.26130258, 0.27577711]


class Images:
    """Images without labels: those of a folder's subfolders, or random ones."""

    def __init__(self, folder: str | None, size: int) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        self.normalized = v2.Normalize(MEAN, STD)
        steps = [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size)]
        steps += [v2.ToDtype(torch.float32, scale=True), self.normalized]
        self.folder = None if folder is None else ImageFolder(folder, v2.Compose(steps))
        self.size = size

    def __len__(self) -> int:
        return 256 if self.folder is None else len(self.folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.folder is not None:
            return {"pixel_values": self.folder[index][0]}
        generator = torch.Generator().manual_seed(index)
        x = torch.rand(3, self.size, self.size, generator=generator)
        return {"pixel_values": self.normalized(x)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="CLIP model; default: a tiny one of random weights")
    parser.add_argument("--images", help="folder of folders of image files")
    parser.add_argument("--eps", default="4/255", help="l-infinity radius")
    parser.add_argument("--output", default="runs/hf_clip_fare")
    options = parser.parse_args()
    if options.images is not None and not any(Path(options.images).glob("*/*.*")):
        parser.error(f"--images {options.images}: no image in a subfolder, as in DIR/all/1.jpg")
    return options


def build_encoder(name: str | None) -> "CLIPVisionModelWithProjection":
    """The encoder of a folder or hub id, or a tiny one of random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from dat_ds.errors import ModelError

    if name is not None:
        try:
            return CLIPVisionModelWithProjection.from_pretrained(name)
        except OSError as error:
            raise ModelError(f"--model {name}: {error}") from None
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return CLIPVisionModelWithProjection(config)


def finetune(options: argparse.Namespace) -> int:
    """Fine-tune the encoder, and tell how far attacks move its features before and after."""
    from transformers import Trainer, TrainingArguments, set_seed

    from dat_ds.integrations.hf import AdversarialTrainingCallback

    set_seed(0)
    model = build_encoder(options.model)
    data = Images(options.images, model.config.image_size)
    arguments = TrainingArguments(
        options.output,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=2,
        learning_rate=1e-4,
        report_to="none",
    )
    callback = AdversarialTrainingCallback(
        threat_model={"norm": "linf", "eps": options.eps},
        attack={"name": "pgd", "steps": 10},
        objective="fare",
        mean=MEAN,
        std=STD,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print("Squared distance of attacked features from the original ones, before and after:")
    print(f"{before['eval_robust_loss']:.4g}, {after['eval_robust_loss']:.4g}")
    trainer.save_model(options.output)
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: finetune(options))
