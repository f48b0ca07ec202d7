"""Every attack and objective on digits: clean and robust accuracy, and seconds of training.

python recipes/compare_methods.py                 # all rows, about half a minute each on a CPU
python recipes/compare_methods.py pgd trades      # some of them
A row's run stays in runs/compare_methods/ROW; a row that is there already is not trained again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dat_ds.cli.main import main

OUTPUT = Path("runs/compare_methods")
ATTACKS = ["pgd-20", "apgd-ce-50", "apgd-dlr-50"]
FEW = {"labelled_fraction": 0.1}
ROWS: dict[str, dict[str, Any]] = {
    "natural": {"attack": {"name": "none"}},
    "pgd": {},
    "fgsm": {"attack": {"name": "fgsm"}},
    "fgsm_rs": {"attack": {"name": "fgsm_rs"}},
    "n_fgsm": {"attack": {"name": "n_fgsm"}},
    "mim": {"attack": {"name": "mim", "steps": 3, "step_size": "1/16"}},
    "apgd": {"attack": {"name": "apgd", "steps": 3}},
    "fat": {"attack": {"name": "fat", "steps": 3, "step_size": "1/16", "extra_steps": 1}},
    "multi_norm": {"attack": {"name": "multi_norm", "steps": 3, "other_norms": {"l2": 0.5}}},
    "free": {"attack": {"name": "free", "replays": 4}, "schedule": {"epochs": 15}},
    "pgd keep_tokens": {"attack": {"steps": 3, "step_size": "1/16", "keep_tokens": 0.75}},
    "fgsm grad_align": {"attack": {"name": "fgsm"}, "objective": {"grad_align": 0.2}},
    "dat": {"objective": {"name": "dat"}},
    "trades": {"objective": {"name": "trades"}},
    "mart": {"objective": {"name": "mart"}},
    "alp": {"objective": {"name": "alp"}},
    "hat": {"objective": {"name": "hat", "helper_model": str(OUTPUT / "natural")}},
    "pgd awp": {"weight_perturbation": {"name": "awp", "start": 0.2}},
    "pgd sam": {"weight_perturbation": {"name": "sam"}},
    "pgd mixup": {"data": {"mixup": 0.2}},
    "natural 10% labels": {"attack": {"name": "none"}, "data": {**FEW, "drop_unlabelled": True}},
    "pgd 10% labels": {"data": {**FEW, "drop_unlabelled": True}},
    "trades 10% labels and the other images": {"data": FEW, "objective": {"name": "trades"}},
    "trades 10% labels and pseudo-labels": {
        "data": {**FEW, "pseudo_labels": str(OUTPUT / "natural 10% labels")},
        "objective": {"name": "trades"},
    },
}


def record_of(row: str) -> dict[str, Any]:
    """The record of a row's run, trained now unless it is there."""
    folder = OUTPUT / row
    if not (folder / "record.json").exists():
        values = json.loads(Path("ds_configs/zero2.json").read_text(encoding="utf-8"))
        dat = values["dat"]
        dat["evaluation"] = {"attacks": ATTACKS, "pictures": 0}
        dat["output_dir"] = str(folder)
        for key, section in ROWS[row].items():
            same = section.get("name") in (None, dat.get(key, {}).get("name"))
            dat[key] = {**(dat.get(key, {}) if same else {}), **section}
        OUTPUT.mkdir(parents=True, exist_ok=True)
        config = OUTPUT / f"{row}.json"
        config.write_text(json.dumps(values), encoding="utf-8")
        if code := main(["train", "--deepspeed_config", str(config), "--resume", "auto"]):
            sys.exit(code)
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    rows = sys.argv[1:] or list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        sys.exit(f"No row {', '.join(unknown)}: {', '.join(ROWS)}.")
    lines = [f"| training | clean % | {' % | '.join(ATTACKS)} % | train s |"]
    lines.append("| --- " * (len(ATTACKS) + 3) + "|")
    for row in rows:
        record = record_of(row)
        accuracies = [record["natural_acc"], *(record["robust_acc"][name] for name in ATTACKS)]
        cells = [row, *(f"{100 * a:.1f}" for a in accuracies)]
        lines.append(f"| {' | '.join(cells)} | {record['seconds']['train']:.0f} |")
    print("\n".join(lines))
