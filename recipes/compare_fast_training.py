"""Single-step training methods beside PGD, and Muon beside AdamW, over three seeds, on digits.

python recipes/compare_fast_training.py                          # all rows
python recipes/compare_fast_training.py pgd "guided + nuat"      # some of them
python recipes/compare_fast_training.py --output numbers.json
Runs stay in runs/compare_fast_training; one that is there already is not trained again.
"""

import argparse
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="rows of the table; none for all")
    parser.add_argument("--epochs", type=float, help="length of the runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser.parse_args()


def compare(chosen: argparse.Namespace) -> int:
    """Train and evaluate the rows, and print their table."""
    from dat_ds.bench.tables.fast_training import compare_fast_training

    folder = Path("runs/compare_fast_training")
    words = {"epochs": chosen.epochs, "output": chosen.output}
    print(compare_fast_training(CONFIG, folder, chosen.rows, **words))
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: compare(options))
