"""Attack trained runs by an independent library, foolbox (pip install -e '.[test]').

python recipes/attack_independently.py RUN RUN/natural_twin
"""

import sys
from pathlib import Path

import foolbox
import torch
from torch.utils.data import default_collate

from dat_ds import load_config, models
from dat_ds.assembly import build_data_of

STEPS, RESTARTS = 100, 5
ATTACKS = {
    "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
    "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
}


def attack(folder: Path) -> str:
    """One line on what a run's best model withstands on its whole test set."""
    run = load_config(folder / "config.json", here=False)
    test, threat = build_data_of(run).test, run.dat.threat_model
    x, y = default_collate([test[i] for i in range(len(test))])
    model = foolbox.PyTorchModel(models.load(folder), bounds=(threat.lower, threat.upper))
    correct = model(x).argmax(-1) == y
    natural = correct.double().mean()
    torch.manual_seed(0)
    # An image is robust if it is classified correctly and withstands every restart.
    steps = ATTACKS[threat.norm](steps=STEPS)
    for _ in range(RESTARTS):
        _, _, fooled = steps(model, x, y, epsilons=float(threat.eps))
        correct &= ~fooled
    return (
        f"{folder}: clean {natural:.1%}, foolbox {STEPS}-step PGD with {RESTARTS} restarts, "
        f"{threat.norm} eps {threat.eps}: {correct.double().mean():.1%} of {len(x)} images"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        print(attack(Path(path)))
