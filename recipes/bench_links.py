"""Time per step over links of a given speed, by what is sent: the table of compression.

sudo python recipes/bench_links.py --ranks 4 --mbit 100     # needs root, and apt install iproute2

The ranks are network namespaces of this machine, so nothing leaves it.
"""

import argparse
import sys

from dat_ds.bench.links import bench_links
from dat_ds.errors import UserError

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "dat": {
        "model": {"depth": 4, "embed_dim": 512, "num_heads": 8},
        "attack": {"name": "fgsm_rs"},
        "schedule": {"name": "constant"},
    },
}
ONE_BIT = {"lr": 1e-4, "freeze_step": 2}
VARIANTS = {
    "float32": {},
    "int8": {"dat.compression": {"name": "int8"}},
    "int8, single-sided": {"dat.compression": {"name": "int8", "sides": "single"}},
    "int4": {"dat.compression": {"name": "int4"}},
    "sign": {"dat.compression": {"name": "sign"}},
    "1-bit Adam": {"optimizer": {"type": "OneBitAdam", "params": ONE_BIT}},
    "1-bit LAMB": {"optimizer": {"type": "OneBitLamb", "params": ONE_BIT}},
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument("--repetitions", type=int, default=5, help="timed steps of each (>= 5)")
    parser.add_argument("--only", nargs="*", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--output", metavar="FILE", help="write the numbers as JSON")
    options = parser.parse_args()
    names = options.only or list(VARIANTS)
    try:
        print(
            bench_links(
                CONFIG,
                {name: VARIANTS[name] for name in names},
                ranks=options.ranks,
                mbit=options.mbit,
                repetitions=options.repetitions,
                output=options.output,
            )
        )
    except UserError as error:
        sys.exit(f"error: {error}")
