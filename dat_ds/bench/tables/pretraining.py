"""Few labels: robust accuracy with and without self-supervised pre-training, on the digits."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dat_ds.bench.records import read_record
from dat_ds.bench.tables.runs import unknown_rows
from dat_ds.config import RunConfig, load_config
from dat_ds.errors import ConfigError, UserError
from dat_ds.files import check_files, write_json
from dat_ds.training.run import train

IMAGES, BATCH, STEPS = 1438, 64, 400
_PGD = {"steps": 3, "step_size": "1/16"}
_CONTRASTIVE = {"name": "contrastive", "flip": 0.0}  # a mirrored digit is not a digit
PRETRAINING: dict[str, dict[str, Any]] = {
    "from_scratch": {},
    "rotation": {"objective": {"name": "rotation"}},
    "contrastive": {
        "objective": _CONTRASTIVE | {"temperature": 0.1, "crop_area": 0.6},
        "attack": _PGD | {"eps_warmup": 0.5},
    },
    "contrastive_defaults": {"objective": _CONTRASTIVE},
}
"""Changes of pre-training in the ``dat`` section, by method: ``from_scratch`` is AT from random
weights; ``contrastive_defaults`` takes the published temperature and crops, which are for larger
images and batches, and the full eps from the start."""


def compare_pretraining(
    method: str, labelled: float, seeds: Sequence[int], *, output: Path | None = None
) -> Iterator[str]:
    """Pre-train on all images without their labels, then train by AT on a part with labels.

    Args:
        method: One of :data:`PRETRAINING`.
        labelled: Fraction of the images that keep their labels, in (0, 1].
        seeds: Of the runs.
        output: JSON file; the runs are added to those that it holds.

    Yields:
        A line on every seed, as soon as its record is written.

    Raises:
        UserError: For mistakes, before anything is trained, and where a run was stopped.
    """
    if problems := unknown_rows([method], PRETRAINING):
        raise ConfigError("\n".join(problems))
    for seed in seeds:
        _config_of(Path(), seed, labelled)
    check_files(output=output)
    runs: list[dict[str, Any]] = []
    if output is not None and output.exists():
        command = f"python recipes/pretrain_finetune.py {method} --output FILE"
        runs = read_record(str(output), command).get("runs", [])
    for seed in seeds:
        with tempfile.TemporaryDirectory() as temporary:
            record = _pretrained_then_at(method, labelled, seed, Path(temporary))
        if output is not None:
            runs = [*runs, record]
            write_json(output, {"runs": sorted(runs, key=lambda run: run["seed"])})
        clean, robust = record["natural_acc"], record["robust_acc"]["pgd-20"]
        yield f"seed {seed}, {method}: clean {clean:.1%}, PGD-20 {robust:.1%}"


def _config_of(folder: Path, seed: int, labelled: float = 1.0, **dat: Any) -> RunConfig:
    """A run of ``STEPS`` steps on a part of the digits."""
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
        "attack": _PGD,
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


def _run(folder: Path, seed: int, labelled: float = 1.0, **dat: Any) -> dict[str, Any]:
    """Record of what :func:`_config_of` describes, trained now."""
    record = train(_config_of(folder, seed, labelled, **dat))
    if record is None:
        raise UserError(f"Stopped: go on with --seeds {seed} and those after it.")
    return record


def _pretrained_then_at(method: str, labelled: float, seed: int, folder: Path) -> dict[str, Any]:
    """Record of AT on few labels, and how the pre-training before it went."""
    if not PRETRAINING[method]:
        return _run(folder, seed, labelled)
    before = folder / "pretrained"
    _run(before, seed, **PRETRAINING[method])
    rows = (before / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    config = json.loads((before / "config.json").read_text(encoding="utf-8"))
    record = _run(folder / "at", seed, labelled, model={"pretrained": str(before)})
    return record | {"pretraining": {"last_metrics": json.loads(rows[-1]), "config": config}}
