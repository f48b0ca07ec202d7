"""Every attack and objective on digits: clean and robust accuracy, and seconds of training.

python recipes/compare_methods.py                 # all rows, about half a minute each on a CPU
python recipes/compare_methods.py pgd trades      # some of them
A row's run stays in runs/compare_methods/ROW; a row that is there already is not trained again.
"""

import sys
from pathlib import Path

from dat_ds.bench.tables.methods import compare_methods
from dat_ds.commands import carry_out

CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def compare() -> int:
    """Train and judge the rows of the command line, and print their table."""
    print(compare_methods(CONFIG, Path("runs/compare_methods"), sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(carry_out(compare))
