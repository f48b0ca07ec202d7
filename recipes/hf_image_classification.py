"""Fine-tune an image classifier of the hub to be robust; Hugging Face's own example, one callback.

python recipes/hf_image_classification.py --model google/vit-base-patch16-224-in21k --data photos
python recipes/hf_image_classification.py    # a small ViT on digits, without a download

``photos`` holds ``train/CLASS/*.jpg`` and ``validation/CLASS/*.jpg``.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from sklearn.datasets import load_digits
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from dat_ds.commands import run_recipe
from dat_ds.errors import ModelError
from dat_ds.integrations.hf import AdversarialTrainingCallback


def digits() -> tuple[DatasetDict, ViTImageProcessor, ViTForImageClassification]:
    """Scikit-learn's digits of 8 x 8 pixels, and a processor and a model for them."""
    found = load_digits()
    images = list((found.images * 255 / 16).astype(np.uint8))
    data = Dataset.from_dict({"image": images, "label": found.target})
    data = data.cast_column("image", Image()).cast_column("label", ClassLabel(num_classes=10))
    parts = data.train_test_split(test_size=0.2, seed=0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_labels=10,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    model = ViTForImageClassification(config)
    return DatasetDict(train=parts["train"], validation=parts["test"]), processor, model


def hub(model: str, folder: str) -> tuple[DatasetDict, Any, Any]:
    """An image folder, and a model of the hub (or of a folder) with a head for its classes."""
    data = load_dataset("imagefolder", data_dir=folder)
    names = data["train"].features["label"].names
    try:
        processor = AutoImageProcessor.from_pretrained(model)
        classifier = AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(names), id2label=dict(enumerate(names))
        )
    except OSError as error:  # there is no such model
        raise ModelError(f"--model {model}: {error}") from None
    return data, processor, classifier


def transforms(processor: Any) -> tuple[Any, Any]:
    """What ``set_transform`` takes for training, and for evaluation without any randomness."""
    size = processor.size.get("height") or processor.size["shortest_edge"]
    last = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(processor.image_mean, processor.image_std),
    ]
    for_training = v2.Compose([v2.RandomResizedCrop(size, scale=(0.7, 1)), *last])
    for_evaluation = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *last])

    def apply(compose: v2.Compose) -> Any:
        def transform(rows: dict[str, Any]) -> dict[str, Any]:
            images = [compose(image.convert("RGB")) for image in rows["image"]]
            return {"pixel_values": images, "labels": rows["label"]}

        return transform

    return apply(for_training), apply(for_evaluation)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images that are classified correctly, for ``compute_metrics``."""
    hits = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(hits.mean())}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="of the hub, or a folder; with --data")
    parser.add_argument("--data", help="an image folder")
    parser.add_argument("--eps", help="radius in pixels of [0, 1]; default 4/255, digits 2/16")
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--output", default="runs/hf_image_classification")
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON, such as ZeRO-2's")
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together; without both, a small ViT learns digits")
    for part in ("train", "validation") if options.data is not None else ():
        if not any(Path(options.data, part).glob("*/*.*")):
            parser.error(f"--data {options.data}: no image {options.data}/{part}/CLASS/FILE")
    if options.epochs <= 0:  # the Trainer would train nothing, without a word
        parser.error(f"--epochs {options.epochs:g}: give a number above 0")
    return options


def finetune(options: argparse.Namespace) -> int:
    """Fine-tune the model, keep the most robust epoch, and write its card."""
    arguments = TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3 if options.model is None else 5e-5,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="robust_accuracy",
        remove_unused_columns=False,  # the transform needs the column "image"
        deepspeed=options.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    small = options.model is None
    data, processor, model = digits() if small else hub(options.model, options.data)
    for part, transform in zip(("train", "validation"), transforms(processor), strict=True):
        data[part].set_transform(transform)
    callback = AdversarialTrainingCallback(
        threat_model={"norm": "linf", "eps": options.eps or ("2/16" if small else "4/255")},
        attack={"name": "pgd", "steps": 3, "step_size": "eps/2"},
        evaluation={"attacks": ["pgd-10"], "num_examples": 200},
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
        compute_metrics=accuracy,
        callbacks=[callback, EarlyStoppingCallback(early_stopping_patience=5)],
    )
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        print(f"Best: {trainer.state.best_model_checkpoint}")
        clean, robust = (found[f"eval_{kind}_accuracy"] for kind in ("natural", "robust"))
        print(f"Clean {clean:.1%}, under PGD-10 {robust:.1%}")
    return 0


if __name__ == "__main__":
    options = parse()
    run_recipe(lambda: finetune(options))
