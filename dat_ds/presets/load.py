"""The presets and starting points by name, and one of them as values of a run config."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import Any

from dat_ds.data import DATASETS
from dat_ds.data.method import named_data
from dat_ds.errors import ConfigError
from dat_ds.method import did_you_mean

_DAT = "Zhang et al., UAI 2022, arXiv 2206.06257"
_ADVXL = "Wang et al., CVPR 2024, arXiv 2401.04727"
PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "dat_cifar10_resnet18_pgd": _DAT,
        "dat_cifar10_resnet18_fgsm": _DAT,
        "dat_imagenet_resnet50_pgd": _DAT,
        "dat_imagenet_resnet50_fgsm": _DAT,
        "fast_at": "Wong et al., ICLR 2020, arXiv 2001.03994",
        "n_fgsm": "de Jorge et al., NeurIPS 2022, arXiv 2202.01181",
        "trades_awp": "Zhang et al., arXiv 1901.08573; Wu et al., NeurIPS 2020, arXiv 2004.05884",
        "fastat_benchmark": "Pan and Yao, 2026, arXiv 2604.22853",
        "vit_light": "Debenedetti et al., SaTML 2023, arXiv 2209.07399",
        "convstem_heavy": "Singh et al., NeurIPS 2023, arXiv 2303.01870",
        "ares_vit": "Liu et al., 2023, arXiv 2302.14301",
        "advxl_stage1": _ADVXL,
        "advxl_stage2": _ADVXL,
        "fare_clip": "Schlarmann et al., ICML 2024, arXiv 2402.12336",
    }
)
"""Where each preset is from, by name; what it deviates in is in docs/presets.md."""

STARTING_POINTS: Mapping[str, str] = MappingProxyType(
    {
        "zero0": "ZeRO-0: every rank holds everything",
        "zero1": "ZeRO-1: optimizer states are sharded",
        "zero2": "ZeRO-2: gradients too",
        "zero3": "ZeRO-3: parameters too",
        "zero3_offload": "ZeRO-3, parameters and optimizer states in the host's memory",
        "zero2_bf16": "ZeRO-2, bf16",
        "zero2_fp16": "ZeRO-2, fp16",
        "zero2_autocast": "ZeRO-2, torch_autocast",
        "zero2_int8": "ZeRO-2, gradients sent as int8",
        "lamb": "LAMB",
        "lars": "LARS",
        "muon": "Muon",
        "onebit_adam": "1-bit Adam",
        "onebit_lamb": "1-bit LAMB",
        "zero_one_adam": "0/1 Adam",
    }
)
"""Small complete runs on the embedded digits, to start one's own from, and what each shows."""


def read_preset(name: str) -> dict[str, Any]:
    """A preset or starting point as values of a run config.

    Raises:
        ConfigError: There is none of that name.
    """
    return dict(json.loads(text_of(name)))


def text_of(name: str) -> str:
    """The JSON of a preset or starting point.

    Raises:
        ConfigError: There is none of that name.
    """
    names = [*PRESETS, *STARTING_POINTS]
    if name not in names:
        raise ConfigError(
            f"{name!r} is not a preset{did_you_mean(name, names)}. Valid: {', '.join(names)}."
        )
    folder = resources.files(__package__)
    if name in STARTING_POINTS:
        folder = folder / "starting"
    return (folder / f"{name}.json").read_text(encoding="utf-8")


def with_data(values: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Values of a run config with other images.

    Args:
        values: They are not changed.
        data: ``"NAME"`` or ``"NAME:PATH"`` of a dataset, such as ``"imagefolder:DIR"``.
            Augmentation and splits stay as they are.

    Raises:
        ConfigError: There is no dataset of that name, or it needs a path.
    """
    changed = copy.deepcopy(dict(values))
    named = named_data(data)
    name = named["name"]
    if name not in DATASETS:
        raise ConfigError(
            f"--data {data}: there is no dataset {name!r}{did_you_mean(name, DATASETS)}. Valid: "
            f"{', '.join(DATASETS)}, followed by :PATH where it is read from files."
        )
    if "path" in DATASETS[name].required and not named.get("path"):
        raise ConfigError(f"--data {data}: {name!r} is read from files: write --data {name}:PATH.")
    section = changed.setdefault("dat", {}).setdefault("data", {})
    section |= named
    return changed


def table() -> str:
    """The presets as a table of plain text, with their sources, and the starting points below."""
    rows = [("preset", "data", "model", "attack", "objective", "source")]
    for name, source in PRESETS.items():
        dat = read_preset(name)["dat"]
        attack, side = dat["attack"], dat["model"]["img_size"]
        steps = f"-{attack['steps']}" if "steps" in attack else ""
        rows.append(
            (
                name,
                f"{dat['data']['name']}, {side} px",
                dat["model"]["name"],
                f"{attack['name']}{steps}, {dat['threat_model']['eps']}",
                dat["objective"]["name"],
                source,
            )
        )
    starting = [("starting point", "what it shows"), *STARTING_POINTS.items()]
    return f"{_aligned(rows)}\n\n{_aligned(starting)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )
