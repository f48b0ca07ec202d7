"""The speedup tables: attack, precision, batch; then ranks, compression, sharding.

python recipes/bench_speedup.py --output docs/results/speedup     # about 20 minutes on 2 CPU cores
Each row is a `dat-ds bench attack`: of ViT-B/16 and ResNet-50 at 224 pixels on a GPU, else of a
ViT-Tiny and a ResNet-18 at 32. The second part is a `dat-ds bench scaling` of the ViT on the CPU;
with --mbit (needs root) every rank sits behind a link of that speed.
"""

import argparse
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "ds_configs"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=10, help="timed rounds of each (>= 5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--mbit", type=float, nargs="*", default=[], help="link speeds, in Mbit/s")
    parser.add_argument("--only", choices=["attack", "scaling"], help="one of the two parts")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="for all records"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace) -> int:
    """Measure both parts, and print their tables."""
    from dat_ds.bench.tables.speedup import attack_table, check_scaling, scaling_table
    from dat_ds.files import check_files

    if options.only != "attack":
        check_scaling(CONFIGS, ranks=options.ranks, mbit=options.mbit)
    if not options.output.is_dir():
        check_files(output=options.output)
        options.output.mkdir()
    if options.only != "scaling":
        print(attack_table(CONFIGS, options.output, repetitions=options.repetitions))
    if options.only != "attack":
        print(scaling_table(CONFIGS, options.output, ranks=options.ranks, mbit=options.mbit))
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: measure(options))
