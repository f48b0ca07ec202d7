"""Attack trained runs by an independent library, foolbox (pip install -e '.[test]').

python recipes/attack_independently.py RUN RUN/natural_twin
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

STEPS, RESTARTS = 100, 5


def attack(folder: Path) -> str:
    """One line on what a run's best model withstands on its whole test set."""
    import foolbox
    import torch
    from torch.utils.data import default_collate

    from dat_ds import load_config, models
    from dat_ds.assembly import build_data_of

    attacks = {
        "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
    }
    run = load_config(folder / "config.json", here=False)
    test, threat = build_data_of(run).test, run.dat.threat_model
    x, y = default_collate([test[i] for i in range(len(test))])
    model = foolbox.PyTorchModel(models.load(folder), bounds=(threat.lower, threat.upper))
    correct = model(x).argmax(-1) == y
    natural = correct.double().mean()
    torch.manual_seed(0)
    # An image is robust if it is classified correctly and withstands every restart.
    steps = attacks[threat.norm](steps=STEPS)
    for _ in range(RESTARTS):
        _, _, fooled = steps(model, x, y, epsilons=float(threat.eps))
        correct &= ~fooled
    return (
        f"{folder}: clean {natural:.1%}, foolbox {STEPS}-step PGD with {RESTARTS} restarts, "
        f"{threat.norm} eps {threat.eps}: {correct.double().mean():.1%} of {len(x)} images"
    )


def attack_all(folders: Sequence[Path]) -> int:
    """Print what each run withstands."""
    for folder in folders:
        print(attack(folder))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    options = parser.parse_args()
    from dat_ds.commands import carry_out

    sys.exit(carry_out(lambda: attack_all(options.runs)))
