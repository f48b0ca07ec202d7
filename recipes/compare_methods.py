"""Every attack and objective on digits: clean and robust accuracy, and seconds of training.

python recipes/compare_methods.py                 # all rows, about half a minute each on a CPU
python recipes/compare_methods.py pgd trades --seeds 0 1 2 --output numbers.json
Runs stay in runs/compare_methods; one that is there already is not trained again.
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser.parse_args()


def compare(chosen: argparse.Namespace) -> int:
    """Train and evaluate the rows, and print their table."""
    from dat_ds.bench.tables.methods import compare_methods

    folder = Path("runs/compare_methods")
    words = {"seeds": chosen.seeds, "output": chosen.output}
    print(compare_methods(CONFIG, folder, chosen.rows, **words))
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: compare(options))
