"""Strength and speed of our attacks beside torchattacks, foolbox and AutoAttack, in one process.

python recipes/compare_attacks.py RUN       # the model and test images of a finished run
python recipes/compare_attacks.py FILE.py   # whose network() returns (model, x, y, norm, eps)

Libraries: pip install foolbox pyautoattack && pip install --no-deps torchattacks
"""

import argparse
import runpy
from pathlib import Path


def compare(path: Path) -> int:
    """Attack a network by every library, and print the tables."""
    from dat_ds.attacks import ThreatModel
    from dat_ds.bench.attack_strength import apgd_table, network_of_run, pgd_table
    from dat_ds.errors import ConfigError

    if path.is_file():
        network = runpy.run_path(str(path)).get("network")
        if network is None:
            raise ConfigError(f"{path} has no network(), which returns (model, x, y, norm, eps).")
        model, x, y, norm, eps = network()
        threat = ThreatModel(norm, eps)
    else:
        model, x, y, threat = network_of_run(path)
    print(f"PGD-10, {threat.norm} eps {threat.eps:.4g}, {len(x)} images, 20 random starts\n")
    print(pgd_table(model, x, y, threat, steps=10, starts=20))
    print("\nAPGD-100, one random start: robust accuracy in %, seconds\n")
    print(apgd_table(model, x, y, threat, steps=100))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", type=Path, metavar="RUN|FILE.py", help="what is attacked")
    options = parser.parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: compare(options.network))
