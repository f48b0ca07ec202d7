"""Robust accuracy with what makes attack passes cheaper, over three seeds, on digits.

python recipes/compare_speedups.py                  # about 15 minutes on a CPU
Runs stay in runs/compare_speedups; one that is there already is not trained again.
"""

import argparse
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def compare() -> int:
    """Train and evaluate all rows, and print their table."""
    from dat_ds.bench.tables.speedups_robust import compare_speedups

    print(compare_speedups(CONFIG, Path("runs/compare_speedups")))
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(compare)
