"""Seconds of training until a model withstands the standard ensemble on a share of the test set.

python recipes/time_to_robustness.py --task digits --output docs/results/time_to_robustness_X.json
python recipes/time_to_robustness.py --leaderboard docs/results/time_to_robustness_*.json

The rules are in docs/time_to_robustness.md. Another entry is another config:
    --deepspeed_config FILE --set dat.schedule.epochs=10
"""

import argparse
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "ds_configs"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=["digits", "cifar10"], help="the task that is measured")
    what.add_argument("--leaderboard", nargs="*", type=Path, metavar="FILE", help="entries")
    parser.add_argument("--deepspeed_config", type=Path, metavar="FILE", help="default: the task's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config; repeatable",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on; an entry: >= 3")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the entry as JSON")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> int:
    """Make an entry and say what it reaches, or print the table of entries."""
    from dat_ds.bench.time_to_robustness import describe_entry, leaderboard, measure_entry

    if options.task is None:
        print(leaderboard(options.leaderboard))
        return 0
    config = options.deepspeed_config or CONFIGS / f"time_to_robustness_{options.task}.json"
    entry = measure_entry(
        config,
        task=options.task,
        seeds=options.seeds,
        overrides=options.set,
        output=options.output,
    )
    print(describe_entry(entry))
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: measure(options))
