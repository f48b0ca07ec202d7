"""The speedup tables: attack, precision, batch; then workers, compression, sharding.

python recipes/bench_speedup.py --output docs/results/speedup     # about 20 minutes on 2 CPU cores
Each row is a `dat-ds bench attack`: of ViT-B/16 and ResNet-50 at 224 pixels on a GPU, else of a
ViT-Tiny and a ResNet-18 at 32. The second part is a `dat-ds bench scaling` of the ViT on the CPU;
with --mbit (needs root) every worker sits behind a link of that speed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from dat_ds.cli.main import main

ON_GPU = torch.cuda.is_available()
SIZE, BATCH = (224, 64) if ON_GPU else (32, 16)
CONFIG = f"ds_configs/{'zero2_autocast' if ON_GPU else 'zero0'}.json"
DATA = {"name": "synthetic", "image_shape": [3, SIZE, SIZE], "num_classes": 10, "num_train": 256}
VIT = {"name": "vit_base_patch16_224"}
VIT = VIT if ON_GPU else {"depth": 12, "embed_dim": 192, "num_heads": 3, "patch_size": 4}
RESNET = {"name": "resnet50"} if ON_GPU else {"name": "resnet18", "stem": "cifar"}
OTHERS = ("torchattacks + DDP", "backward through DDP")
GRAPHS = ["dat.engine.compile=attack", "dat.engine.cuda_graphs=true"]
IN_FOUR = [f"train_micro_batch_size_per_gpu={BATCH // 4}", "gradient_accumulation_steps=4"]
OF_BOTH = {
    "PGD-3": [],
    "compiled": ["dat.engine.compile=all"],
    **({"graphs": GRAPHS} if ON_GPU else {"attack in bf16": ["dat.attack.precision=bf16"]}),
}
OF_VIT = {
    "attack in int8": ["dat.attack.precision=int8"],
    **({"attack in fp8": ["dat.attack.precision=fp8"]} if ON_GPU else {}),
    **{f"PGD-{steps}": [f"dat.attack.steps={steps}"] for steps in (1, 7)},
    "twice the batch": [f"train_micro_batch_size_per_gpu={2 * BATCH}"],
    **{f"in 4 attacked by {n}": [*IN_FOUR, f"dat.engine.attack_micro_batches={n}"] for n in (1, 4)},
}
FOLDED, LAST = ["dat.attack.fold_batch_norm=true"], ["dat.engine.channels_last=true"]
OF_RESNET = {"BatchNorm folded": FOLDED, "channels last": LAST}
ROWS = {"ViT": (VIT, {**OF_BOTH, **OF_VIT}), "ResNet": (RESNET, {**OF_BOTH, **OF_RESNET})}


def measure(name: str, keys: list[str], file: Path, repetitions: int) -> str:
    """One row, from the record that `dat-ds bench attack` leaves."""
    words = ["bench", "attack", "--deepspeed_config", CONFIG, "--repetitions", str(repetitions)]
    if main([*words, *(word for key in keys for word in ("--set", key)), "--output", str(file)]):
        return f"| {name} | refused, see above {'| ' * 5}|"
    found = json.loads(file.read_text(encoding="utf-8"))
    step, others = found["median_seconds"]["engine step"], found["over_others"]
    cells = [f"{1000 * step:.0f}", f"{found['images'] / step:.1f}", f"{found['over_parts']:.3f}"]
    cells += [f"{1 / others[o]:.2f}" if o in others else "-" for o in OTHERS]
    return f"| {name} | {' | '.join(cells)} | {found['peak_bytes']['engine step'] / 1e6:.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10, help="timed rounds of each (>= 5)")
    parser.add_argument("--ranks", nargs="*", default=["1", "2"], help="numbers of workers")
    parser.add_argument("--mbit", nargs="*", default=[], help="speeds of links, in Mbit/s")
    parser.add_argument("--only", choices=["attack", "scaling"], help="one of the two parts")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for all records")
    options = parser.parse_args()
    (folder := Path(options.output)).mkdir(parents=True, exist_ok=True)
    base = [f"dat.data={json.dumps(DATA)}", f"train_micro_batch_size_per_gpu={BATCH}"]
    header = f"| step | ms | images/s | / parts | {' | '.join(f'x {o}' for o in OTHERS)} | MB |"
    table = [header, "| --- " * 7 + "|"]
    for model, (section, rows) in ROWS.items() if options.only != "scaling" else ():
        for row, keys in rows.items():
            file = folder / f"{model}_{row}.json".replace(" ", "_").lower()
            keys = [*base, f"dat.model={json.dumps(section)}", *keys]
            table.append(measure(f"{model}, {row}", keys, file, options.repetitions))
    print("\n".join(table))
    if options.only != "attack" and not ON_GPU:
        words = f"bench scaling --deepspeed_config {CONFIG} --output {folder}/scaling.json".split()
        words += ["--stages", "0", "2", "3", "--codecs", "none", "int8", "one_bit_adam"]
        words += ["--ranks", *options.ranks, *(["--mbit", *options.mbit] if options.mbit else [])]
        keys = [*base, f"dat.model={json.dumps(VIT)}"]
        sys.exit(main([*words, *(word for key in keys for word in ("--set", key))]))
