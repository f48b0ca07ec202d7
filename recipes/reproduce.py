"""Published results on real data, trained and judged again.

python recipes/reproduce.py mnist_cnn --data npz:mnist.npz --output mnist_cnn.json
deepspeed --num_accelerators 2 recipes/reproduce.py NAME --data NAME:PATH     # on several ranks
    --variants NAME ...                               only these rows, such as those for 4 ranks
    --reference MODULE:CALLABLE --import MODULE       the published network, judged beside ours

Runs stay in runs/reproduce/NAME; one that is there already is not trained again.
"""

import argparse
import math
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "ds_configs" / "reproduce"
MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)

BATCH = 32
SGD_RATE, LALR_RATE = 0.02, 0.005
NORMALISED_SGD_RATE, NORMALISED_LALR_RATE = 0.05, 0.007
"""Learning rates of a batch of 32, without and with BatchNorm."""
LALR = {"name": "lamb", "preset": "paper", "weight_decay": 0.0001}
FEW_NATURAL = "5,000 labelled images, no attack, 50 epochs"
SELF_TRAINING = "the same and 45,000 that the first row's model labels, 10 epochs"


def _few_labels(*, epochs: int, **dat: Any) -> dict[str, Any]:
    """Training on the labelled images alone."""
    schedule = {"epochs": epochs, "warmup_epochs": epochs / 10}
    checkpoint = {"every_epochs": epochs}
    return {"dat": {"schedule": schedule, "checkpoint": checkpoint, **dat}}


def _dat_variants() -> dict[str, dict[str, Any]]:
    """Attack, global batch, optimizer and codec of each row of DAT's table."""

    def row(batch: int, optimizer: dict[str, Any], **dat: Any) -> dict[str, Any]:
        return {"train_batch_size": batch, "dat": {**dat, "optimizer": optimizer}}

    def sgd(factor: float, rate: float = SGD_RATE) -> dict[str, Any]:
        return {"name": "sgd", "lr": rate * factor, "weight_decay": 0.0005}

    def lalr(batch: int, rate: float = LALR_RATE) -> dict[str, Any]:
        return {**LALR, "lr": rate * math.sqrt(batch / BATCH)}

    variants: dict[str, dict[str, Any]] = {}
    for batch in (8, 32, 64, 256, 1024):
        variants[f"PGD, batch {batch}, SGD"] = row(batch, sgd(batch / BATCH))
        variants[f"PGD, batch {batch}, LALR"] = row(batch, lalr(batch))
    fgsm = {"attack": {"name": "fgsm"}}
    variants["FGSM, batch 32, SGD"] = row(32, sgd(1), **fgsm)
    for batch in (32, 1024):
        variants[f"FGSM, batch {batch}, LALR"] = row(batch, lalr(batch), **fgsm)
    smaller_rate = "PGD, batch 1024, SGD, rate by the square root"
    variants[smaller_rate] = row(1024, sgd(math.sqrt(1024 / BATCH)))
    for sides in ("single", "double"):
        codec = {"name": "int8", "sides": sides}
        variants[f"PGD, batch 256, LALR, 8 bits {sides}-sided"] = row(
            256, lalr(256), compression=codec
        )
    normalised = {"model": {"name": "resnet6"}, "attack": {"fold_batch_norm": True}}
    for batch in (32, 1024):
        optimizers = {
            "SGD": sgd(batch / BATCH, NORMALISED_SGD_RATE),
            "LALR": lalr(batch, NORMALISED_LALR_RATE),
        }
        for name, optimizer in optimizers.items():
            variants[f"BatchNorm, PGD, batch {batch}, {name}"] = row(batch, optimizer, **normalised)
    return variants


REPRODUCTIONS: dict[str, dict[str, Any]] = {
    "mnist_cnn": {
        "source": "Wong et al., ICLR 2020, arXiv 2001.03994, table 2: MNIST, eps 0.3, 10 epochs",
        "image_shape": MNIST,
        "published": {"clean": 0.985, "pgd-50-10": 0.888},
        "protocol": "trained by FGSM, here by PGD-3; PGD-50-10 with step 0.01, here 2.5 eps / 50",
        "attacks": ("pgd-50-10",),
    },
    "mnist_lenet5": {
        "source": "advertorch (Ding et al. 2019, arXiv 1902.07623), LeNet5 trained by PGD, eps 0.3",
        "image_shape": MNIST,
        "published": {"clean": 0.9864, "pgd-40": 0.9326},
        "protocol": "PGD-40, step 0.01, no random start; here 2.5 eps / 40 from a random start",
        "attacks": ("pgd-40",),
        "judge": "strong",
    },
    "cifar10_resnet2b": {
        "source": "alpha-beta-CROWN (Wang et al., NeurIPS 2021, arXiv 2103.06624), ResNet-2B, "
        "2/255",
        "image_shape": CIFAR10,
        "published": {"clean": 0.6925, "pgd-100": 0.5482},
        "protocol": "a strong PGD, whose steps are not stated; here PGD-100",
        "attacks": ("pgd-100",),
    },
    "dat_cifar10": {
        "source": "Zhang et al., UAI 2022, arXiv 2206.06257: large batches, LALR, 8 bits",
        "image_shape": CIFAR10,
        "published": {},
        "attacks": ("pgd-20",),
        "variants": _dat_variants(),
        "judge": "strong",
    },
    "rst_cifar10": {
        "source": "Carmon et al., NeurIPS 2019, arXiv 1905.13736: robust self-training",
        "image_shape": CIFAR10,
        "published": {},
        "attacks": ("pgd-20",),
        "variants": {
            FEW_NATURAL: _few_labels(epochs=50, attack={"name": "none"}),
            "5,000 labelled images, 25 epochs": _few_labels(epochs=25),
            "5,000 labelled images, 100 epochs": _few_labels(epochs=100),
            SELF_TRAINING: {"dat": {"data": {"drop_unlabelled": False}}},
        },
        "labels_from": {SELF_TRAINING: FEW_NATURAL},
        "judge": "strong",
    },
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=REPRODUCTIONS, help="the result that is reproduced")
    parser.add_argument("--data", metavar="NAME:PATH", required=True, help="the images")
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="only these")
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

    if table := reproduce(
        Reproduction(**REPRODUCTIONS[chosen.name]),
        CONFIGS / f"{chosen.name}.json",
        Path("runs/reproduce") / chosen.name,
        data=named_data(chosen.data),
        seeds=chosen.seeds,
        num_examples=chosen.num_examples,
        variants=chosen.variants,
        reference=chosen.reference and Reference(chosen.reference, chosen.imports),
        output=chosen.output,
    ):
        print(table)
    return 0


if __name__ == "__main__":
    options = parse()
    from dat_ds.commands import run_recipe

    run_recipe(lambda: run(options))
