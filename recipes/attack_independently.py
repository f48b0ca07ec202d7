"""Attack trained runs by an independent library, foolbox (pip install -e '.[test]').

python recipes/attack_independently.py RUN RUN/natural_twin
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dat_ds.config import RunConfig

STEPS, RESTARTS = 100, 5


ATTACKS = {
    "linf": "LinfProjectedGradientDescentAttack",
    "l2": "L2ProjectedGradientDescentAttack",
}


def attack(folder: Path, run: "RunConfig") -> str:
    """One line on what a run's best model withstands on its whole test set."""
    import foolbox
    import torch
    from torch.utils.data import default_collate

    from dat_ds import models
    from dat_ds.assembly import build_data_of

    test, threat = build_data_of(run).test, run.dat.threat_model
    x, y = default_collate([test[i] for i in range(len(test))])
    model = foolbox.PyTorchModel(models.load(folder), bounds=(threat.lower, threat.upper))
    correct = model(x).argmax(-1) == y
    natural = correct.double().mean()
    torch.manual_seed(0)
    # An image is robust if it is classified correctly and withstands every restart.
    steps = getattr(foolbox.attacks, ATTACKS[threat.norm])(steps=STEPS)
    for _ in range(RESTARTS):
        _, _, fooled = steps(model, x, y, epsilons=float(threat.eps))
        correct &= ~fooled
    return (
        f"{folder}: clean {natural:.1%}, foolbox {STEPS}-step PGD with {RESTARTS} restarts, "
        f"{threat.norm} eps {threat.eps}: {correct.double().mean():.1%} of {len(x)} images"
    )


def attack_all(folders: Sequence[Path]) -> int:
    """Print what each run withstands; mistakes are told before the first is attacked."""
    from dat_ds import load_config
    from dat_ds.errors import ConfigError

    if importlib.util.find_spec("foolbox") is None:
        raise ConfigError("foolbox is not installed: pip install foolbox.")
    runs = {folder: load_config(folder / "config.json", here=False) for folder in folders}
    for folder, run in runs.items():
        if run.dat.threat_model.norm not in ATTACKS:
            raise ConfigError(
                f"{folder}: dat.threat_model.norm={run.dat.threat_model.norm!r}, but this script "
                f"attacks in {' and '.join(ATTACKS)} alone."
            )
    for folder, run in runs.items():
        print(attack(folder, run), flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    options = parser.parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: attack_all(options.runs))
