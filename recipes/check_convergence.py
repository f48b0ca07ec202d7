"""Convergence with every codec and optimizer, where the stationary point is known; a few minutes.

python recipes/check_convergence.py --output convergence.json --plot convergence.png
"""

import argparse


def check(options: argparse.Namespace) -> int:
    """Train every codec and optimizer, and print how near each comes."""
    from dat_ds.bench.convergence import check_convergence

    print(check_convergence(options.output, options.plot))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FILE", help="write every step as JSON")
    parser.add_argument("--plot", metavar="FILE", help="write the curves as PNG")
    options = parser.parse_args()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: check(options))
