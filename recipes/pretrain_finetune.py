"""Few labels: robust accuracy with and without self-supervised pre-training, on the digits.

python recipes/pretrain_finetune.py contrastive --labelled 0.04 --seeds 1

Pre-trains on all training images without their labels, then trains by AT on the labelled part of
them, and for comparison on that part from random weights.
"""

import argparse
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

IMAGES, BATCH, STEPS = 1438, 64, 400
OPTIONS = {"contrastive": {"flip": 0.0}, "rotation": {}}  # a mirrored digit is no digit


def run(folder: Path, seed: int, labelled: float = 1.0, **dat: Any) -> dict[str, Any]:
    """Train on a part of the digits for ``STEPS`` steps, and return the record."""
    import dat_ds
    from dat_ds.training.run import train

    epochs = STEPS / math.ceil(labelled * IMAGES / BATCH)
    sections = {
        "data": {
            "name": "digits",
            "augment": "crop",
            "validation_fraction": 0,  # its labels would choose the checkpoint
            "labelled_fraction": labelled,
            "drop_unlabelled": labelled < 1,
        },
        "threat_model": {"eps": "2/16"},
        "attack": {"steps": 3, "step_size": "1/16"},
        "schedule": {"epochs": epochs, "warmup_epochs": epochs / 4},
        "checkpoint": {"every_epochs": epochs},
        "evaluation": {"pictures": 0},
        "seed": seed,
        "output_dir": str(folder),
    }
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.01}},
        "dat": sections | dat,
    }
    record = train(dat_ds.load_config(config))
    assert record is not None
    return record


def compare(objective: str, labelled: float, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Records of AT on few labels: after pre-training, and from random weights."""
    run(folder / "pretrained", seed, objective={"name": objective, **OPTIONS[objective]})
    model = {"pretrained": str(folder / "pretrained")}
    finetuned = run(folder / "finetuned", seed, labelled, model=model)
    return [finetuned, run(folder / "from_scratch", seed, labelled)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("objective", choices=OPTIONS, help="objective of the pre-training")
    parser.add_argument(
        "--labelled", type=float, default=0.04, metavar="FRACTION", help="images with a label"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the records as JSON")
    options = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    records: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            pair = compare(options.objective, options.labelled, seed, Path(temporary))
        for name, record in zip((f"{options.objective}, then at", "at"), pair, strict=True):
            clean, robust = record["natural_acc"], record["robust_acc"]["pgd-20"]
            print(f"seed {seed}, {name}: clean {clean:.1%}, PGD-20 {robust:.1%}", flush=True)
        records += pair
    if options.output:
        from dat_ds.files import write_json

        write_json(options.output, {"runs": records})
