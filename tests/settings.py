"""One table of settings per section that chooses a method: of each, what it trains with here.

A suite over every method reads this table, so that a new method is tested by one line in it; one
that is missing fails :func:`settings_of` with the line to write.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from dat_ds.attacks import ATTACKS
from dat_ds.compression import COMPRESSIONS
from dat_ds.data import DATASETS
from dat_ds.method import Table, Trait
from dat_ds.objectives import OBJECTIVES
from dat_ds.optim import OPTIMIZERS, SCHEDULES

TABLES: dict[str, Table[Any]] = {
    "data": DATASETS,
    "attack": ATTACKS,
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "compression": COMPRESSIONS,
    "schedule": SCHEDULES,
}
"""What each section of ``dat`` chooses from."""
METHODS = [(section, name) for section, table in TABLES.items() for name in table]
"""Every method there is."""
MAKE_NO_IMAGES = [
    name
    for name, attack in ATTACKS.items()
    if attack.traits & {Trait.CARRIES_PERTURBATIONS, Trait.MAKES_NO_IMAGES}
]
"""Attacks that are called by no training step."""
IMAGE_ATTACKS = [name for name in ATTACKS if name not in MAKE_NO_IMAGES]
"""Attacks that can be called by themselves."""

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "data": {
        "digits": {},
        "cifar10": {"path": "data"},
        "cifar100": {"path": "data"},
        "npz": {"path": "data.npz"},
        "imagefolder": {"path": "data"},
        "timm": {"path": "data"},
        "torchvision": {"path": "data", "dataset": "SVHN"},
        "huggingface": {"path": "data"},
        "webdataset": {"path": "data"},
        "synthetic": {"num_train": 8, "num_test": 4, "image_shape": [3, 8, 8]},
    },
    "attack": {
        "pgd": {"steps": 2, "restarts": 2},
        "fgsm": {},
        "fgsm_rs": {},
        "n_fgsm": {},
        "mim": {"steps": 2},
        "apgd": {"steps": 2},
        "fat": {"steps": 2, "extra_steps": 1},
        "multi_norm": {"steps": 2, "other_norms": {"l2": 0.5, "l1": 2.0}, "combine": "average"},
        "zero_grad": {},
        "guided": {},
        "fgsm_pgi": {},
        "free": {},
        "none": {},
    },
    "objective": {
        "at": {},
        "dat": {},
        "trades": {},
        "mart": {},
        "alp": {},
        "hat": {"helper_model": "helper"},
        "rotation": {},
        "contrastive": {},
        "fare": {},
        "gat": {},
        "nuat": {},
        "pgi": {},
    },
    "optimizer": {
        "adamw": {},
        "sgd": {},
        "lamb": {},
        "lars": {},
        "one_bit_adam": {"freeze_step": 1},
        "one_bit_lamb": {"freeze_step": 1},
        "zero_one_adam": {"var_freeze_step": 1},
        "muon": {},
    },
    "compression": {
        "none": {},
        "int8": {},
        "int4": {},
        "qsgd": {},
        "natural": {},
        "topk": {},
        "sign": {},
        "int8_hadamard": {},
    },
    "schedule": {
        "cosine": {"final_ratio": 0.1},
        "linear": {"final_ratio": 0.1},
        "constant": {},
        "step": {"milestones": [0.5]},
    },
}


def settings_of(section: str, name: str) -> dict[str, Any]:
    """The section that chooses a method, as a config holds it."""
    if name not in SETTINGS[section]:
        raise AssertionError(
            f"tests/settings.py lacks the {section} {name!r}: write under {section!r} a line "
            f"{name!r}: {{...}} with what it needs to train, or {{}}."
        )
    return {"name": name, **copy.deepcopy(SETTINGS[section][name])}


def config_of(section: str, name: str, **changed: Any) -> dict[str, Any]:
    """A run config that is valid and chooses a method.

    Args:
        section: Key of :data:`TABLES`.
        name: The method.
        changed: Keys of its section in the place of the table's.
    """
    dat = {section: {**settings_of(section, name), **changed}}
    if section == "objective" and OBJECTIVES[name].needs_start_logits:
        dat["attack"] = {"name": next(n for n, attack in ATTACKS.items() if attack.tells_start)}
    if section == "optimizer":
        return {"dat": dat}
    return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "dat": dat}


def without_launcher() -> dict[str, str]:
    """The environment but for what a launcher, or an engine of an earlier test, has put there."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launchers}
