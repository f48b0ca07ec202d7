"""Robust accuracy with what makes attack passes cheaper, over three seeds, on digits.

python recipes/compare_speedups.py                  # about 15 minutes on a CPU
Runs stay in runs/compare_speedups; one that is there already is not trained again.
"""

import argparse
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def compare(output: Path | None) -> int:
    """Train and evaluate all rows, and print their table."""
    from dat_ds.bench.tables.speedups_robust import compare_speedups

    print(compare_speedups(CONFIG, Path("runs/compare_speedups"), output=output))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    options = parser.parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: compare(options.output))
