"""Published results on real data, trained and judged again.

python recipes/reproduce.py mnist_cnn --data npz:mnist.npz --output mnist_cnn.json
deepspeed --num_gpus 2 recipes/reproduce.py NAME --data NAME:PATH     # on several ranks
    --reference MODULE:CALLABLE --import MODULE       the published network, judged beside ours

Runs stay in runs/reproduce/NAME; one that is there already is not trained again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "ds_configs" / "reproduce"

REPRODUCTIONS: dict[str, dict[str, Any]] = {
    "mnist_cnn": {
        "source": "Wong et al., ICLR 2020, arXiv 2001.03994, table 2: MNIST, eps 0.3, 10 epochs",
        "published": {"clean": 0.985, "pgd-50-10": 0.888},
        "protocol": "trained by FGSM, here by PGD-3; PGD-50-10 with step 0.01, here 2.5 eps / 50",
        "attacks": ("pgd-50-10",),
    },
    "mnist_lenet5": {
        "source": "advertorch (Ding et al. 2019, arXiv 1902.07623), LeNet5 trained by PGD, eps 0.3",
        "published": {"clean": 0.9864, "pgd-40": 0.9326},
        "protocol": "PGD-40, step 0.01, no random start; here 2.5 eps / 40 from a random start",
        "attacks": ("pgd-40",),
    },
    "cifar10_resnet2b": {
        "source": "alpha-beta-CROWN (Wang et al., NeurIPS 2021, arXiv 2103.06624), ResNet-2B, "
        "2/255",
        "published": {"clean": 0.6925, "pgd-100": 0.5482},
        "protocol": "a strong PGD, whose steps are not stated; here PGD-100",
        "attacks": ("pgd-100",),
    },
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=REPRODUCTIONS, help="the result that is reproduced")
    parser.add_argument("--data", metavar="NAME:PATH", required=True, help="the images")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--num_examples", type=int, default=1000, help="images for the ensemble")
    parser.add_argument("--reference", metavar="TARGET", help="the published network")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="with --reference MODULE:CALLABLE",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(chosen: argparse.Namespace) -> int:
    """Train, evaluate and compare what the command line names."""
    import networks  # noqa: F401  # names the networks of the configs

    from dat_ds.bench.tables.reproduction import Reference, Reproduction, reproduce
    from dat_ds.data.method import named_data

    table = reproduce(
        Reproduction(**REPRODUCTIONS[chosen.name]),
        CONFIGS / f"{chosen.name}.json",
        Path("runs/reproduce") / chosen.name,
        data=named_data(chosen.data),
        seeds=chosen.seeds,
        num_examples=chosen.num_examples,
        reference=chosen.reference and Reference(chosen.reference, chosen.imports),
        output=chosen.output,
    )
    print(table)
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import carry_out

    sys.exit(carry_out(lambda: run(options)))
