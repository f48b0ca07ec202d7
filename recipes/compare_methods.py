"""Every attack and objective on digits: clean and robust accuracy, and seconds of training.

python recipes/compare_methods.py                 # all rows, about half a minute each on a CPU
python recipes/compare_methods.py pgd trades      # some of them
A row's run stays in runs/compare_methods/ROW; a row that is there already is not trained again.
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
    return parser.parse_args()


def compare(rows: list[str]) -> int:
    """Train and evaluate the rows, and print their table."""
    from dat_ds.bench.tables.methods import compare_methods

    print(compare_methods(CONFIG, Path("runs/compare_methods"), rows))
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: compare(options.rows))
