"""Few labels: robust accuracy with and without self-supervised pre-training, on the digits.

python recipes/pretrain_finetune.py contrastive --labelled 0.04 --seeds 0 1 2 --output FILE.json

Pre-trains on all training images without their labels, then trains by AT on the labelled part of
them. ``from_scratch`` is AT from random weights; ``contrastive_defaults`` takes the published
temperature and crops, which are for larger images and batches, and the full eps from the start.
"""

import argparse
import logging
from pathlib import Path


def compare(options: argparse.Namespace) -> int:
    """Print a line on every seed, and add its record to the file."""
    from dat_ds.bench.tables.pretraining import compare_pretraining

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    output = {"output": options.output}
    for line in compare_pretraining(options.method, options.labelled, options.seeds, **output):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "method", help="from_scratch, rotation, contrastive or contrastive_defaults"
    )
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
