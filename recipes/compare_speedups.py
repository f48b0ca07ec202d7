"""Robust accuracy with what makes attack passes cheaper, over three seeds, on digits.

python recipes/compare_speedups.py                  # about 15 minutes on a CPU
Runs stay in runs/compare_speedups; one that is there already is not trained again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from dat_ds.cli.main import main

OUTPUT = Path("runs/compare_speedups")
ATTACKS = ["pgd-20", "apgd-ce-50"]
SEEDS = (0, 1, 2)
CNN = {"name": "resnet18", "stem": "cifar", "options": {"channels": [16, 32, 64, 128]}}
OF_BOTH: dict[str, dict[str, Any]] = {
    "float32": {},
    "attack in bf16": {"attack": {"precision": "bf16"}},
    "compiled": {"engine": {"compile": "all"}},
}
OF_VIT: dict[str, dict[str, Any]] = {
    "attack in int8": {"attack": {"precision": "int8"}},
    "attack in fp8": {"attack": {"precision": "fp8"}},
    "4 micro-batches attacked as one": {"engine": {"attack_micro_batches": 4}},
}
OF_CNN: dict[str, dict[str, Any]] = {
    "channels last": {"engine": {"channels_last": True}},
    "BatchNorm folded": {"attack": {"fold_batch_norm": True}},
}
ROWS = {"ViT": ({}, OF_BOTH | OF_VIT, 30), "CNN": (CNN, OF_BOTH | OF_CNN, 10)}


def record_of(name: str, model: dict[str, Any], keys: dict[str, Any], epochs: int) -> Any:
    """The record of a run, trained now unless it is there."""
    folder = OUTPUT / name
    if not (folder / "record.json").exists():
        values = json.loads(Path("ds_configs/zero2.json").read_text(encoding="utf-8"))
        if "attack_micro_batches" in keys.get("engine", {}):
            values |= {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4}
        dat = values["dat"]
        dat |= {"model": model, "seed": int(name[-1]), "output_dir": str(folder)}
        dat["evaluation"] = {"attacks": ATTACKS, "pictures": 0}
        dat["schedule"]["epochs"] = epochs
        for section, settings in keys.items():
            dat[section] = dat.get(section, {}) | settings
        OUTPUT.mkdir(parents=True, exist_ok=True)
        config = OUTPUT / f"{name}.json"
        config.write_text(json.dumps(values), encoding="utf-8")
        if code := main(["train", "--deepspeed_config", str(config), "--resume", "auto"]):
            sys.exit(code)
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * statistics.fmean(values):.1f} +- {100 * statistics.stdev(values):.1f}"


if __name__ == "__main__":
    lines = [f"| training | clean % | {' % | '.join(ATTACKS)} % | train s |"]
    lines.append("| --- " * (len(ATTACKS) + 3) + "|")
    for kind, (model, rows, epochs) in ROWS.items():
        for row, keys in rows.items():
            names = [f"{kind} {row} {seed}" for seed in SEEDS]
            records = [record_of(name, model, keys, epochs) for name in names]
            cells = [f"{kind}, {row}", spread([r["natural_acc"] for r in records])]
            cells += [spread([r["robust_acc"][name] for r in records]) for name in ATTACKS]
            seconds = statistics.median(r["seconds"]["train"] for r in records)
            lines.append(f"| {' | '.join(cells)} | {seconds:.0f} |")
    print("\n".join(lines))
