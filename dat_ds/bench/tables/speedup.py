"""Step times by what is cheaper: attack, precision, batch; then ranks, compression, sharding.

Steps are of a ViT-B/16 and a ResNet-50 at 224 pixels on a GPU; on a CPU, of a ViT-Tiny and a
ResNet-18 at 32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dat_ds.bench.scaling.measure import bench_scaling
from dat_ds.bench.scaling.plan import Plan, points_of
from dat_ds.bench.step_time import BACKWARD, STEP, TORCHATTACKS, bench_attack
from dat_ds.bench.tables.runs import markdown, run_of
from dat_ds.bench.timing import check_repetitions
from dat_ds.config import RunConfig
from dat_ds.errors import NumericsError, UserError

logger = logging.getLogger("dat_ds")

OTHERS = (TORCHATTACKS, BACKWARD)


@dataclass(frozen=True)
class Bench:
    """Models and batches that are timed on a kind of device.

    Args:
        config: File name of the runs' JSON.
        size: Pixels of an image, along a side.
        batch: Images of a rank in a step.
        vit: ``dat.model`` of the transformer.
        resnet: ``dat.model`` of the convolutional network.
    """

    config: str
    size: int
    batch: int
    vit: Mapping[str, Any]
    resnet: Mapping[str, Any]

    def changes(self, model: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Nested keys over the config, for a row of a model."""
        data = {
            "name": "synthetic",
            "image_shape": [3, self.size, self.size],
            "num_classes": 10,
            "num_train": 256,
        }
        dat = {"data": data, "model": model, **row.get("dat", {})}
        return {"train_micro_batch_size_per_gpu": self.batch, **row, "dat": dat}


ON_GPU = Bench(
    config="zero2_autocast.json",
    size=224,
    batch=64,
    vit={"name": "vit_base_patch16_224"},
    resnet={"name": "resnet50"},
)
ON_CPU = Bench(
    config="zero0.json",
    size=32,
    batch=16,
    vit={"depth": 12, "embed_dim": 192, "num_heads": 3, "patch_size": 4},
    resnet={"name": "resnet18", "stem": "cifar"},
)


def rows_of(batch: int, on_gpu: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Changes of each row, by network and row.

    Args:
        batch: Images of a rank in a step.
        on_gpu: Whether the rows that need a GPU stand in the place of those for a CPU.
    """
    of_both: dict[str, dict[str, Any]] = {
        "PGD-3": {},
        "compiled": _engine(compile="all"),
    }
    of_vit = {"attack in int8": _attack(precision="int8")}
    if on_gpu:
        of_both["graphs"] = _engine(compile="attack", cuda_graphs=True)
        of_vit["attack in fp8"] = _attack(precision="fp8")
    else:
        of_both["attack in bf16"] = _attack(precision="bf16")
    of_vit |= {f"PGD-{steps}": _attack(steps=steps) for steps in (1, 7)}
    of_vit["twice the batch"] = {"train_micro_batch_size_per_gpu": 2 * batch}
    for together in (1, 4):
        of_vit[f"in 4 attacked by {together}"] = {
            "train_micro_batch_size_per_gpu": batch // 4,
            "gradient_accumulation_steps": 4,
            **_engine(attack_micro_batches=together),
        }
    of_resnet = {
        "BatchNorm folded": _attack(fold_batch_norm=True),
        "channels last": _engine(channels_last=True),
    }
    return {"ViT": of_both | of_vit, "ResNet": of_both | of_resnet}


def check_scaling(configs: Path, *, ranks: Sequence[int], mbit: Sequence[float]) -> None:
    """Refuse what :func:`scaling_table` would refuse, before another table is measured.

    Args:
        configs: Folder of the shipped run configs.
        ranks: Numbers of ranks.
        mbit: Speeds of links.

    Raises:
        ConfigError: With every problem.
    """
    if not torch.cuda.is_available():
        points_of(*_scaling(configs, ranks, mbit))


def attack_table(configs: Path, folder: Path, *, repetitions: int) -> str:
    """Time a step of every row as ``dat-ds bench attack`` does.

    Args:
        configs: Folder of the shipped run configs.
        folder: For a record of each row.
        repetitions: Timed rounds of each.

    Returns:
        Markdown. A row that was refused says so; the log says why.

    Raises:
        ConfigError: Fewer than 5 repetitions.
    """
    check_repetitions(repetitions)
    on_gpu = torch.cuda.is_available()
    bench = ON_GPU if on_gpu else ON_CPU
    models = {"ViT": bench.vit, "ResNet": bench.resnet}
    cells = []
    for network, rows in rows_of(bench.batch, on_gpu).items():
        for row, changes in rows.items():
            file = folder / f"{network}_{row}.json".replace(" ", "_").lower()
            values = bench.changes(models[network], changes)
            measured = _measure(configs / bench.config, values, file, repetitions)
            cells.append([f"{network}, {row}", *measured])
    header = ["step", "ms", "images/s", "/ parts", *(f"x {name}" for name in OTHERS), "MB"]
    return markdown(header, cells)


def scaling_table(
    configs: Path, folder: Path, *, ranks: Sequence[int], mbit: Sequence[float] = ()
) -> str:
    """Time steps of the transformer over ranks, codecs and ZeRO stages; on CPUs alone.

    Args:
        configs: Folder of the shipped run configs.
        folder: For the record, ``scaling.json``.
        ranks: Numbers of ranks.
        mbit: Speeds of links; needs root.

    Returns:
        Markdown: the tables of ``dat-ds bench scaling``; empty on a GPU.
    """
    if torch.cuda.is_available():
        return ""
    run, plan = _scaling(configs, ranks, mbit)
    return bench_scaling(run, plan, output=str(folder / "scaling.json"))


def _scaling(configs: Path, ranks: Sequence[int], mbit: Sequence[float]) -> tuple[RunConfig, Plan]:
    run = run_of(configs / ON_CPU.config, ON_CPU.changes(ON_CPU.vit, {}))
    return run, Plan(ranks=tuple(ranks), mbit=tuple(mbit))


def _attack(**keys: Any) -> dict[str, Any]:
    return {"dat": {"attack": keys}}


def _engine(**keys: Any) -> dict[str, Any]:
    return {"dat": {"engine": keys}}


def _measure(config: Path, values: Mapping[str, Any], file: Path, repetitions: int) -> list[str]:
    """Cells of one row, after the network's and the row's names."""
    try:
        run: RunConfig = run_of(config, values)
        logger.info("%s", bench_attack(run, repetitions=repetitions, output=str(file)))
    except (UserError, NumericsError) as error:
        logger.error("error: %s", error)
        return ["refused, see above", *[""] * (3 + len(OTHERS))]
    found = json.loads(file.read_text(encoding="utf-8"))
    step, others = found["median_seconds"][STEP], found["over_others"]
    return [
        f"{1000 * step:.0f}",
        f"{found['images'] / step:.1f}",
        f"{found['over_parts']:.3f}",
        *(f"{1 / others[name]:.2f}" if name in others else "-" for name in OTHERS),
        f"{found['peak_bytes'][STEP] / 1e6:.0f}",
    ]
