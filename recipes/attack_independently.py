"""Attack trained runs by an independent library, foolbox (pip install -e '.[test]').

python recipes/attack_independently.py RUN RUN/natural_twin
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

STEPS, RESTARTS = 100, 5


def attack_all(folders: Sequence[Path]) -> int:
    """Print what each run withstands; mistakes are told before the first is attacked."""
    from dat_ds import load_config
    from dat_ds.bench.attack_strength import FOOLBOX_PGD, foolbox_accuracies, network_of_run
    from dat_ds.errors import ConfigError

    if importlib.util.find_spec("foolbox") is None:
        raise ConfigError("foolbox is not installed: pip install foolbox.")
    threats = {
        folder: load_config(folder / "config.json", here=False).dat.threat_model
        for folder in folders
    }
    for folder, threat in threats.items():
        if threat.norm not in FOOLBOX_PGD:
            raise ConfigError(
                f"{folder}: dat.threat_model.norm={threat.norm!r}, but this script attacks in "
                f"{' and '.join(FOOLBOX_PGD)} alone."
            )
    for folder, written in threats.items():
        model, x, y, threat = network_of_run(folder)
        clean, robust = foolbox_accuracies(model, x, y, threat, steps=STEPS, restarts=RESTARTS)
        print(
            f"{folder}: clean {clean:.1%}, foolbox {STEPS}-step PGD with {RESTARTS} restarts, "
            f"{written.norm} eps {written.eps}: {robust:.1%} of {len(x)} images",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    options = parser.parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: attack_all(options.runs))
