"""What the tests of Hugging Face's Trainer share."""

from __future__ import annotations

from typing import Any

from dat_ds.integrations.hf import AdversarialTrainingCallback
from tests.hf_tiny import MEAN, STD

THREAT = {"norm": "linf", "eps": 0.1}
ATTACK = {"name": "pgd", "steps": 2, "step_size": 0.05}


def callback_of(**settings: Any) -> AdversarialTrainingCallback:
    values = {"threat_model": THREAT, "attack": ATTACK, "mean": MEAN, "std": STD, **settings}
    return AdversarialTrainingCallback(**values)
