"""Few labels: robust accuracy with and without self-supervised pre-training, on the digits.

python recipes/pretrain_finetune.py contrastive --labels 50 --seeds 2

Pre-trains on all training images without their labels, then trains by AT on a few labelled ones,
and on the same ones from random weights.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

import dat_ds
from dat_ds.engine.build import threat_of
from dat_ds.engine.run import build_data_of, build_model_of, train
from dat_ds.evaluation import evaluate

BATCH, EPOCHS, FEW_LABEL_STEPS = 64, 20, 400
OPTIONS: dict[str, dict[str, Any]] = {"contrastive": {"flip": 0.0}, "rotation": {}}


def config(seed: int, **dat: Any) -> dict[str, Any]:
    """A run on the digits."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.01}},
        "dat": {
            "data": {"name": "digits", "augment": "crop"},
            "threat_model": {"eps": "2/16"},
            "attack": {"steps": 3, "step_size": "1/16"},
            "seed": seed,
            **dat,
        },
    }


def train_on_few(labels: int, seed: int, pretrained: Path | None) -> tuple[float, float]:
    """Clean and PGD-20 accuracy on the test images after AT on ``labels`` images."""
    weights = {} if pretrained is None else {"pretrained": str(pretrained)}
    epochs = FEW_LABEL_STEPS / -(-labels // BATCH)
    schedule = {"epochs": epochs, "warmup_epochs": epochs / 4}
    run = dat_ds.load_config(config(seed, model=weights, schedule=schedule))
    splits = build_data_of(run)
    engine, _, loader, _ = dat_ds.initialize(
        model=build_model_of(run, splits),
        config=run,
        training_data=Subset(splits.train, range(labels)),
    )
    while engine.global_steps < FEW_LABEL_STEPS:
        for x, y in loader:
            engine.backward(engine(x, y))
            engine.step()
    with engine.frozen() as model:
        record = evaluate(model, splits.test, threat_of(run.dat), ["pgd-20"])
    engine.close()
    return record.natural_acc, record.robust_acc["pgd-20"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objective", choices=OPTIONS)
    parser.add_argument("--labels", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", help="write the numbers as JSON")
    options = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rows = []
    for seed in range(options.seeds):
        objective = {"name": options.objective, **OPTIONS[options.objective]}
        with tempfile.TemporaryDirectory() as folder:
            schedule = {"epochs": EPOCHS, "warmup_epochs": EPOCHS / 4}
            output = {"output_dir": folder, "evaluation": {"validation_every_epochs": EPOCHS}}
            train(dat_ds.load_config(config(seed, objective=objective, schedule=schedule, **output)))
            for name, run in ((f"{options.objective}, then at", Path(folder)), ("at", None)):
                clean, robust = train_on_few(options.labels, seed, run)
                rows.append({"training": name, "seed": seed, "clean": clean, "pgd-20": robust})
                print(f"seed {seed}, {name}: clean {clean:.1%}, PGD-20 {robust:.1%}", flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
