"""Few labels: robust accuracy with and without self-supervised pre-training, on the digits.

python recipes/pretrain_finetune.py contrastive --labelled 0.04 --seeds 0 1 2 --output FILE.json

Pre-trains on all training images without their labels, then trains by AT on the labelled part of
them. ``from_scratch`` is AT from random weights; ``contrastive_defaults`` takes the published
temperature and crops, which are for larger images and batches, and the full eps from the start.
"""

import argparse
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dat_ds.config import RunConfig

IMAGES, BATCH, STEPS = 1438, 64, 400
PGD = {"steps": 3, "step_size": "1/16"}
CONTRASTIVE = {"name": "contrastive", "flip": 0.0}  # a mirrored digit is not a digit
PRETRAINING: dict[str, dict[str, Any]] = {
    "from_scratch": {},
    "rotation": {"objective": {"name": "rotation"}},
    "contrastive": {
        "objective": CONTRASTIVE | {"temperature": 0.1, "crop_area": 0.6},
        "attack": PGD | {"eps_warmup": 0.5},
    },
    "contrastive_defaults": {"objective": CONTRASTIVE},
}


def config_of(folder: Path, seed: int, labelled: float = 1.0, **dat: Any) -> "RunConfig":
    """A run of ``STEPS`` steps on a part of the digits."""
    from dat_ds import load_config
    from dat_ds.errors import ConfigError

    if not 0 < labelled <= 1:
        raise ConfigError(f"--labelled {labelled}: give a fraction above 0, and at most 1.")
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
        "attack": PGD,
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
    return load_config(config)


def run(folder: Path, seed: int, labelled: float = 1.0, **dat: Any) -> dict[str, Any]:
    """Train what :func:`config_of` describes, and return the record."""
    from dat_ds.errors import UserError
    from dat_ds.training.run import train

    record = train(config_of(folder, seed, labelled, **dat))
    if record is None:
        raise UserError(f"Stopped: go on with --seeds {seed} and those after it.")
    return record


def pretrained_then_at(method: str, labelled: float, seed: int, folder: Path) -> dict[str, Any]:
    """Record of AT on few labels, and how the pre-training before it went."""
    if method == "from_scratch":
        return run(folder, seed, labelled)
    run(folder / "pretrained", seed, **PRETRAINING[method])
    rows = (folder / "pretrained" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = run(folder / "at", seed, labelled, model={"pretrained": str(folder / "pretrained")})
    config = json.loads((folder / "pretrained" / "config.json").read_text(encoding="utf-8"))
    return record | {"pretraining": {"last_metrics": json.loads(rows[-1]), "config": config}}


def compare(options: argparse.Namespace) -> int:
    """Print a line on every seed, and add its record to the file."""
    from dat_ds.bench.records import read_record
    from dat_ds.files import check_files, write_json

    for seed in options.seeds:
        config_of(Path(), seed, options.labelled)  # mistakes before anything is trained
    check_files(output=options.output)
    runs: list[dict[str, Any]] = []
    if options.output is not None and options.output.exists():
        command = f"python recipes/pretrain_finetune.py {options.method} --output FILE"
        runs = read_record(str(options.output), command).get("runs", [])
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            record = pretrained_then_at(options.method, options.labelled, seed, Path(temporary))
        clean, robust = record["natural_acc"], record["robust_acc"]["pgd-20"]
        print(f"seed {seed}, {options.method}: clean {clean:.1%}, PGD-20 {robust:.1%}", flush=True)
        if options.output is not None:
            runs = [*runs, record]
            write_json(options.output, {"runs": sorted(runs, key=lambda run: run["seed"])})
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=PRETRAINING, help="how the model is pre-trained")
    parser.add_argument(
        "--labelled", type=float, default=0.04, metavar="FRACTION", help="images with a label"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the runs are added to those of this file"
    )
    options = parser.parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: compare(options))
